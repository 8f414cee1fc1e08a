"""Where a run's checkpoints are, which of them are complete, and what they hold.

``checkpoint.json`` is written last and lists every file with its size and checksum. A folder without this list, or with
a file that is not as listed, is not a complete checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers.utils import logging

from ..distributed.collectives import is_main_process
from ..distributed.engines import Engine
from ..utils.files import write_text
from .integrity import find_damage
from .sharded_files import read_whole

logger = logging.get_logger(__name__)
ARGUMENTS_FILE = "training_args.json"
MANIFEST = "checkpoint.json"
STAGING_FOLDER = ".saving"
MODEL_SHARDS = "model_shards"  # FSDP2 writes this folder with SHARDED_STATE_DICT, in place of model.safetensors
ENCODER_FOLDER = "encoder"  # where a finished run puts its encoder
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class IncompleteCheckpointError(ValueError):
    """A folder is not a complete checkpoint; the message names what is missing."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``checkpoint.json``.

    Attributes:
        engine: The engine that wrapped the model.
        world_size: Number of processes.
        global_batch: Images per optimizer step: per device x processes x accumulation.
        step: Number of optimizer steps taken.
        format: "full" (every tensor whole, by name), "sharded" (by name, any number of processes reads it),
            "deepspeed" (the stage's own files), or "weights" (``save_only_model``).
        files: Path in the folder -> size in bytes.
        checksums: Path in the folder -> ``integrity.checksums``; empty in checkpoints of earlier versions.
    """

    engine: Engine
    world_size: int
    global_batch: int
    step: int
    format: str
    files: dict[str, int]
    checksums: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.world_size, self.global_batch, self.step, *self.files.values())
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("something else stands where a number belongs")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in self.files):
            raise ValueError("it lists files outside of its folder")
        if not all(isinstance(text, str) for text in (self.format, *self.checksums.values())):
            raise TypeError("something else stands where a text belongs")

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(self.files.values())

    @classmethod
    def read(cls, folder: str | Path, *, verify: bool = False) -> Self:
        """Read the manifest of a complete checkpoint.

        Args:
            folder: Folder of the checkpoint.
            verify: Whether to read all files, too, and compare checksums: once in a process.

        Raises:
            IncompleteCheckpointError: It is not complete, or not a checkpoint.
        """
        folder = Path(folder)
        manifest = cls._parse(folder)
        if _is_numbered(folder) and checkpoint_step(folder) != manifest.step:
            raise IncompleteCheckpointError(f"{folder / MANIFEST} is that of step {manifest.step}")
        for name, size in manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise IncompleteCheckpointError(f"{path} is missing")
            if path.stat().st_size != size:
                raise IncompleteCheckpointError(f"{path} has {path.stat().st_size} bytes, and {size} were written")
        if verify and (damage := find_damage(folder, list(manifest.files), manifest.checksums)) is not None:
            raise IncompleteCheckpointError(damage)
        return manifest

    @classmethod
    def _parse(cls, folder: Path) -> Self:
        try:
            plain = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(**{**plain, "engine": Engine(plain["engine"])})
        except FileNotFoundError as error:
            raise IncompleteCheckpointError(
                f"{folder} has no {MANIFEST}, which is written last: it is half-written, or not written by this version"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise IncompleteCheckpointError(f"{folder / MANIFEST} cannot be read ({error})") from error

    def write(self, folder: Path) -> None:
        """Write ``checkpoint.json`` into ``folder``, in one step."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


def check_weights(folder: str | Path) -> None:
    """Compare the weights of a checkpoint with its manifest. A folder without one, and other files, are not checked.

    Raises:
        OSError: They are not what was written.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return
    try:
        manifest = Manifest._parse(folder)
        weights = [name for name in manifest.files if name.startswith(Path(_WEIGHTS).stem)]
        damage = find_damage(folder, weights, manifest.checksums)
    except IncompleteCheckpointError as error:
        damage = str(error)
    if damage is not None:
        raise OSError(f"the weights in {folder} cannot be used: {damage}")


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """Find the complete checkpoint with the highest step below ``output_dir``, or ``None``.

    A warning names each folder that is newer and not complete.
    """
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            Manifest.read(folder, verify=True)
        except IncompleteCheckpointError as error:
            if is_main_process():
                logger.warning_once(f"{folder.name} is not complete and is passed over: {error}.")
        else:
            return str(folder)
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the folders ``checkpoint-N`` below ``output_dir`` by their steps, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _is_numbered(path)]
    return sorted(folders, key=checkpoint_step)


def _is_numbered(folder: Path) -> bool:
    return folder.name.startswith("checkpoint-") and folder.name[11:].isdecimal()


def checkpoint_step(folder: str | Path) -> int:
    """Read the step in a checkpoint's name."""
    return int(Path(folder).name[11:])


def read_checkpoint_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read all weights of a checkpoint of any engine, whole, on the CPU of this process alone.

    Raises:
        OSError: The weights are missing or damaged.
    """
    folder = Path(folder)
    check_weights(folder)
    try:
        if (folder / MODEL_SHARDS).is_dir():
            return read_whole(folder / MODEL_SHARDS)
        return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    except (SafetensorError, CheckpointException, UnpicklingError, ValueError, KeyError, RuntimeError) as error:
        raise OSError(f"the weights in {folder} cannot be read: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint with whole weights: one, or several of a large model."""
    if not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
