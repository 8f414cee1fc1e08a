"""The engines that spread a run over processes: which one a launch asks for, which one it gets, what each refuses."""

from __future__ import annotations

import json
import os
import re
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch import nn
    from transformers import TrainingArguments

CONFIGS = "training/accelerate_configs"
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_YES = ("1", "true", "yes", "on", "y", "t")


class Engine(StrEnum):
    """How model, gradients and optimizer lie on the processes.

    ``DDP`` keeps all of it on each process; ``ZERO1`` shares out the optimizer, ``ZERO2`` the gradients too, ``ZERO3``
    and ``FSDP2`` the weights as well.
    """

    SINGLE = "single"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"

    @property
    def is_deepspeed(self) -> bool:
        """Whether this engine is one of DeepSpeed's."""
        return self in (Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)


def find_asked_engine(args: TrainingArguments | None = None) -> Engine:
    """Find the engine that a launch asks for: by ``fsdp`` or ``deepspeed`` of ``args``, else by the environment.

    Raises:
        ValueError: It is not supported: FSDP1, or a DeepSpeed stage other than 1, 2, 3.
    """
    if getattr(args, "deepspeed", None) or _flag("ACCELERATE_USE_DEEPSPEED"):
        stage = _deepspeed_stage(args)
        if stage not in (1, 2, 3):
            raise ValueError(
                f"DeepSpeed is asked for with ZeRO stage {stage}; stages 1, 2 and 3 are supported. "
                f"See {CONFIGS}/deepspeed_zero1.yaml, or use ddp.yaml, which is what stage 0 comes to."
            )
        return Engine(f"zero{stage}")
    if getattr(args, "fsdp", None) or _flag("ACCELERATE_USE_FSDP"):
        version = _fsdp_version(args)
        if version != "2":
            raise ValueError(
                f"FSDP version {version} is asked for, and only version 2 is supported: version 1 flattens weights, "
                "which the teacher's update and clipping per tensor cannot follow, and PyTorch has replaced it. "
                f"Set fsdp_version: 2 (see {CONFIGS}/fsdp2.yaml)."
            )
        return Engine.FSDP2
    return Engine.DDP if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Engine.SINGLE


