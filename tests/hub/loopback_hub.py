"""A Hub on 127.0.0.1 that speaks the wire protocol of huggingface.co to the real ``huggingface_hub`` client.

Standard library only. It stores what the client sends over HTTP and knows nothing of who sends it. Models and data
sets; identity, create, delete, visibility, preupload, LFS, commits, refs, tags, branches, trees, paths-info, file
metadata, downloads with ranges. LFS objects live behind a second port, as the real ones live on another host: they are
put and got there by signed addresses, without a token. An object is kept only if its SHA-256 and size are those
that were announced.

Limits. Contents stay in memory. No Xet: run the client with ``HF_HUB_DISABLE_XET=1``. LFS uses the basic transfer (one
PUT per object), never multipart. No pull requests, gated repositories, spaces, search, ``.gitignore`` rules, copies
between repositories, resource groups, or pages of long listings. ``validate-yaml`` checks that a card's front matter is
closed, not what it says. Signed addresses do not expire. Rate limits only where a test asks for them (``refuse``).
"""

from __future__ import annotations

import re
import secrets
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Self

from .loopback_handler import Handler, Request
from .loopback_store import Refusal, Repo


@dataclass
class Fault:
    """What goes wrong with uploads: those from the ``first`` on, ``count`` of them (``None``: all)."""

    kind: str
    first: int
    count: int | None


class LoopbackHub:
    """The server: a context manager that listens on two free ports.

    Two users: ``user`` (``token``; ``read_token`` may not write; member of the organisation "lab") and a stranger
    (``other_token``) with rights on nothing of theirs.

    Attributes:
        endpoint: For ``HF_ENDPOINT`` and ``HfApi(endpoint=...)``.
        requests: Every request that was answered, in order.
        uploads: SHA-256 of every LFS object that arrived whole, in order.
        interrupted: Set when a fault of ``interrupt_uploads`` has struck.
    """

    user, organisation, stranger = "maker", "lab", "stranger"
    token, read_token, other_token = "hf_LoopbackMaker", "hf_LoopbackReader", "hf_LoopbackStranger"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.uploads: list[str] = []
        self.interrupted, self.healed = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self.tickets: dict[str, tuple[Repo, str, int]] = {}
        self._fault: Fault | None = None
        self._puts = 0
        self._refusals: list[tuple[re.Pattern[str], Refusal, int | None]] = []
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> Self:
        handler = type("Handler", (Handler,), {"hub": self})
        for _ in range(2):
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def env(self, home: str | Path, token: str | None = "") -> dict[str, str]:
        """Environment variables that send a process here; ``home``: an empty folder for its cache.

        They are read when ``huggingface_hub`` is imported. ``token``: another than the user's, or ``None``.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_TOKEN": self.token if token == "" else token or "",
        }

    # ---- what tests ask and tell ----

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        """A repository as it stands, for assertions."""
        return self.repos[kind, repo_id]

    def count(self, method: str, pattern: str = "", status: int | None = None) -> int:
        """Requests so far with this method, a path that matches, and this status."""
        return sum(
            request.method == method and bool(re.search(pattern, request.path)) and status in (None, request.status)
            for request in self.requests
        )

    @property
    def received_bytes(self) -> int:
        """Bytes of all request bodies so far, those of interrupted uploads included."""
        return sum(request.received for request in self.requests)

    def interrupt_uploads(self, first: int = 1, count: int | None = 1, kind: str = "drop") -> None:
        """Break LFS uploads in the middle of their body, on the socket.

        Args:
            first: The first upload, counted from now, that breaks.
            count: How many break; ``None``: all until ``heal``. The client tries each upload six times.
            kind: "drop" resets the connection after half of the body. "stall" reads half and then nothing more, until
                ``heal``: time to kill the client.
        """
        self._fault, self._puts = Fault(kind, first, count), 0
        self.interrupted.clear()
        self.healed.clear()

    def refuse(self, pattern: str, status: int, message: str, count: int | None = None, **headers: str) -> None:
        """Answer requests whose "METHOD path" matches with an error; ``count`` times, or until ``heal``."""
        refusal = Refusal(status, message)
        refusal.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._refusals.append((re.compile(pattern), refusal, count))

    def heal(self) -> None:
        """End all faults."""
        self._fault = None
        self._refusals.clear()
        self.healed.set()

    # ---- for the handler ----

    def next_fault(self) -> str | None:
        """What happens to the upload that begins now."""
        with self.lock:
            self._puts += 1
            fault = self._fault
            if fault is None or self._puts < fault.first:
                return None
            return fault.kind if fault.count is None or self._puts < fault.first + fault.count else None

    def check_refusals(self, request: str) -> None:
        """Raise what ``refuse`` asked for."""
        with self.lock:
            for index, (pattern, refusal, count) in enumerate(self._refusals):
                if count != 0 and pattern.search(request):
                    self._refusals[index] = pattern, refusal, None if count is None else count - 1
                    raise refusal

    def ticket(self, repo: Repo, oid: str, size: int) -> str:
        """A signed address in the storage for one object."""
        signature = secrets.token_hex(8)
        with self.lock:
            self.tickets[signature] = repo, oid, size
        return f"{self.storage}/{oid}?X-Signature={signature}"
