"""``torch.compile`` where it pays: the transformer layers, in their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modeling.layers_equissl import EquiSSLLayer

if TYPE_CHECKING:
    from transformers import TrainingArguments


def compile_layers(model: nn.Module, args: TrainingArguments) -> int:
    """Compile the forward of every transformer layer in ``model``, student's and teacher's; returns how many.

    Call it after the model is wrapped. Modules keep their places and names, so schedules, checkpoints and exports do
    not see it, and the hooks that gather weights (FSDP2) or reduce gradients stay outside the compiled code. Layers
    share what is compiled; what they differ in (rate of dropped paths, size of crops, training or not) costs one more
    compilation each, in the first steps.

    Args:
        model: Wrapped or not.
        args: ``torch_compile_backend`` and ``torch_compile_mode``.
    """
    layers = [module for module in model.modules() if isinstance(module, EquiSSLLayer)]
    # Beyond its limit, 8 by default, dynamo would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(layers))
    backend = args.torch_compile_backend or "inductor"
    for layer in layers:
        compiled = torch.compile(type(layer).forward.__get__(layer), backend=backend, mode=args.torch_compile_mode)
        layer.forward = compiled  # type: ignore[method-assign]
    return len(layers)
