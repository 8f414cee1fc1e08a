"""What a Hub remembers: repositories with blobs, commits and refs, in memory. No network here: see ``loopback_hub``."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from typing import Any

LFS_FROM_BYTES = 10 * 2**20  # a larger text file is an LFS file too
LFS_ENDINGS = ("arrow", "bin", "ckpt", "gz", "h5", "npy", "npz", "onnx", "parquet", "pickle", "pkl", "pt", "pth")
GIT_ATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in (*LFS_ENDINGS, "safetensors", "tar", "zip")
)


class Refusal(Exception):
    """An answer other than success: status, ``X-Error-Code`` and ``X-Error-Message``."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}
        self.headers: dict[str, str] = {}


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Blob:
    """A file's content; ``lfs``: git holds a pointer to it."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds for an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def describe(self, path: str) -> dict[str, Any]:
        """An entry of the tree listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of all files, and how it came."""

    files: dict[str, Blob]
    parent: str | None
    user: str
    title: str
    message: str = ""
    date: str = field(default_factory=now)

    @property
    def oid(self) -> str:
        listing = sorted((path, blob.git_oid) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.user, self.title, self.date, listing]).encode()).hexdigest()


class Repo:
    """One repository. It begins with a commit of ``.gitattributes``, as on the Hub."""

    def __init__(self, kind: str, repo_id: str, private: bool, user: str) -> None:
        self.kind, self.id, self.private = kind, repo_id, private
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.lock = threading.RLock()
        first = {".gitattributes": Blob(GIT_ATTRIBUTES.encode(), lfs=False)}
        self._put("main", Commit(first, None, user, "initial commit"))

    def _put(self, branch: str, commit: Commit) -> str:
        oid = commit.oid
        self.commits[oid] = commit
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> tuple[str, Commit]:
        """The commit of a branch, a tag or a full id."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]

    def branch(self, name: str) -> tuple[str, Commit]:
        """The head of a branch; unlike ``resolve``, commits can be put on it."""
        if name not in self.branches:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.branches[name], self.commits[self.branches[name]]

    def history(self, revision: str) -> Iterator[tuple[str, Commit]]:
        """From the newest commit to the first."""
        oid: str | None = self.resolve(revision)[0]
        while oid is not None:
            yield oid, self.commits[oid]
            oid = self.commits[oid].parent

    def upload_mode(self, commit: Commit, path: str, size: int, sample: bytes) -> str:
        """ "lfs" by the patterns of ``.gitattributes``, by size, or because the beginning is not text."""
        attributes = commit.files.get(".gitattributes", Blob(b"", False)).data.decode().splitlines()
        patterns = [line.split()[0] for line in attributes if "filter=lfs" in line]
        name = path.rpartition("/")[2]
        if size >= LFS_FROM_BYTES or any(fnmatch(name, pattern) or fnmatch(path, pattern) for pattern in patterns):
            return "lfs"
        try:
            sample.decode()
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 3:  # not a character cut by the end of the sample
                return "lfs"
        return "lfs" if b"\0" in sample else "regular"

    def commit(self, branch: str, lines: Iterable[bytes], user: str) -> str:
        """Apply a commit's ndjson as a whole or not at all; returns the new head."""
        operations = [json.loads(line) for line in lines if line.strip()]
        if not operations or operations[0]["key"] != "header":
            raise Refusal(400, "The first line of a commit must be its header")
        header = operations.pop(0)["value"]
        with self.lock:
            head, parent = self.branch(branch)
            if (wanted := header.get("parentCommit")) and not head.startswith(wanted):
                raise Refusal(412, f"A commit has happened since. Please refresh and try again. Current: {head}")
            files = dict(parent.files)
            for operation in operations:
                self._apply(files, operation["key"], operation["value"])
            return self._put(branch, Commit(files, head, user, header["summary"], header.get("description", "")))

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            data = self.objects.get(value["oid"])
            if data is None or len(data) != value.get("size", len(data)):
                raise Refusal(400, f"LFS pointer of {path} points to an object that was not uploaded: {value['oid']}")
            files[path] = Blob(data, lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise Refusal(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in inside:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    def tree(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below ``folder``; without ``recursive`` its direct entries."""
        prefix = folder.rstrip("/") + "/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = blob.describe(path)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return list(entries.values())

    def info(self, revision: str, blobs: bool) -> dict[str, Any]:
        """The answer of the model and dataset endpoints."""
        oid, commit = self.resolve(revision)
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": path}
            if blobs:
                entry |= {"size": len(blob.data), "blobId": blob.git_oid}
                if blob.lfs:
                    entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
            siblings.append(entry)
        dates = {"lastModified": commit.date, "createdAt": list(self.history(revision))[-1][1].date}
        own = {"_id": hashlib.sha1(self.id.encode()).hexdigest()[:24], "id": self.id, "author": self.id.split("/")[0]}
        state = {"sha": oid, "private": self.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        extra = {"modelId": self.id} if self.kind == "model" else {}
        return {**own, **extra, **state, **dates, "tags": [], "siblings": siblings}