def check_engine(args: TrainingArguments) -> None:
    """Refuse, before anything is built, a launch that cannot do what the arguments ask for.

    Args:
        args: Arguments whose ``bf16`` and ``fp16`` decide the precision, whatever the launcher's configuration says.

    Raises:
        ValueError: The engine is not supported or not installed, or precision or compilation contradict it.
    """
    engine = find_asked_engine(args)
    if engine.is_deepspeed:
        _check_deepspeed(args, engine)
    if engine is Engine.FSDP2:
        _check_fsdp(args)
    half = "fp16" if args.fp16 else "no"
    own = "bf16" if args.bf16 else half
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", own):
        raise ValueError(
            f"The launcher asks for mixed_precision {launched!r}, and the arguments for {own!r}. The arguments decide: "
            f"set mixed_precision: 'no' in the accelerate configuration, or --training.{launched} true."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" and not args.torch_compile:
        raise ValueError(
            "The launcher asks for torch.compile (dynamo_backend). Leave it out there, and set "
            "--training.torch_compile true: then layers are compiled, and checkpoints keep their names."
        )


def find_granted_engine(accelerator: Accelerator) -> Engine:
    """Find what accelerate will wrap a model with, known once it is set up."""
    state = accelerator.state
    kind = str(state.distributed_type.value)
    if kind == "DEEPSPEED":
        return Engine(f"zero{state.deepspeed_plugin.zero_stage}")
    if kind == "FSDP":
        return Engine.FSDP2
    return Engine.DDP if kind.startswith("MULTI_") else Engine.SINGLE


def find_running_engine(accelerator: Accelerator, model_wrapped: nn.Module) -> Engine:
    """Find what really wraps a model, by the module itself and not by settings."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    wrapped = getattr(model_wrapped, "_orig_mod", model_wrapped)
    if isinstance(wrapped, FSDPModule):
        return Engine.FSDP2
    if isinstance(wrapped, DistributedDataParallel):
        return Engine.DDP
    if find_granted_engine(accelerator).is_deepspeed and hasattr(wrapped, "zero_optimization_stage"):
        return Engine(f"zero{wrapped.zero_optimization_stage()}")  # type: ignore[operator]
    return Engine.SINGLE


def plain_name(name: str) -> str:
    """Return a parameter's name as the model itself has it, without what wrappers add."""
    return _WRAPPERS.sub("", name).removeprefix("module.")


def fp32_sharding(plugin: FullyShardedDataParallelPlugin | None = None) -> FullyShardedDataParallelPlugin:
    """Set up FSDP2 with weights gathered, gradients reduced and inputs left in fp32: autocast chooses per operation.

    Left to itself, accelerate would cast weights, reductions, inputs (targets of the reconstruction among them) and
    losses to bf16, unlike DDP under autocast. The price: twice the bytes when weights are gathered, and the bf16 copies
    of the student's weights that autocast makes stay until the backward pass, as under DDP: 2 bytes per weight.

    Args:
        plugin: Settings from the arguments; by default those that the launcher left in the environment.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = plugin or FullyShardedDataParallelPlugin()
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    return plugin


def load_models_whole() -> None:
    """Let ``from_pretrained`` give whole models under ZeRO-3, too, on a single process as well.

    While transformers knows of ZeRO-3, it shares out every model that it loads over all processes: encoders to start
    from would be empty, and a process that loads one alone would wait for ever. What is trained is shared out later.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_same(asked: Engine, given: Engine, device: str) -> None:
    """Refuse to train with another engine than the one that was asked for.

    Args:
        asked: What ``find_asked_engine`` found.
        given: What ``find_granted_engine`` or ``find_running_engine`` found.
        device: Type of the training device.

    Raises:
        ValueError: They differ. With a single process, DDP and no engine are the same.
    """
    if asked is given or ({asked, given} == {Engine.SINGLE, Engine.DDP} and _world_size() == 1):
        return
    if asked is Engine.FSDP2 and device == "cpu":
        raise ValueError(
            f"FSDP2 is asked for on CPUs, where accelerate gives {given.value} instead. Use {CONFIGS}/ddp.yaml on "
            "CPUs, or start on GPUs."
        )
    raise ValueError(
        f"The launch asks for {asked.value}, and what wraps the model is {given.value}. Start with `accelerate launch "
        f"--config_file {CONFIGS}/...`, which sets the environment that accelerate reads."
    )


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in _YES


def _fsdp_version(args: TrainingArguments | None) -> str:
    if not getattr(args, "fsdp", None):
        return os.environ.get("FSDP_VERSION", "1")  # accelerate's default
    config = _read_json(getattr(args, "fsdp_config", None) or {})
    return str(config.get("version", config.get("fsdp_version", 2)))  # transformers' default


def _deepspeed_config(args: TrainingArguments | None) -> dict[str, Any] | None:
    """Read DeepSpeed's own configuration, if there is one; otherwise accelerate makes it from the environment."""
    config = getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return None if config in (None, "", "none", "None") else _read_json(config)


def _deepspeed_stage(args: TrainingArguments | None) -> int:
    config = _deepspeed_config(args)
    if config is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))  # accelerate's default
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _read_json(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    path = Path(str(config))
    if not path.is_file():
        raise ValueError(f"The engine's configuration {path} does not exist.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _check_fsdp(args: TrainingArguments) -> None:
    config = _read_json(args.fsdp_config or {}) if args.fsdp else {}

    def asks_for(name: str) -> bool:
        value = config.get(name, config.get(f"fsdp_{name}", os.environ.get(f"FSDP_{name.upper()}", "false")))
        return str(value).lower() in _YES

    # accelerate adds gloo to NCCL, for what lies on the host, only where the launcher's environment says so.
    if asks_for("cpu_offload") and not _flag("FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "fsdp_config asks for cpu_offload, which has to come from the launcher: set fsdp_offload_params: true in "
            f"{CONFIGS}/fsdp2.yaml and start with `accelerate launch --config_file`."
        )
    if args.fp16:
        raise ValueError("fp16 is not supported under FSDP2. Use bf16: --training.fp16 false --training.bf16 true.")
    if asks_for("cpu_ram_efficient_loading"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: every process builds the model before it is sharded, and "
            "accelerate cannot send centers and statistics, which are buffers."
        )
    if asks_for("activation_checkpointing"):
        raise ValueError(
            "fsdp_activation_checkpointing must be false: it draws dropped paths anew when it computes again. Use "
            "--training.activation_checkpointing true."
        )


def _check_deepspeed(args: TrainingArguments, engine: Engine) -> None:
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"{engine.value} needs DeepSpeed, which is not installed: pip install 'hf_equissl[deepspeed]', or use "
            f"{CONFIGS}/fsdp2.yaml."
        )
    if args.fp16:
        raise ValueError("fp16 is not supported under DeepSpeed. Use bf16: --training.fp16 false --training.bf16 true.")
    for block in (_deepspeed_config(args) or {}).keys() & {"optimizer", "scheduler"}:
        raise ValueError(
            f"DeepSpeed's configuration has a block {block!r}, which would take the place of ours: without weight "
            "decay by parameter, layer-wise learning rates and held prototypes. Take it out; the recipe says it all."
        )
    if args.torch_compile:
        raise ValueError("torch_compile is not supported under DeepSpeed. Set it to false, or use DDP or FSDP2.")
