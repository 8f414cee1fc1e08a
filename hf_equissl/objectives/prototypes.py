"""Prototypes: the head of DINO, iBOT and DINOv2, and the cross-entropy between its two copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .base import Features
from .heads import linear_of_invariant

__all__ = ["PatchHead", "PrototypeHead", "Prototypes", "multiply", "prototype_cross_entropy"]

# 64 MB in fp32: 256 rows of 65536 prototypes, which is enough for matrix products at full speed.
LOGITS_AT_ONCE = 2**24
PatchHead = Literal["shared", "own_prototypes", "own_head"]


class Prototypes(nn.Module):
    """The weight of a linear layer without bias, as gain times unit direction (weight normalisation).

    Directions start like those of ``nn.Linear``, gains at 1. A frozen gain is a buffer: nothing can train it.

    Args:
        in_features: d, width of the rows that meet the prototypes.
        num_prototypes: K.
        freeze_gain: Keep all gains at 1, so that logits of unit rows are cosines.
    """

    direction: nn.Parameter
    gain: Tensor

    def __init__(self, in_features: int, num_prototypes: int, freeze_gain: bool = False) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(num_prototypes, in_features))
        nn.init.kaiming_uniform_(self.direction, a=math.sqrt(5))
        gain = torch.ones(num_prototypes, 1)
        if freeze_gain:
            self.register_buffer("gain", gain)
        else:
            self.gain = nn.Parameter(gain)

    def forward(self) -> Tensor:
        """Return the weight (K, d), fp32; logits of rows (M, d) are ``rows @ weight.T``."""
        with torch.autocast(self.direction.device.type, enabled=False):
            # One kernel each way, those of torch.nn.utils.parametrizations.weight_norm, whose parameters have other
            # names: both take less than a fifth of the time of F.normalize times the gain at K = 65536.
            return torch._weight_norm(self.direction.float(), self.gain.float(), 0)


class PrototypeHead(nn.Module):
    """MLP, L2-normalised bottleneck, prototypes.

    ``DINOHead`` of facebookresearch/dino, bytedance/ibot and facebookresearch/dinov2: linear layers with GELU between,
    weights truncated normal with standard deviation 0.02, biases 0, no batch normalisation.

    Args:
        in_features: Width of the invariant part of a token.
        num_prototypes: K.
        hidden_size: Width of the MLP.
        bottleneck_size: d.
        num_layers: Linear layers before the bottleneck, at least one.
        freeze_gain: Keep the gain of every prototype at 1.
        patches: What patches have of their own: nothing ("shared"), prototypes behind the common MLP
            ("own_prototypes", iBOT's separate heads) or all of it ("own_head", DINOv2's).

    Raises:
        ValueError: For sizes below 1.
    """

    def __init__(
        self,
        in_features: int,
        num_prototypes: int,
        hidden_size: int = 2048,
        bottleneck_size: int = 256,
        num_layers: int = 3,
        freeze_gain: bool = False,
        patches: PatchHead = "shared",
    ) -> None:
        super().__init__()
        sizes = {"num_prototypes": num_prototypes, "head_hidden_size": hidden_size}
        for name, size in {**sizes, "bottleneck_size": bottleneck_size, "head_layers": num_layers}.items():
            if size < 1:
                raise ValueError(f"`{name}` is {size}, expected at least 1.")
        widths = [in_features, *[hidden_size] * (num_layers - 1), bottleneck_size]
        self.mlp = _mlp(widths)
        self.prototypes = Prototypes(bottleneck_size, num_prototypes, freeze_gain)
        self.patch_mlp = _mlp(widths) if patches == "own_head" else None
        self.patch_prototypes = (
            None if patches == "shared" else Prototypes(bottleneck_size, num_prototypes, freeze_gain)
        )

    def forward(self, features: Features, cls: Tensor, patches: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute unit bottleneck rows, in one pass where the MLP is common.

        Args:
            features: Where the tokens come from; its stem is applied to them.
            cls: (R, D), CLS tokens.
            patches: (M, D), patch tokens, or ``None``.

        Returns:
            (R, d) and (M, d), fp32.
        """
        if patches is None:
            return _bottleneck(self.mlp, features, cls), None
        if self.patch_mlp is not None:
            return _bottleneck(self.mlp, features, cls), _bottleneck(self.patch_mlp, features, patches)
        rows = _bottleneck(self.mlp, features, torch.cat([cls, patches]))
        return rows[: len(cls)], rows[len(cls) :]

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the prototypes for CLS and for patches, (K, d) each; one tensor where they are shared."""
        weight = self.prototypes()
        return weight, weight if self.patch_prototypes is None else self.patch_prototypes()


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        linear = nn.Linear(inputs, outputs)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear] if index == 0 else [nn.GELU(), linear]
    return nn.Sequential(*layers)


def _bottleneck(mlp: nn.Sequential, features: Features, tokens: Tensor) -> Tensor:
    first, *others = mlp
    x = linear_of_invariant(cast(nn.Linear, first), features, tokens)
    for layer in others:
        x = layer(x)
    # In fp16 an epsilon of 1e-12 would be 0.
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def multiply(left: Tensor, right: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """Multiply matrices in ``precision`` (``None``: in their own) and return the product in that of ``left``."""
    return left @ right if precision is None else (left.to(precision) @ right.to(precision)).to(left.dtype)


def prototype_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    targets: Callable[[slice], Tensor],
    row_weights: Tensor,
    temperature: float,
    precision: torch.dtype | None = None,
) -> Tensor:
    r"""Sum, weighted over rows, the cross-entropy between targets and softmax over prototypes.

    .. math::
        \sum_i w_i \, H(t_i, \mathrm{softmax}(W x_i / \tau)), \quad H(t, p) = -\sum_k t_k \log p_k

    Thousands of masked patches times 65536 prototypes are gigabytes, several times over. So logits, targets and
    gradients are made for a few rows at a time and none is kept: the gradient is known in the forward pass.

    Args:
        rows: x, (M, d), fp32.
        weight: W, (K, d), fp32.
        targets: Slice of the rows -> t (m, K), without gradient; a target may sum to something other than 1.
        row_weights: w, (M,), without gradient.
        temperature: tau.
        precision: Of the products with W, forward and backward; ``None`` is that of the rows. Softmax, loss and sums
            over rows stay in the rows' own.

    Returns:
        Scalar. It can be differentiated once.
    """
    return _PrototypeCrossEntropy.apply(rows, weight, targets, row_weights, temperature, precision)


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Forward: the loss and its gradients. Backward: those gradients, scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Callable[[slice], Tensor],
        row_weights: Tensor,
        temperature: float,
        precision: torch.dtype | None,
    ) -> Tensor:
        loss = rows.new_zeros(())
        for_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        step = max(1, LOGITS_AT_ONCE // len(weight))
        prototypes = weight if precision is None else weight.to(precision)  # cast once, for all products
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            x, target, factor = rows[part], targets(part), row_weights[part, None]
            logits = multiply(x, prototypes.T, precision).div_(temperature)  # (m, K)
            total, normalizer = target.sum(dim=1, keepdim=True), logits.logsumexp(dim=1, keepdim=True)
            loss += (factor * (total * normalizer - (target * logits).sum(dim=1, keepdim=True))).sum()
            # dH / dlogits = sum(t) softmax(logits) - t
            gradient = logits.sub_(normalizer).exp_().mul_(total).sub_(target).mul_(factor / temperature)
            if precision is not None:  # the largest tensor here: cast once, for both products
                gradient = gradient.to(precision)
            if for_rows is not None:
                for_rows[part] = gradient @ prototypes
            if for_weight is not None and precision is None:
                for_weight.addmm_(gradient.T, x)
            elif for_weight is not None:
                for_weight += gradient.T @ x.to(precision)
        ctx.save_for_backward(for_rows, for_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else incoming * gradient for gradient in ctx.saved_tensors]
        return (*scaled, None, None, None, None)
