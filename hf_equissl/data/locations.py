"""Files, folders, patterns, addresses and Hub names to rows of ``datasets``, whatever their columns."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow.dataset
from datasets import Dataset, DatasetDict, DatasetInfo, IterableDataset, ReadInstruction
from datasets.iterable_dataset import ArrowExamplesIterable
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..utils.hub_waits import limit_waiting
from ..utils.suggestions import did_you_mean
from .columns import IMAGE_SUFFIXES
from .errors import ImageSourceError, UnknownSplitError
from .image_folders import (
    SPLIT_FOLDERS,
    Scan,
    explain_strays,
    find_strays,
    list_images,
    read_metadata,
    show_name,
    split_files,
)
from .pairs import Pairs
from .places import BUILDERS, check_hub_name, expand_range, is_pattern, match_pattern
from .renders import find_rendered_pairs, find_split_files, open_renders
from .shared_walk import list_folder
from .tars import tar_builder

# Shards of a streamed list of files: enough for the workers of many machines, and for a good mixture.
_LIST_SHARDS = 1024
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Opened:
    """What a source holds.

    Attributes:
        rows: All columns.
        root: The folder where relative paths in them start.
        files: The shards of a stream, where they are files.
        digest: Digest of the names of the files of a stream.
        notes: What was found and is not used.
        label_hint: Why there are no classes although something looks like them, and what to do.
        reopen: The same stream of these columns alone, where the others then need not be fetched.
        pairs: How rows become pairs of images, where the files themselves are such.
    """

    rows: Dataset | IterableDataset
    root: Path | None = None
    files: tuple[str, ...] = ()
    digest: str = ""
    notes: tuple[str, ...] = ()
    label_hint: str = ""
    reopen: Callable[[list[str]], IterableDataset] | None = None
    pairs: Pairs | None = None


def open_dataset(
    source: str,
    *,
    split: str,
    streaming: bool,
    cache_dir: Any,
    num_proc: int | None,
    members: Mapping[str, Any],
    **hub: Any,
) -> Opened:
    """Open whatever ``source`` names; see ``load_images``.

    Args:
        source: File, folder, glob pattern, address or Hub name.
        split: Name of a split, unless streaming also a slice or a sum of them.
        streaming: Rows as an ``IterableDataset``.
        cache_dir, num_proc: For ``datasets``.
        members: What to take of each sample of a tar file, see ``tars.choose_members``.
        **hub: ``config_name`` and ``revision`` of a Hub data set.

    Raises:
        ImageSourceError: It does not exist, is of an unknown kind, is broken, or has no such split.
    """
    options = {"split": split, "streaming": streaming, "cache_dir": cache_dir, "num_proc": num_proc}
    options["members"] = members
    path = Path(source)
    if hub["revision"] is not None and ("://" in source or path.exists()):
        raise ImageSourceError(
            f"revision is {hub['revision']!r}: data sets of the Hub have revisions, files and folders have none. Leave "
            "it out."
        )
    if "://" in source:
        return _open_files(source, expand_range(source, source), options)
    if is_pattern(source):
        folder, patterns = match_pattern(source)
        files = [os.path.join(glob.escape(str(folder)), each) for each in patterns]
        return _open_files(source, files, options, (folder / patterns[0]).parent)
    if path.is_file():
        _check_chained(source, str(path))
        return _open_files(source, [str(path)], options, path.parent)
    if path.is_dir():
        return _open_folder(source, path, options, hub)
    check_hub_name(source)
    limit_waiting()
    return _build(source, source, options, name=hub["config_name"], revision=hub["revision"])


def _open_files(source: str, files: list[str], options: Mapping[str, Any], root: Path | None = None) -> Opened:
    suffix = Path(_drop_query(files[0])).suffix.lower()
    if suffix not in BUILDERS:
        raise ImageSourceError(
            f"{source}: files of type {suffix or 'unknown'!r} hold no data set. Expected "
            f"{', '.join(BUILDERS)}, or a folder."
        )
    return _build(source, BUILDERS[suffix], options, root, data_files=files)


def _drop_query(file: str) -> str:
    return file.split("?")[0] if "://" in file else file


def _digest(names: Iterable[str]) -> str:
    """Digest names of files: wherever their common folder lies and however addresses are signed, it is the same."""
    plain = [_drop_query(name) for name in names]
    folder = len(os.path.commonprefix(plain).rpartition("/")[0])  # noqa: RUF071 (commonpath breaks "://")
    return hashlib.blake2b("\n".join(name[folder:] for name in plain).encode(), digest_size=8).hexdigest()


def _open_folder(source: str, path: Path, options: Mapping[str, Any], hub: Mapping[str, Any]) -> Opened:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        rows = _open_saved(source, path, options)
        return _stream(rows, path, [f"{len(rows)} rows"]) if options["streaming"] else Opened(rows, path)
    if files := find_split_files(path):
        return _open_objects(source, path, files, options)
    scan = list_folder(path)
    kinds = scan.kinds
    if not kinds:
        found = "".join(f" {line}." for line in scan.left_out())
        raise ImageSourceError(
            f"{source}: the folder holds no images and no data set. Expected image files "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}), {', '.join(BUILDERS)} files, or a folder written by save_to_disk."
            + found
        )
    # Like datasets: what most files are. An archive beside a million images is not the data set.
    kind = max(kinds, key=lambda name: (kinds[name], name == "images"))
    if kind == "images":
        return _open_images(source, path, scan, options)
    scan.others.update(Counter(show_name(os.path.splitext(file)[1]) for file in scan.images))
    for unreadable in scan.chained:
        _check_chained(source, str(path / unreadable))
    opened = _build_folder(source, path, kind, options, hub)
    return replace(opened, notes=tuple(scan.left_out()))


def _open_objects(
    source: str, path: Path, files: Mapping[str, tuple[Path, Path]], options: Mapping[str, Any]
) -> Opened:
    """Open a folder of rendered objects, with files that say their splits."""
    if options["streaming"]:
        raise ImageSourceError(f"{source}: rendered objects are read by their number. Leave out streaming.")
    wanted, names = _canonical_split(source, options["split"], files)
    rows = _take(source, wanted, open_renders(path, files, names))
    pairs = find_rendered_pairs(path, rows[0]["image"], source) if len(rows) else None
    return Opened(rows, path, pairs=pairs)


def _build_folder(source: str, path: Path, kind: str, options: Mapping[str, Any], hub: Mapping[str, Any]) -> Opened:
    """Open a folder of files of one kind, whose names say their splits."""
    base = str(path.resolve())
    if glob.escape(base) == base:
        return _build(source, str(path), options, path, name=hub["config_name"])
    # Datasets takes signs of patterns in the folder's own name for patterns.
    try:
        patterns = datasets.data_files.get_data_patterns(glob.escape(base))
        files = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=glob.escape(base))
    except Exception as error:
        raise _explain_broken(source, error) from error
    suffixes = [suffix for suffix, builder in BUILDERS.items() if builder == kind]
    named = {split: [name for name in names if name.endswith(tuple(suffixes))] for split, names in files.items()}
    return _build(source, kind, options, path, data_files=named)


def _open_images(source: str, path: Path, scan: Scan, options: Mapping[str, Any]) -> Opened:
    """Open a folder of images: splits are its top folders if they are called so, classes the folders below."""
    splits, depth = split_files(scan.images)
    metadata, notes = read_metadata(path, scan)
    wanted, names = _canonical_split(source, options["split"], splits)
    rows = _take(source, wanted, {name: list_images(splits[name], depth, metadata) for name in names})
    opened = _stream(rows, path, rows["image"][:]) if options["streaming"] else Opened(rows, path)
    strays = [] if "label" in metadata else [file for name in names for file in find_strays(splits[name], depth)]
    why = [explain_strays(strays)] if strays else []
    notes = [*scan.left_out(), *scan.listed_twice(), *notes, *why]
    return replace(opened, notes=tuple(notes), label_hint="".join(f"{line}." for line in why))


def _canonical_split(source: str, wanted: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """Write ``wanted`` with splits by their usual names, and list those: ``val[:10%]`` is of ``validation``."""
    names = {SPLIT_FOLDERS.get(name, name): name for name in _split_names(wanted)}
    _check_splits(source, names, known)
    for canonical, written in names.items():
        wanted = wanted.replace(written, canonical)
    return wanted, list(names)


def _open_saved(source: str, path: Path, options: Mapping[str, Any]) -> Dataset:
    """Open a folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    _check_chained(source, str(path.resolve()))
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _explain_broken(source, error) from error
    if isinstance(saved, Dataset):
        # One set: it answers to its own name, and to the default.
        saved = DatasetDict({name: saved for name in {str(saved.split or "train"), "train"}})
    return _take(source, options["split"], saved)


