"""DeepSpeed ZeRO: bf16 that leaves the teacher in fp32, checkpoints that are read safely, and clipping by parts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from ..distributed.engines import load_models_whole
from .optimizer import clipping_coefficients, clipping_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .arguments import EquiSSLTrainingArguments
    from .model import EquiSSLForPreTraining

# Elements of a bucket of gradients. DeepSpeed's 500 million are more than most models have: nothing would be sent
# before the backward pass is over.
REDUCE_BUCKET = 50_000_000
_RESTRICT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # variable with which torch.load refuses code in pickles


def adapt_config(accelerator: Accelerator, args: EquiSSLTrainingArguments) -> None:
    """Finish DeepSpeed's configuration, before the engine is built from it.

    DeepSpeed's ``bf16`` casts the whole model, teacher and centers among it, whose small updates are then rounded
    away; and the Trainer casts the draws that views are made from. So bf16 is left to ``torch_autocast``, as under DDP:
    weights, gradients and their reduction, teacher, centers and losses stay in fp32. The price: twice the bytes on the
    way. A ``torch_autocast`` section of the user's own is left as it is.

    The optimizer is the Trainer's, also where its state is offloaded: accelerate would put one of DeepSpeed's in its
    place, which has to be compiled and forgets settings. Where ``grad_clipping`` is not global, DeepSpeed does not clip
    (``clip_by_parts`` does).

    Gradients are sent in buckets while the backward pass goes on, and DeepSpeed's timer, for which hosts wait twice per
    step, is off, unless the configuration says otherwise. Checkpoints of ZeRO-3 hold gathered weights: the export needs
    them.

    Args:
        accelerator: Set up for DeepSpeed.
        args: The run's, of which ``bf16`` and ``grad_clipping`` are read.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("timers", {"throughput": {"enabled": False}})
    zero: dict[str, Any] = config["zero_optimization"]
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)
    zero.setdefault("overlap_comm", True)
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    if args.bf16:
        config.pop("bf16", None)
        # Modules in that list would have their gradients reduced in bf16.
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config.setdefault("torch_autocast", autocast)
        plugin.hf_ds_config.trainer_config_process(args)  # takes the dtype of inputs from what is left
    if args.grad_clipping != "global":
        config["gradient_clipping"] = 0.0
    load_models_whole()  # the Trainer has told transformers of this configuration again


@contextmanager
def restricted_loading() -> Iterator[None]:
    """Let DeepSpeed, which loads pickles without restriction, load only what it writes itself.

    Raises:
        UnpicklingError: from ``torch.load``, for a file that names anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_RESTRICT)
    os.environ[_RESTRICT] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(_RESTRICT)
        if before is not None:
            os.environ[_RESTRICT] = before


def clip_by_parts(accelerator: Accelerator, model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> None:
    """Let ``accelerator.backward``, which also steps under DeepSpeed, clip by ``grad_clipping`` between the two.

    Args:
        accelerator: Has wrapped the model.
        model: The one that is wrapped.
        args: ``grad_clipping`` and ``max_grad_norm``.
    """
    engine = cast(Any, accelerator).deepspeed_engine_wrapped.engine
    accelerator.deepspeed_engine_wrapped = _ClippingEngine(engine, model, args.max_grad_norm, args.grad_clipping)


@torch.no_grad()
def clip_partitions(parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float) -> Tensor:
    """Clip as ``optimizer.clip_gradients`` does, gradients that DeepSpeed has shared out, in one exchange.

    Call it on every process between the backward pass and the optimizer's step.

    Args:
        parameters: Each parameter with the part that it is clipped in, as ``clipping_parts`` gives them.
        max_norm: Largest norm of each part.

    Returns:
        Norm of all gradients together before clipping, scalar fp32.
    """
    trained = [(part, parameter) for part, parameter in parameters if parameter.requires_grad]
    numbers = {part: number for number, part in enumerate(dict.fromkeys(part for part, _ in trained))}
    owned = [(numbers[part], parameter, _own_gradient(parameter)) for part, parameter in trained]
    squares = torch.zeros(len(numbers), device=trained[0][1].device)
    for number, _, gradient in owned:
        if gradient is not None:
            squares[number] += gradient.float().norm().square().to(squares.device)
    dist.all_reduce(squares)
    coefficients = clipping_coefficients(squares, max_norm)
    for number, parameter, gradient in owned:
        if gradient is not None:
            gradient.mul_(coefficients[number].to(gradient.device))
            if hasattr(parameter, "ds_id"):
                from deepspeed.utils import safe_set_local_grad

                safe_set_local_grad(parameter, gradient)  # where it is offloaded, this is a copy
    return squares.sum().sqrt()


def _own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return this process's share of a reduced gradient, or ``None`` if it has none."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return cast(Tensor, safe_get_local_grad(parameter))
    shared: Any = parameter
    if shared._hp_mapping is None:
        return None
    return cast(Tensor, shared._hp_mapping.get_lp_grad_fragment(shared._index_in_param_group))


class _ClippingEngine(DeepSpeedEngineWrapper):
    """accelerate's handle of a DeepSpeed engine, which clips between backward pass and step."""

    def __init__(self, engine: Any, model: EquiSSLForPreTraining, max_norm: float, rule: str) -> None:
        super().__init__(engine)
        self._model, self._max_norm, self._rule = model, max_norm, rule
        self._norm = torch.zeros(())

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Run as the parent does; with the last micro-batch also clip and step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._norm = clip_partitions(clipping_parts(self._model, self._rule), self._max_norm)
            self.engine.step()

    def get_global_grad_norm(self) -> Any:
        """Return the norm of all gradients before clipping, a tensor: the host need not wait for it."""
        return self._norm
