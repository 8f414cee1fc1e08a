"""A folder of files is listed once on each machine, whatever the number of processes: by the first one there."""

from __future__ import annotations

import atexit
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.distributed_c10d import _get_default_store

from ..distributed.collectives import rank, world_size
from .errors import ImageSourceError
from .image_folders import Scan, scan_folder
from .places import BUILDERS

# Seconds that the others give the first process to begin: it may have failed before it came here.
_PATIENCE = 60.0
_walks: Counter[str] = Counter()
_known: dict[str, Scan] = {}


def list_folder(path: Path) -> Scan:
    """List what lies below a folder of images or of files of data sets, or return what another process has found."""
    return _known.get(str(path)) or scan_folder(path, BUILDERS)


@contextmanager
def walked_once(source: str | None) -> Iterator[None]:
    """Let all processes of a machine use the list of the first one inside, where ``source`` is a folder.

    All processes enter it equally often. None waits for one that does not come: it then lists the folder itself.
    """
    path = Path(source or "")
    if source is None or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 or world_size() == 1 or not path.is_dir():
        yield
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    _walks[source] += 1
    first = rank() - local_rank  # the first process of this machine
    key = f"hf_equissl/walk/{first}/{_walks[source]}/{source}"
    scan = _publish(path, key) if local_rank == 0 else _receive(key)
    if scan is not None:
        _known[str(path)] = scan
    try:
        yield
    finally:
        _known.pop(str(path), None)


def _publish(path: Path, key: str) -> Scan | None:
    store, complete = _get_default_store(), ""
    store.set(f"{key}/begun", "yes")
    try:
        scan = scan_folder(path, BUILDERS)
        handle, file = tempfile.mkstemp(prefix="hf_equissl-walk-")
        atexit.register(_remove, file)
        with os.fdopen(handle, "w", encoding="ascii") as opened:
            json.dump(vars(scan), opened)  # ASCII: names that are not UTF-8 stay what they are
        complete = file
        return scan
    except (OSError, ImageSourceError):  # who opens the folder finds the same, and says it
        return None
    finally:
        store.set(f"{key}/done", complete)


def _receive(key: str) -> Scan | None:
    store, end = _get_default_store(), time.monotonic() + _PATIENCE
    while not store.check([f"{key}/done"]):  # not store.wait, which no signal interrupts
        if time.monotonic() > end and not store.check([f"{key}/begun"]):
            return None
        time.sleep(0.05)
    file = store.get(f"{key}/done").decode()
    if not file:
        return None
    try:
        with open(file, encoding="ascii") as opened:
            found = json.load(opened)
    except (OSError, ValueError):
        return None
    scan = Scan(**{**found, "kinds": Counter(found["kinds"]), "others": Counter(found["others"])})
    if store.add(f"{key}/read", 1) == int(os.environ["LOCAL_WORLD_SIZE"]) - 1:
        _remove(file)
    return scan


def _remove(file: str) -> None:
    with suppress(OSError):
        os.unlink(file)