def _build(source: str, path: str, options: Mapping[str, Any], root: Path | None = None, **arguments: Any) -> Opened:
    """Read rows with one of the builders of ``datasets``."""
    split = options["split"]
    if root is not None:
        _check_chained(source, str(root.resolve()))
    if "data_files" in arguments:  # what exists under this very name is no pattern
        arguments["data_files"] = _drop_patterns(arguments["data_files"])
    try:
        builder = datasets.load_dataset_builder(path, cache_dir=options["cache_dir"], **arguments)
        builder = _keep_splits(builder, split, options["cache_dir"])
        if isinstance(builder, WebDataset):
            builder = tar_builder(builder, options["cache_dir"], **options["members"])
    except Exception as error:
        is_there = os.path.exists(path) or "data_files" in arguments
        raise (_explain_broken if is_there else _explain_missing)(source, error) from error
    # Files say their splits by their names; prepared data sets of the Hub by their card.
    files = getattr(builder.config, "data_files", None)
    known = [str(name) for name in (files or builder.info.splits or {})]
    if known:
        _check_splits(source, _split_names(split), known)
    try:
        if options["streaming"]:
            if split not in known and known:
                raise ImageSourceError(
                    f"{source}: split is {split!r}, but a stream has no length to slice. Use one of {', '.join(known)}."
                )
            return _build_stream(builder, split, root)
        builder.download_and_prepare(num_proc=options["num_proc"])
        return Opened(builder.as_dataset(split=split), root)
    except ImageSourceError:
        raise
    except Exception as error:
        raise _explain_broken(source, error.__cause__ or error) from error


