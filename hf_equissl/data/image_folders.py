"""Folders of image files: which files are images, their splits and classes, and what metadata files say of them."""

from __future__ import annotations

import importlib.util
import os
import posixpath
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from .columns import IMAGE_SUFFIXES
from .errors import ImageSourceError

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "test": "test"}
SPLIT_FOLDERS["validation"] = "validation"
# What a file system keeps for itself at the top of a disk, and nobody but root may list.
_OF_THE_SYSTEM = "lost+found"
# Files that a message names.
_NAMED = 5
_METADATA = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"
# Opens the stored form of a name that is not UTF-8, which no column of texts can hold. No name has this character.
_ESCAPED = "\0"


@dataclass
class Scan:
    """What lies below a folder.

    Attributes:
        images: Image files, as relative paths in order.
        kinds: Number of files of each kind of data set: "images", or a builder of ``datasets``.
        metadata: Files that ``load_dataset`` reads beside images, as relative paths.
        others: Number of files of each other suffix.
        chained: Files of data sets with "::" in their path, which the readers of ``datasets`` take for two addresses.
        linked: Folders that are listed under another name, too, each with that name.
    """

    images: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    metadata: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    chained: list[str] = field(default_factory=list)
    linked: list[tuple[str, str]] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """Say how many files of which suffix are no images, if there are any."""
        count = sum(self.others.values())
        if not count:
            return []
        numbered = [f"{number} {suffix}" for suffix, number in self.others.most_common()]
        kinds = ", ".join(numbered) if len(numbered) > 1 else next(iter(self.others))
        heif = {suffix.lower() for suffix in self.others} & {".heic", ".heif", ".hif"}
        hint = " (pip install 'hf-equissl[heif]' to read HEIC)" if heif and not _reads_heif() else ""
        return [f"{count} file{'s' * (count != 1)} of other types ({kinds}) are left out{hint}"]

    def listed_twice(self) -> list[str]:
        """Say which folders are listed under several names, if there are any."""
        if not self.linked:
            return []
        name, first = map(show_name, self.linked[0])
        count = len(self.linked)
        others = f" ({count - 1} more folder{'s are' * (count > 2)}{' is' * (count == 2)} so, too)" if count > 1 else ""
        return [f"{first} and {name} are one folder, through a link: its images count once for each name{others}"]


def scan_folder(root: Path, builders: Mapping[str, str]) -> Scan:
    """List what lies below ``root``. Links are followed, hidden files and folders are not.

    A folder that links lead to, too, is listed under each of its names, whatever the order of the names on the disk; a
    link that leads back up is not followed.

    Raises:
        ImageSourceError: A folder below it cannot be listed.
    """
    scan = Scan()
    above: dict[str, tuple[str, ...]] = {}  # of each folder that is still to be listed, those on the way to it
    seen: dict[str, str] = {}
    suffixes = IMAGE_SUFFIXES | ({".heic", ".heif", ".hif"} if _reads_heif() else set())
    for folder, subfolders, names in os.walk(root, onerror=_refuse_unreadable, followlinks=True):
        real, way, prefix = os.path.realpath(folder), above.pop(folder, ()), os.path.relpath(folder, root)
        if real in way:  # A link leads back up.
            subfolders.clear()
            continue
        if (first := seen.setdefault(real, prefix)) != prefix:
            scan.linked.append((prefix, first))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != _OF_THE_SYSTEM)
        above.update(dict.fromkeys((os.path.join(folder, name) for name in subfolders), (*way, real)))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = name if prefix == "." else os.path.join(prefix, name)
            _add_file(scan, root, path, suffixes, builders)
    if scan.images:
        scan.kinds["images"] = len(scan.images)
    scan.images.sort()
    return scan


def _add_file(scan: Scan, root: Path, path: str, suffixes: Collection[str], builders: Mapping[str, str]) -> None:
    """Note one file, by the end of its name."""
    written = os.path.splitext(path)[1]
    if written.lower() in suffixes:
        scan.images.append(path)
    elif written.lower() in builders:
        scan.kinds[builders[written.lower()]] += 1
        scan.chained += [path] if "::" in path else []
    elif os.path.basename(path) in _METADATA and (root / path).is_file():
        scan.metadata.append(path)
    else:
        scan.others[show_name(written) or "no suffix"] += 1


def _refuse_unreadable(error: OSError) -> None:
    """Say which folder cannot be listed: without it images would be missing, or a class."""
    raise ImageSourceError(
        f"{show_name(str(error.filename))}: the folder cannot be listed ({error.strerror}), and what lies in it would "
        "be missing. Make it readable, or put a dot before its name: such folders are left out."
    ) from error


def split_files(files: Sequence[str]) -> tuple[dict[str, list[str]], int]:
    """Sort files into splits, by their top folders if these are called so; and say how deep class folders lie."""
    tops = {file.split(os.sep)[0] if os.sep in file else "" for file in files}
    known = tops & set(SPLIT_FOLDERS)
    # A class may be called "train". One such folder among others is a class; two, or nothing else, are splits.
    has_splits = bool(known) and (len(known) > 1 or tops - {""} == known)
    splits: dict[str, list[str]] = {}
    for file in files:
        top = file.split(os.sep)[0]
        in_split = has_splits and os.sep in file
        splits.setdefault(SPLIT_FOLDERS.get(top, top) if in_split else "train", []).append(file)
    return splits, int(has_splits)


def find_strays(files: Sequence[str], depth: int) -> list[str]:
    """List the images beside folders that would be classes, if not for them: a class needs a folder for every image."""
    strays = [file for file in files if file.count(os.sep) <= depth]
    return strays if len(strays) < len(files) else []


