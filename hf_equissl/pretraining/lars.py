"""LARS: gradient descent whose step on each tensor is a share of the tensor's own length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["LARS"]


class LARS(Optimizer):
    r"""Layer-wise adaptive rate scaling with momentum.

    .. math::
        u = \nabla + \lambda w, \quad v \leftarrow \mu v + \eta \frac{\lVert w \rVert}{\lVert u \rVert} u, \quad
        w \leftarrow w - \gamma v

    "Large Batch Training of Convolutional Networks" (https://arxiv.org/abs/1708.03888) as the
    authors of MoCo-v3 have it (``moco/optimizer.py`` in facebookresearch/moco-v3): the weight decay is part of the
    update that is scaled, the learning rate stays out of the momentum. Parameters with one dimension (biases, norms)
    take the plain step, eta ||w|| / ||u|| = 1, and so do those where one of the norms is 0. Norms are those of whole
    tensors, also where they are sharded (DTensor); nothing waits for the device.

    Args:
        params: Parameters or groups of them.
        lr: gamma.
        momentum: mu.
        weight_decay: lambda. The parameter groups decide whether it spares parameters with one dimension.
        trust_coefficient: eta.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        if min(lr, weight_decay) < 0 or not 0 <= momentum < 1 or trust_coefficient <= 0:
            raise ValueError(
                "LARS needs lr and weight_decay of 0 or more, momentum in [0, 1) and a trust_coefficient above 0, got "
                f"{lr}, {weight_decay}, {momentum} and {trust_coefficient}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    update.mul_(_trust(parameter, update, group["trust_coefficient"]))
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(momentum, alpha=-group["lr"])
        return loss


def _trust(parameter: Tensor, update: Tensor, coefficient: float) -> Tensor:
    """Return eta ||w|| / ||u||, 1 where one of them is 0; a scalar on the device."""
    lengths = [torch.linalg.vector_norm(tensor) for tensor in (parameter, update)]
    weight, step = (length.full_tensor() if isinstance(length, DTensor) else length for length in lengths)
    return torch.where((weight > 0) & (step > 0), coefficient * weight / step, torch.ones_like(step))
