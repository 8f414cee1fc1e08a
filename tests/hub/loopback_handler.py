"""The HTTP side of ``LoopbackHub``: parse a request, find its route, answer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .loopback_store import Refusal, Repo

if TYPE_CHECKING:
    from .loopback_hub import LoopbackHub

BLOCK = 1 << 16
KINDS = {"models": "model", "datasets": "dataset"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Request:
    """One answered request; ``received``: bytes of its body that arrived."""

    method: str
    path: str
    status: int
    received: int


class Handler(BaseHTTPRequestHandler):
    """Parses, routes and answers. ``route`` methods return a JSON-like body or raise ``Refusal``."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    # ---- plumbing ----

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: ``LoopbackHub.requests`` is the log."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query, self.received, self.status = parse_qs(url.query), 0, 200
        self.body = self._blocks()
        try:
            self.hub.check_refusals(f"{self.command} {url.path}")
            storage = self.server is self.hub._servers[1]
            self._store(url.path.strip("/")) if storage else self._route(url.path)
        except Refusal as refusal:
            self._refuse(refusal)
        except (ConnectionError, TimeoutError):
            self.close_connection, self.status = True, 0
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, url.path, self.status, self.received))

    def _refuse(self, refusal: Refusal) -> None:
        for _ in self.body:  # a connection closed on unread data may lose the answer
            pass
        code = {"X-Error-Code": refusal.code} if refusal.code else {}
        self._answer(refusal.body, refusal.status, {"X-Error-Message": str(refusal), **code, **refusal.headers})

    def _blocks(self) -> Iterator[bytes]:
        """The request's body, by Content-Length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._block(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        length = left = int(self.headers.get("Content-Length") or 0)
        while left:
            block = self._block(min(left, BLOCK, length // 2 + 1))
            left -= len(block)
            yield block

    def _block(self, size: int) -> bytes:
        block = self.rfile.read(size)
        self.received += len(block)
        if len(block) < size:
            raise ConnectionError("the client went away")
        return block

    def _json(self) -> dict[str, Any]:
        return json.loads(b"".join(self.body) or b"{}")

    def _answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.status = status
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- rights ----

    def _user(self, write: bool = False) -> str | None:
        """The name behind the token, or ``None`` without one."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        hub = self.hub
        names = {hub.token: hub.user, hub.read_token: hub.user, hub.other_token: hub.stranger}
        if kind and token not in names:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if write and token == hub.read_token:
            raise Refusal(403, "This token has the role read: it cannot write")
        return names[token] if kind else None

    def _owns(self, user: str | None, namespace: str) -> bool:
        return user == namespace or (user == self.hub.user and namespace == self.hub.organisation)

    def _repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        """The repository, if this user may read (or write) it; one that may not be seen is not there."""
        user = self._user(write)
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self._owns(user, repo_id.split("/")[0])):
            raise Refusal(
                *(401, "Invalid username or password.") if user is None else (404, "Repository not found"),
                "RepoNotFound",
            )
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not self._owns(user, repo_id.split("/")[0]):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    # ---- routes ----

    def _route(self, path: str) -> None:
        for method, pattern, action in _ROUTES:
            if self.command in method.split() and (match := pattern.fullmatch(path)):
                words = {name: unquote(value or "") for name, value in match.groupdict().items()}
                body = action(self, **words)
                if body is not None:
                    self._answer(body)
                return
        if match := re.match(r"/api/(models|datasets)/(.+)", path):
            self._repo(KINDS[match[1]], unquote(match[2]))  # answers as for a repository that is not there
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "read" if self.hub.read_token in self.headers["Authorization"] else "write"
        orgs = [{"type": "org", "name": self.hub.organisation, "roleInOrg": role}] if user == self.hub.user else []
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
        return {"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": auth}

    def validate_yaml(self) -> Any:
        content = self._json()["content"]
        if content.startswith("---\n") and "\n---" not in content[3:]:
            errors = [{"message": "The metadata block is not closed."}]
            raise Refusal(400, "Invalid metadata", None, errors=errors, warnings=[])
        empty = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": empty}

    def create(self) -> Any:
        wish, user = self._json(), self._user(write=True)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        kind, namespace = wish.get("type") or "model", wish.get("organization") or user
        repo_id = f"{namespace}/{wish['name']}"
        if kind not in KINDS.values() or not NAME.fullmatch(wish["name"]):
            raise Refusal(400, f"Invalid repository: {kind} {repo_id}")
        if not self._owns(user, namespace):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                raise Refusal(409, f"You already created this {kind} repo", None, url=url)
            private = wish.get("visibility") == "private" or bool(wish.get("private"))
            self.hub.repos[kind, repo_id] = Repo(kind, repo_id, private, user)
        return {"url": url, "name": repo_id}

    def delete(self) -> Any:
        wish = self._json()
        repo_id = f"{wish.get('organization') or self._user()}/{wish['name']}"
        repo = self._repo(wish.get("type") or "model", repo_id, write=True)
        with self.hub.lock:
            del self.hub.repos[repo.kind, repo_id]
        return {}

    def settings(self, kind: str, repo: str) -> Any:
        wish, found = self._json(), self._repo(KINDS[kind], repo, write=True)
        found.private = wish.get("visibility", "private" if found.private else "public") == "private"
        return {"private": found.private}

    def info(self, kind: str, repo: str, rev: str = "main") -> Any:
        return self._repo(KINDS[kind], repo).info(rev, blobs="blobs" in self.query)

    def refs(self, kind: str, repo: str) -> Any:
        found = self._repo(KINDS[kind], repo)
        lists: dict[str, Any] = {"converts": [], "pullRequests": []}
        for key, folder, refs in (("branches", "heads", found.branches), ("tags", "tags", found.tags)):
            lists[key] = [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()
            ]
        return lists

    def commits(self, kind: str, repo: str, rev: str) -> Any:
        return [
            {"id": oid, "title": one.title, "message": one.message, "date": one.date, "authors": [{"user": one.user}]}
            for oid, one in self._repo(KINDS[kind], repo).history(rev)
        ]

    def tree(self, kind: str, repo: str, rev: str, path: str = "") -> Any:
        found = self._repo(KINDS[kind], repo)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return found.tree(found.resolve(rev)[1], path, recursive)

    def paths_info(self, kind: str, repo: str, rev: str) -> Any:
        paths = parse_qs(b"".join(self.body).decode()).get("paths", [])
        found = self._repo(KINDS[kind], repo)
        entries = {entry["path"]: entry for entry in found.tree(found.resolve(rev)[1], "", recursive=True)}
        return [entries[path] for path in paths if path in entries]

    def ref(self, kind: str, repo: str, what: str, rev: str) -> Any:
        """Create or delete a tag or a branch."""
        wish, found = self._json(), self._repo(KINDS[kind], repo, write=True)
        refs = found.tags if what == "tag" else found.branches
        with found.lock:
            if self.command == "DELETE":
                if refs.pop(rev, None) is None:
                    raise Refusal(404, f"{what} {rev} does not exist", "RevisionNotFound")
                return {}
            name, start = (wish["tag"], rev) if what == "tag" else (rev, wish.get("startingPoint", "main"))
            if not re.fullmatch(r"[\w][\w./-]*", name):
                raise Refusal(400, f"Invalid {what} name: {name}")
            if name in refs:
                raise Refusal(409, f"{what} {name} already exists")
            refs[name] = found.resolve(start)[0]
        return {}

    def preupload(self, kind: str, repo: str, rev: str) -> Any:
        wish, found = self._json(), self._repo(KINDS[kind], repo, write=True)
        head = found.resolve(rev)[1]
        answers = []
        for file in wish["files"]:
            mode = found.upload_mode(head, file["path"], file["size"], base64.b64decode(file["sample"]))
            there = head.files.get(file["path"])
            oid = there.etag if there is not None else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def commit(self, kind: str, repo: str, rev: str) -> Any:
        lines = b"".join(self.body).split(b"\n")
        found = self._repo(KINDS[kind], repo, write=True)
        oid = found.commit(rev, lines, self._user() or "")
        address = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": address, "hookOutput": ""}

    # ---- LFS and files ----

    def lfs_batch(self, prefix: str, repo: str) -> Any:
        wish = self._json()
        found = self._repo("dataset" if prefix else "model", repo, write=wish["operation"] == "upload")
        verify = {"href": f"{self.hub.endpoint}/{prefix}{repo}.git/info/lfs/objects/verify"}
        objects = []
        for one in wish["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in found.objects:
                href = self.hub.ticket(found, one["oid"], one["size"])
                answer |= {"authenticated": True, "actions": {"upload": {"href": href}, "verify": verify}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, prefix: str, repo: str) -> Any:
        wish = self._json()
        found = self._repo("dataset" if prefix else "model", repo, write=True)
        if len(found.objects.get(wish["oid"], b"")) != wish["size"]:
            raise Refusal(404, f"Object {wish['oid']} was not uploaded")
        return {"message": "Object verified"}

    def _store(self, oid: str) -> None:
        """The storage's side: PUT and GET by signed addresses."""
        repo, wanted, size = self.hub.tickets.get(self.query.get("X-Signature", [""])[0], (None, "", 0))
        if repo is None or wanted != oid:
            raise Refusal(403, "The request signature does not match")
        if self.command != "PUT":
            self._send_file(repo.objects[oid], {"ETag": f'"{oid}"'})
            return
        fault, data = self.hub.next_fault(), bytearray()
        for block in self.body:
            data += block
            if fault and len(data) * 2 >= size:
                self._break(fault)
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, f"The object is not what was announced: {len(data)} of {size} bytes, or another SHA-256")
        with self.hub.lock:
            repo.objects[oid] = bytes(data)
            self.hub.uploads.append(oid)
        self._answer(b"", headers={"ETag": f'"{oid}"'})

    def _break(self, kind: str) -> None:
        self.hub.interrupted.set()
        if kind == "stall":
            self.hub.healed.wait(60)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionError("broken on purpose")

    def resolve(self, prefix: str, repo: str, rev: str, path: str) -> Any:
        found = self._repo("dataset" if prefix else "model", repo)
        oid, commit = found.resolve(rev)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:
            refusal = Refusal(404, f"Entry not found: {path}", "EntryNotFound")
            refusal.headers = headers
            raise refusal
        if blob.lfs:
            size, pointer = str(len(blob.data)), f'"{blob.git_oid}"'
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": size, "ETag": pointer}
            location = self.hub.ticket(found, blob.sha256, len(blob.data))
            self._answer(b"", 302, {**headers, **linked, "Location": location})
        else:
            self._send_file(blob.data, {**headers, "ETag": f'"{blob.git_oid}"'})

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """The whole content, or the range that was asked for."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or match[0] == "bytes=-":
            self._answer(data, headers=headers)
            return
        first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
        last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
        if first > last:
            self._answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        self._answer(data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


def _routes() -> list[tuple[str, re.Pattern[str], Callable[..., Any]]]:
    one, rev, lfs = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)", "(?P<rev>[^/]+)", r"\.git/info/lfs/objects"
    files = "/(?P<prefix>(?:datasets/)?)(?P<repo>[^/]+/[^/]+)"
    table: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/validate-yaml", Handler.validate_yaml),
        ("POST", "/api/repos/create", Handler.create),
        ("DELETE", "/api/repos/delete", Handler.delete),
        ("PUT", f"{one}/settings", Handler.settings),
        ("GET", one, Handler.info),
        ("GET", f"{one}/revision/{rev}", Handler.info),
        ("GET", f"{one}/refs", Handler.refs),
        ("GET", f"{one}/commits/{rev}", Handler.commits),
        ("GET", f"{one}/tree/{rev}(?:/(?P<path>.+))?", Handler.tree),
        ("POST", f"{one}/paths-info/{rev}", Handler.paths_info),
        ("POST DELETE", f"{one}/(?P<what>tag|branch)/{rev}", Handler.ref),
        ("POST", f"{one}/preupload/{rev}", Handler.preupload),
        ("POST", f"{one}/commit/{rev}", Handler.commit),
        ("POST", f"{files}{lfs}/batch", Handler.lfs_batch),
        ("POST", f"{files}{lfs}/verify", Handler.lfs_verify),
        ("GET HEAD", f"{files}/resolve/{rev}/(?P<path>.+)", Handler.resolve),
    ]
    return [(methods, re.compile(pattern), action) for methods, pattern, action in table]


_ROUTES = _routes()
