"""Weights and optimizer states by name, so that one engine reads what another one wrote.

One process, DDP and FSDP2 write the same files: ``model.safetensors`` and ``optimizer.pt``, every tensor whole. FSDP2
with SHARDED_STATE_DICT writes ``model_shards/`` and ``optimizer_shards/`` in place of the tensors, each process its own
part. Any of them reads either form, on any number of processes. DeepSpeed's stages keep their own files.

Names are put into the optimizer's ``state_dict`` here and not by ``torch.distributed.checkpoint.state_dict``: the
latter refuses parameters that have no state yet (a last layer that is held), and accepts other groups in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from numpy.random import SeedSequence
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..distributed.collectives import local_shard
from ..distributed.engines import plain_name
from ..utils.files import write_text
from .manifest import ARGUMENTS_FILE, MODEL_SHARDS, Manifest, weight_files
from .sharded_files import list_tensors, read_shards, write_shards
from .whole import WholeCheckpoints

OPTIMIZER_SHARDS = "optimizer_shards"


class PortableStates(WholeCheckpoints):
    """``WholeCheckpoints`` whose weights and optimizer state do not depend on the engine, except under DeepSpeed."""

    @property
    def checkpoint_format(self) -> str:
        """``Manifest.format`` of the checkpoints that are saved."""
        kind = super().checkpoint_format
        return "sharded" if kind == "full" and self._writes_shards else kind

    @property
    def _writes_shards(self) -> bool:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and "SHARDED" in str(plugin.state_dict_type)

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does; where weights stay sharded, each process writes its shards. All have to call it."""
        if not self._writes_shards:
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        model = cast(Any, self.model)
        with self.writing():
            write_shards(folder / MODEL_SHARDS, _named_tensors(model))
        if self.args.should_save:
            with self.writing():
                model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
                model.config.save_pretrained(folder)
                write_text(folder / ARGUMENTS_FILE, self.args.to_json_string())
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            return self._save_deepspeed(Path(output_dir))
        folder, saved = Path(output_dir), self._named_optimizer_state()
        if self._writes_shards:
            tensors = _take_tensors(saved["state"])
            with self.writing():
                write_shards(folder / OPTIMIZER_SHARDS, tensors)
        else:
            saved["state"] = {
                name: {key: _gather_whole(value, keep=self.args.should_save) for key, value in state.items()}
                for name, state in saved["state"].items()
            }
        if self.args.should_save:
            with self.writing():
                torch.save(saved, folder / OPTIMIZER_NAME)
                torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)
        return None

    def _save_deepspeed(self, folder: Path) -> None:
        """Save as the parent does, without letting the others wait for a process that cannot write."""
        engine = cast(Any, self.model_wrapped)
        with (
            _shield(engine.checkpoint_engine, "save", self.writing),
            _shield(engine, "_copy_recovery_script", self.writing),
        ):
            engine.save_checkpoint(str(folder), save_latest=False)
        if self.args.should_save:
            with self.writing():
                (folder / "latest").write_text(f"global_step{engine.global_steps}")
                if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
                    torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)

    def _named_optimizer_state(self) -> dict[str, Any]:
        """Make the optimizer's ``state_dict`` with names in place of numbers."""
        names = [name for group in self._parameter_names() for name in group]
        packed = self._unwrap_optimizer().state_dict()
        return {
            "state": {names[number]: dict(state) for number, state in packed["state"].items()},
            "param_groups": [
                {**g, "params": [names[number] for number in g["params"]]} for g in packed["param_groups"]
            ],
        }

    # ---- loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, targets = Path(resume_from_checkpoint), _named_tensors(cast(nn.Module, model or self.model))
        if (folder / MODEL_SHARDS).is_dir():
            _check_names(folder, targets.keys(), set(list_tensors(folder / MODEL_SHARDS)))
            read_shards(folder / MODEL_SHARDS, targets)
            return
        read = set()
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in targets.keys() & file.keys():
                    _copy(file.get_tensor(name), targets[name])
                read |= set(file.keys())
        _check_names(folder, targets.keys(), read)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint)
        is_sharded = self.is_fsdp_enabled  # each process copies the parts that it needs
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=is_sharded)
        parameters = {plain_name(name): p for name, p in cast(nn.Module, self.model).named_parameters()}
        if (folder / OPTIMIZER_SHARDS).is_dir():
            _read_states(folder / OPTIMIZER_SHARDS, saved["state"], parameters)
        else:
            saved["state"] = {
                name: {key: _shard(value, parameters[name]) for key, value in state.items()}
                for name, state in saved["state"].items()
            }
        self._load_named_optimizer_state(saved, folder)
        schedule = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)
        return None

    def _load_named_optimizer_state(self, saved: dict[str, Any], folder: Path) -> None:
        """Load what ``_named_optimizer_state`` made into the optimizer."""
        ours = self._parameter_names()
        numbers = {name: number for number, name in enumerate(name for group in ours for name in group)}
        theirs = {frozenset(group["params"]): group for group in saved["param_groups"]}
        if theirs.keys() != {frozenset(group) for group in ours}:
            raise ValueError(
                f"{folder} was saved with other optimizer groups than this run has. Resume it with the settings it was "
                "trained with."
            )
        groups = [{**theirs[frozenset(group)], "params": [numbers[name] for name in group]} for group in ours]
        state = {numbers[name]: values for name, values in saved["state"].items()}
        self._unwrap_optimizer().load_state_dict({"state": state, "param_groups": groups})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or Manifest.read(checkpoint).world_size == self.args.world_size:
            return super()._load_rng_state(checkpoint)
        # Each process had a state of its own, from which only drop path draws. Draw anew, not as in the first step.
        words = [self.args.seed, self.state.global_step, self.args.process_index]
        set_seed(int(SeedSequence(words).generate_state(1)[0]))
        return None

    # ---- names ----

    def _unwrap_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def _parameter_names(self) -> list[list[str]]:
        """List the names of the parameters in each of the optimizer's groups."""
        names = {id(p): plain_name(name) for name, p in cast(nn.Module, self.model).named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self._unwrap_optimizer().param_groups]


