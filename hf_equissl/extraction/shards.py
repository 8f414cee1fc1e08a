"""Files of features, which get their final name when they are whole and say themselves what they hold."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from .settings import ExtractionError

# Under this key every file says which extraction and which rows it holds, and which images were left out.
_KEY = "hf_equissl"
# Parquet is written in groups of rows of about this size, so that a shard need not fit into memory.
_GROUP_BYTES = 32 * 10**6
# Names of our columns' types in safetensors, and bytes that are copied at a time into its files.
_TYPES, _COPIED = {"int64": "I64", "float32": "F32", "float16": "F16"}, 2**20
# Columns beside the features.
INDEX, NAME, LABEL = "index", "name", "label"

Columns = Mapping[str, np.ndarray | list[Any]]


def shard_features(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, classes: Sequence[str] | None, labelled: bool
) -> datasets.Features:
    """List the columns of a shard: index, name, label, and each feature as a list of fixed length or an ``Array2D``.

    Args:
        shapes: Feature -> its shape for one image, (D,) or (N, D).
        dtype: Type of the features.
        classes: Names of the classes, where the source has them.
        labelled: Whether there are labels.
    """
    columns: dict[str, Any] = {INDEX: datasets.Value("int64"), NAME: datasets.Value("string")}
    if labelled:
        columns[LABEL] = datasets.ClassLabel(names=list(classes)) if classes else datasets.Value("int64")
    for name, shape in shapes.items():
        columns[name] = (
            datasets.List(datasets.Value(dtype), length=shape[0])
            if len(shape) == 1
            else datasets.Array2D(shape=shape, dtype=dtype)
        )
    return datasets.Features(columns)


def staging_path(path: Path) -> Path:
    """Name the file in which a shard is written until it is whole: hidden from ``datasets``, of this process alone."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{_own()}.tmp")


def remove_leftovers(folder: Path, split: str, *, own: bool = False) -> None:
    """Delete unfinished files of a split: those of this process (``own``), or those of interrupted ones, too."""
    ours = re.compile(rf"\.{re.escape(split)}-\d{{5}}-of-\d{{5}}\..+{re.escape(_own()) if own else ''}\.tmp")
    for path in folder.glob(".*.tmp"):
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _own() -> str:
    return f"{socket.gethostname()}.{os.getpid()}"


class ParquetShard:
    """Writes one ``.parquet`` file.

    Args:
        path: Its final name.
        features: Its columns.
    """

    def __init__(self, path: Path, features: datasets.Features) -> None:
        self.path, self._staging, self._schema = path, staging_path(path), features.arrow_schema
        row_bytes = sum(np.prod(_shape(feature)) * np.dtype(_dtype(feature)).itemsize for feature in features.values())
        self._group = max(1, int(_GROUP_BYTES // row_bytes))
        self._waiting: list[pa.Table] = []
        # Features do not compress, and dictionaries of floats only cost time.
        self._file = open(self._staging, "xb")  # noqa: SIM115 - closed with the shard; never what lies there
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="none", use_dictionary=False)

    def add(self, columns: Columns) -> None:
        """Append rows: column -> values, one per row."""
        arrays = [_arrow(columns[field.name], field.type) for field in self._schema]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        # Groups of a fixed number of rows: the file does not depend on the size of batches.
        while sum(map(len, self._waiting)) >= self._group:
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table.slice(0, self._group), row_group_size=self._group)
            self._waiting = [table.slice(self._group)]

    def close(self, record: Mapping[str, Any]) -> None:
        """Write the rest and ``record``, and give the file its name."""
        table = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        if len(table):
            self._writer.write_table(table, row_group_size=self._group)
        self._writer.add_key_value_metadata({_KEY: json.dumps(record)})
        self._writer.close()
        self._file.close()
        _put_in_place(self._staging, self.path)