def _keep_splits(builder: datasets.DatasetBuilder, split: str, cache_dir: Any) -> datasets.DatasetBuilder:
    """Drop the files of other splits from a builder, which takes the first file's columns and classes for all."""
    files = getattr(builder.config, "data_files", None) or {}
    kind = next((name for cls, name in ((Parquet, "parquet"), (Arrow, "arrow")) if isinstance(builder, cls)), None)
    names = [name for name in _split_names(split) if name in files]
    is_local = not any("://" in str(file) for name in files for file in files[name])
    if kind is None or not names or len(names) == len(files) or not is_local or builder.info.features is not None:
        return builder
    chosen = _drop_patterns({name: list(files[name]) for name in names})
    return datasets.load_dataset_builder(kind, cache_dir=cache_dir, data_files=chosen)


def _drop_patterns(files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _drop_patterns(names) for split, names in files.items()}
    return [glob.escape(file) if os.path.exists(file) else file for file in files]


def _build_stream(builder: datasets.DatasetBuilder, split: str, root: Path | None) -> Opened:
    names = tuple(str(name) for name in (getattr(builder.config, "data_files", None) or {}).get(split, ()))
    parquet = isinstance(builder, Parquet)
    if parquet:
        # Fetching ahead keeps all that was read of a file until its end, and is too much for a first look.
        builder.config.fragment_scan_options = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)

    def stream() -> IterableDataset:
        rows = builder.as_streaming_dataset(split=split)
        # Streams of image files on the Hub come with a decoding step, which a cast of their columns leaves in place.
        return rows.decode(False) if rows.features else rows

    def reopen(columns: list[str]) -> IterableDataset:
        builder.config.columns = columns
        if any("://" in name for name in names):  # there it saves requests
            builder.config.fragment_scan_options = None
        return stream()

    rows = stream()
    files = names if len(names) == rows.num_shards else ()
    return Opened(rows, root, files, _digest(names), reopen=reopen if parquet else None)


def _take(source: str, split: str, sets: Mapping[str, Dataset]) -> Dataset:
    """Take the rows that ``split`` names: ``train``, ``train[:10%]``, ``train+test``."""
    _check_splits(source, _split_names(split), sets)
    if split in sets:
        return sets[split]
    instructions = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in sets.items()})
    return datasets.concatenate_datasets([sets[i.splitname].select(range(i.from_, i.to)) for i in instructions])


def _stream(rows: Dataset, root: Path, names: Iterable[str]) -> Opened:
    """Make a stream of rows, cut as ``Dataset.to_iterable_dataset`` cuts them, which copies the data set each time."""
    count = max(1, min(_LIST_SHARDS, len(rows)))
    size, longer = divmod(len(rows), count)
    ends = [size * number + min(number, longer) for number in range(count + 1)]
    slices = [range(first, end) for first, end in pairwise(ends)]
    tables = ArrowExamplesIterable(_read_slices, {"rows": rows.with_format("arrow"), "slices": slices})
    stream = IterableDataset(tables, info=DatasetInfo(features=rows.features))
    return Opened(stream, root, digest=_digest(names))


def _read_slices(rows: Dataset, slices: list[range]) -> Iterator[tuple[int, pyarrow.Table]]:
    """Read shards of a stream, a block of rows at a time."""
    for shard, part in enumerate(slices):
        for first in part[::_ROWS_AT_ONCE]:
            yield shard, rows[first : min(part.stop, first + _ROWS_AT_ONCE)]


def _split_names(split: str) -> list[str]:
    return [part.split("[")[0].strip() for part in split.split("+")]


def _check_splits(source: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UnknownSplitError(f"{source}: there is no split {name!r}.{hint} Splits: {', '.join(known)}.")


def _check_chained(source: str, path: str) -> None:
    """Refuse names that the readers of ``datasets`` take for two addresses, one within the other."""
    if "::" in path:
        raise ImageSourceError(f"{source}: {path} has '::' in it, which data sets cannot be read from. Rename it.")


def _explain_missing(source: str, error: BaseException) -> ImageSourceError:
    offline = datasets.config.HF_HUB_OFFLINE
    hint = (
        "HF_HUB_OFFLINE is set: unset it, or give a local path."
        if offline
        else "Check the name, your connection and, for private or gated sets, your login."
    )
    return ImageSourceError(
        f"{source}: neither a path that exists here (seen from {Path.cwd()}) nor a data set that could be loaded from "
        f"the Hub ({type(error).__name__}: {error}). {hint}"
    )


def _explain_broken(source: str, error: BaseException) -> ImageSourceError:
    return ImageSourceError(
        f"{source}: the files cannot be read ({type(error).__name__}: {error}). Check that they are complete and of "
        "the type that their name says."
    )
