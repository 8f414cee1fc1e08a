"""Files of named tensors, some of them sharded over processes, which any number of processes can read.

The files are those of ``torch.distributed.checkpoint``. Their index, ``.metadata``, is a pickle, which torch opens
without restriction; here it may name only what such an index consists of. Tensors are read as ``weights_only``.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

# Modules and names that an index may consist of.
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors``, each process its shards. All processes have to call it.

    Raises:
        OSError: On all processes, if one cannot write its part.
    """
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))
        raise OSError(str(failure[0]) or type(failure[0]).__name__) from error


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place, whole ones and sharded ones alike."""
    dcp.load(cast(dict[str, Any], tensors), storage_reader=_Reader(folder))


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Read all tensors, whole, on the CPU of this process alone."""
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in list_tensors(folder).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is intended here
        dcp.load(cast(dict[str, Any], tensors), storage_reader=_Reader(folder), no_dist=True)
    return tensors


def list_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """List names, sizes and types of the tensors in ``folder``."""
    content = _Reader(folder).read_metadata().state_dict_metadata
    return {name: meta for name, meta in content.items() if isinstance(meta, TensorStorageMetadata)}


class _Reader(dcp.FileSystemReader):
    """torch's reader, which opens the index of a checkpoint from anywhere without letting it run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return cast(Metadata, metadata)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        value = super().find_class(module, name) if self._may_name(module, name) else None
        # Of these modules only what they define, nothing that they import.
        if value is None or (module in _INDEX_MODULES and value.__module__ != module):
            raise pickle.UnpicklingError(f"the index names {module}.{name}, which no index of tensors holds")
        return value

    @staticmethod
    def _may_name(module: str, name: str) -> bool:
        if module in _INDEX_MODULES:
            return "." not in name and name.strip("_")[:1].isupper()  # classes
        return (module, name) in _INDEX_NAMES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