class SafetensorsShard:
    """Writes one ``.safetensors`` file, with the images' names in its metadata.

    A file begins with the length of all its tensors. Until that is known, each column is kept in a file without a name
    beside the final one, and not in memory, since a shard of a stream may have any length.

    Args:
        path: Its final name.
        features: Its columns.
    """

    def __init__(self, path: Path, features: datasets.Features) -> None:
        self.path, self._staging, self._features = path, staging_path(path), features
        self._names: list[str | None] = []
        prefix, suffix = f".{path.name}.", f".{_own()}.tmp"  # for file systems on which a name cannot be avoided
        # Tensors stand in the order of safetensors: those of larger numbers first, which keeps all of them aligned.
        names = sorted(set(features) - {NAME}, key=lambda name: (-np.dtype(_dtype(features[name])).itemsize, name))
        self._columns = {
            name: tempfile.TemporaryFile(dir=path.parent, prefix=prefix, suffix=suffix)  # noqa: SIM115 - closed with the shard
            for name in names
        }

    def add(self, columns: Columns) -> None:
        """Append rows: column -> values, one per row."""
        self._names += list(columns[NAME])
        for name, file in self._columns.items():
            values = columns[name]
            if name == LABEL:  # a tensor has no gaps: -1, the sign for "unlabelled" in public data sets
                values = [-1 if label is None else label for label in values]
            file.write(np.ascontiguousarray(values, dtype=_dtype(self._features[name])).data)

    def close(self, record: Mapping[str, Any]) -> None:
        """Write everything and ``record``, and give the file its name."""
        with open(self._staging, "xb") as whole:
            whole.write(self._header({_KEY: json.dumps(record), "names": json.dumps(self._names)}))
            for column in self._columns.values():
                column.seek(0)
                shutil.copyfileobj(column, whole, _COPIED)
                column.close()
        _put_in_place(self._staging, self.path)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        """Write the header as safetensors does, but with metadata in a fixed order: same rows, same file."""
        entries: dict[str, Any] = {"__metadata__": metadata}
        begin = 0
        for name in self._columns:
            dtype, shape = _dtype(self._features[name]), (len(self._names), *_shape(self._features[name]))
            end = begin + math.prod(shape) * np.dtype(dtype).itemsize
            entries[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
            begin = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def open_shard(path: Path, features: datasets.Features) -> ParquetShard | SafetensorsShard:
    """Begin a file of the kind that its suffix names."""
    return ParquetShard(path, features) if path.suffix == ".parquet" else SafetensorsShard(path, features)


def read_record(path: Path) -> dict[str, Any]:
    """Read what a finished file says of itself.

    Raises:
        ExtractionError: It is damaged, or not a file of ours.
    """
    try:
        if path.suffix == ".parquet":
            found = pq.read_metadata(path).metadata or {}
            record = found.get(_KEY.encode())
        else:
            with safe_open(path, framework="numpy") as file:
                record = (file.metadata() or {}).get(_KEY)
        if record is None:
            raise ExtractionError(f"{path} is not a file of this command. Name a new --output_dir.")
        return json.loads(record)
    except (pa.ArrowException, SafetensorError, OSError) as error:
        raise ExtractionError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it is damaged. Delete it; the same command makes "
            "it again."
        ) from error


def _put_in_place(staging: Path, path: Path) -> None:
    """Rename a whole file, after its bytes have reached the disk: a name must not outlive its content."""
    with open(staging, "rb") as file:
        os.fsync(file.fileno())
    os.replace(staging, path)


def _shape(feature: Any) -> tuple[int, ...]:
    if isinstance(feature, datasets.Array2D):
        return tuple(feature.shape)
    return (feature.length,) if isinstance(feature, datasets.List) else ()


def _dtype(feature: Any) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return "int64"
    dtype = feature.feature.dtype if isinstance(feature, datasets.List) else feature.dtype
    return "object" if dtype == "string" else dtype


def _arrow(values: np.ndarray | list[Any], kind: pa.DataType) -> pa.Array:
    """Turn the values of one column into an Arrow array; numbers of features are not copied."""
    if isinstance(kind, pa.ExtensionType):  # Array2D: lists of lists
        array = np.asarray(values)
        count, rows, columns = array.shape
        inner = pa.ListArray.from_arrays(_offsets(count * rows, columns), pa.array(array.reshape(-1)))
        return pa.ExtensionArray.from_storage(kind, pa.ListArray.from_arrays(_offsets(count, rows), inner))
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(values).reshape(-1)), type=kind)
    return pa.array(values, type=kind)


def _offsets(count: int, step: int) -> pa.Array:
    return pa.array(np.arange(count + 1, dtype=np.int32) * step)
