"""Files that are written whole or not at all, in the place of nothing that is not ours; sizes for people."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .redaction import redact


def check_own_place(path: Path) -> None:
    """Make sure that writing to ``path`` replaces a plain file at most: what a link leads to belongs to somebody else.

    Raises:
        FileExistsError: It is a link, a folder or a device.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "a link" if path.is_symlink() else "no plain file"
        raise FileExistsError(f"{path} is {kind} and would be replaced. Move it away, or name another folder.")


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Give a new folder called as ``target``, inside one beside it whose name nobody can guess, until the block ends.

    Nothing that lies there can be hit, and what is moved out of it has the rights of a folder made by hand.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".saving-{target.name}-") as place:
        folder = Path(place, target.name)
        folder.mkdir()
        yield folder


def expand_home(path: str | os.PathLike[str]) -> str:
    """Put the home folder in place of a ``~`` at the beginning, as shells do; any other text stays as it is.

    Raises:
        ValueError: It is the home of a user that does not exist: taken literally, a folder called so would appear.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition(os.sep)[0]
        raise ValueError(f"{path}: there is no home folder {user} here. If the name begins so, write ./{path}.")
    return expanded


def move_into_place(source: Path, target: Path) -> None:
    """Rename a complete folder to its final name. A folder of that name is moved aside first and deleted last.

    Raises:
        FileExistsError: ``target`` is a link: it is not replaced.
    """
    if target.is_symlink():
        raise FileExistsError(f"{target} is a link and would be replaced. Delete it, or name another folder.")
    share(source)
    with tempfile.TemporaryDirectory(
        dir=target.parent,
        prefix=f".old-{target.name}-",
        ignore_cleanup_errors=True,  # NFS keeps what is open elsewhere
    ) as aside:
        if target.exists():
            target.rename(Path(aside, target.name))
        source.rename(target)
        _sync(target.parent)


def share(path: Path) -> None:
    """Give a file, or all files below a folder, the rights that the umask asks for.

    Libraries write weights so that only their owner may read them, whatever the umask says.
    """
    rights = 0o666 & ~umask()
    for entry in path.rglob("*") if path.is_dir() else [path]:
        if entry.is_file() and not entry.is_symlink() and stat.S_IMODE(entry.stat().st_mode) & 0o666 != rights:
            with suppress(OSError):  # file systems that are mounted with rights of their own refuse it
                entry.chmod(rights | (stat.S_IMODE(entry.stat().st_mode) & 0o111))


def umask() -> int:
    """Return the umask, read where that does not change it for other threads."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="ignore") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):  # only Linux has this file
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new file of another name and the same suffix to write, which takes the place of ``path`` in the end.

    Raises:
        FileExistsError: ``path`` is a link, or no plain file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_own_place(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        _sync(staging)  # else a loss of power may leave the new name with nothing in it
        share(staging)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, without secrets: readers see the old or the new content, never half of it.

    Raises:
        FileExistsError: ``path`` is a link, or no plain file.
    """
    with replacing(path) as staging:
        staging.write_text(redact(text), encoding="utf-8")


def is_file(path: Path) -> bool:
    """Return whether a regular file lies there: no pipe or device, which may never end, and no impossible name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a character that no name has
        return False


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or all files and folders below a folder, would survive a loss of power."""
    for entry in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
        _sync(entry)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system can do it for folders
            raise
    finally:
        os.close(handle)


def readable_size(count: float) -> str:
    """Write a number of bytes for people, e.g. "61.2 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