def explain_strays(strays: Sequence[str]) -> str:
    """Say why folders are not taken for classes, and what to do."""
    count = len(strays)
    names = ", ".join(map(show_name, strays[:_NAMED])) + f" and {count - _NAMED} more" * (count > _NAMED)
    verb, pronoun = ("lies", "it") if count == 1 else ("lie", "them")
    return (
        f"{names} {verb} beside folders, which are therefore not taken for classes: no image has a label from them. "
        f"Where they are classes, move {pronoun} into one, or out of the data set"
    )


def list_images(files: Sequence[str], depth: int, metadata: Mapping[str, Mapping[str, Any]]) -> datasets.Dataset:
    """Make rows of paths, with the folder at ``depth`` as class if every file has one.

    Args:
        files: Relative paths.
        depth: Number of folders above those of the classes.
        metadata: Column -> path -> value, as ``read_metadata`` returns it; ``label`` takes the place of classes.
    """
    parts = [file.split(os.sep) for file in files]
    columns: dict[str, list[Any]] = {"image": [encode_path(file) for file in files]}
    features: dict[str, Any] = {"image": datasets.Value("string")}
    if all(len(part) > depth + 1 for part in parts):
        classes = sorted({show_name(part[depth]) for part in parts})
        number = {name: index for index, name in enumerate(classes)}
        columns["label"] = [number[show_name(part[depth])] for part in parts]
        features["label"] = datasets.ClassLabel(names=classes)
    for name, values in metadata.items():
        columns[name] = [values.get(file) for file in files]
        features[name] = datasets.Features.from_arrow_schema(pa.table({name: columns[name]}).schema)[name]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read_metadata(root: Path, scan: Scan) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read the metadata files of a folder, as far as their columns can be labels or hold objects with several values.

    Returns:
        Column -> path of an image -> value; and lines that say what is not used, and why.
    """
    columns: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    nested: set[str] = set()
    images = set(scan.images)
    tables = _read_tables(root, scan.metadata, notes)
    for path, table in tables.items():
        folder = posixpath.dirname(path)
        files = [posixpath.normpath(posixpath.join(folder, str(name))) for name in table[_FILE_NAME].to_pylist()]
        absent = [file for file in files if file not in images]
        if absent:
            notes.append(f"{path} names {len(absent)} files that are not there, such as {absent[0]}")
        unnamed = len({file for file in images if file.startswith(folder)} - set(files))
        if unnamed:
            notes.append(f"{path} does not name {unnamed} of the images, which have no label from it")
        for name in table.column_names:
            values = table[name]
            if name not in (_FILE_NAME, "image") and (_can_be_labels(values) or pa.types.is_nested(values.type)):
                columns.setdefault(name, {}).update(zip(files, values.to_pylist(), strict=True))
                nested |= {name} if pa.types.is_nested(values.type) else set()
    if "label" not in columns and (others := [name for name in columns if name not in nested]):
        notes.append(
            f"{', '.join(scan.metadata)}: there is no column label; others can be named with --label_column "
            f"({', '.join(others)})"
        )
    return columns, notes


def encode_path(name: str) -> str:
    """Return the form in which a column of texts holds the path of a file, whose name may not be UTF-8."""
    return name if _is_text(name) else _ESCAPED + quote_from_bytes(os.fsencode(name))


def decode_path(stored: str) -> str:
    """Return the path that ``encode_path`` was given."""
    return os.fsdecode(unquote_to_bytes(stored[1:])) if stored.startswith(_ESCAPED) else stored


def show_name(name: str) -> str:
    """Return a name as it can be printed: what is not UTF-8 as its bytes."""
    return name if _is_text(name) else os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_tables(root: Path, paths: Sequence[str], notes: list[str]) -> dict[str, pa.Table]:
    """Read metadata files; a column that holds texts in one of them is read as texts in all. Others are noted."""
    tables: dict[str, pa.Table] = {}
    for path in sorted(paths):
        try:
            table = _read_table(root / path)
        except (OSError, ValueError) as error:  # pyarrow's errors are among them
            notes.append(f"{path} is not used: it cannot be read ({str(error).splitlines()[0]})")
            continue
        if _FILE_NAME in table.column_names:
            tables[path] = table
        else:
            notes.append(f"{path} is not used: it has no column {_FILE_NAME} ({', '.join(table.column_names)})")
    texts = {field.name for table in tables.values() for field in table.schema if pa.types.is_string(field.type)}
    return {path: _cast_to_texts(root / path, table, texts) for path, table in tables.items()}


def _read_table(path: Path, texts: Collection[str] = ()) -> pa.Table:
    if path.suffix != ".csv":
        return pyarrow.json.read_json(path)
    types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()), strings_can_be_null=True)
    return pyarrow.csv.read_csv(path, convert_options=types)


def _cast_to_texts(path: Path, table: pa.Table, texts: Collection[str]) -> pa.Table:
    """Read numbers as texts in some columns."""
    wrong = [field.name for field in table.schema if field.name in texts and _is_number(field.type)]
    if wrong and path.suffix == ".csv":
        return _read_table(path, wrong)  # as they are written, such as 007
    for name in wrong:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    return table


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _can_be_labels(values: pa.ChunkedArray) -> bool:
    kind = values.type
    if pa.types.is_string(kind):
        first = next((value for value in values.to_pylist() if value), "")
        return os.path.splitext(first)[1].lower() not in IMAGE_SUFFIXES  # names of masks are no labels
    return _is_number(kind)


def _reads_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None