@contextmanager
def _shield(owner: Any, name: str, shield: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let a method of ``owner`` run within ``shield`` for the time of the block."""
    method = getattr(owner, name)

    def shielded(*args: Any, **kwargs: Any) -> Any:
        with shield():
            return method(*args, **kwargs)

    setattr(owner, name, shielded)
    try:
        yield
    finally:
        delattr(owner, name)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def _check_names(folder: Path, ours: Any, theirs: set[str]) -> None:
    if different := sorted(set(ours) ^ theirs):
        where = "is missing there" if different[0] in set(ours) else "is not in this model"
        raise ValueError(
            f"The weights in {folder} are of another model: {different[0]} {where} ({len(different)} names differ)."
        )


def _take_tensors(states: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Take the tensors out of ``states``: "<parameter>.<key>" -> tensor."""
    found = {(name, key): v for name, state in states.items() for key, v in state.items() if isinstance(v, Tensor)}
    for name, key in found:
        del states[name][key]
    return {f"{name}.{key}": value for (name, key), value in found.items()}


def _read_states(folder: Path, states: dict[str, dict[str, Any]], parameters: dict[str, nn.Parameter]) -> None:
    """Read tensors that ``_take_tensors`` took out back into ``states``, sharded as the parameters are."""
    tensors: dict[str, Tensor] = {}
    for name, meta in list_tensors(folder).items():
        parameter = parameters[name.rpartition(".")[0]]
        if isinstance(parameter, DTensor) and meta.size == parameter.shape:
            tensors[name] = torch.zeros_like(parameter, dtype=meta.properties.dtype, requires_grad=False)
        else:
            tensors[name] = torch.zeros(meta.size, dtype=meta.properties.dtype)
    read_shards(folder, tensors)
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        states.setdefault(parameter_name, {})[key] = tensor


def _gather_whole(value: Any, keep: bool) -> Any:
    """Gather a whole tensor on the CPU of the process that writes it; the others only take part."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.cpu() if isinstance(value, Tensor) else value


def _shard(value: Any, parameter: Tensor) -> Any:
    """Cut this process's part out of a whole tensor, if the parameter it belongs to is sharded."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor)):
        return value
    if value.shape != parameter.shape:  # a count of steps
        return value.clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device).clone(), mesh, placements, src_data_rank=None)


@torch.no_grad()
def _copy(whole: Tensor, target: Tensor) -> None:
    local_shard(target).copy_(local_shard(_shard(whole, target)))
