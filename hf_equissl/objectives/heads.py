"""Blocks that several objectives share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..distributed.collectives import gather, world_size
from ..modeling import EquiSSLConfig, EquiSSLStem
from .base import Features

if TYPE_CHECKING:
    from ..views.facts import ViewFacts

__all__ = [
    "HyperPredictor",
    "PredictorStart",
    "Projector",
    "SyncBatchNorm1d",
    "cls_after",
    "linear_of_invariant",
    "off_diagonal",
    "warn_unless_g_is_all",
]

PredictorStart = Literal["random", "authors", "identity"]
logger = logging.get_logger(__name__)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the batch of all processes, with gradient, on any device.

    ``torch.nn.SyncBatchNorm`` refuses tensors on the CPU, where distributed training is tested. Here one process (and
    evaluation mode) runs the parent's forward. With several, one exchange carries each process's count, mean and
    sum of squared deviations, which are merged without cancellation; running statistics take the unbiased variance of
    the global batch. Statistics are in fp32, the output has the input's dtype.

    Shapes:
        Input and output (B, C) or (B, C, L); B may differ between processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C) or (B, C, L)."""
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        self._check_input_dim(x)
        shape = (1, -1) if x.ndim == 2 else (1, -1, 1)
        values = x.float()
        mean, variance, count = global_moments(values)
        if self.training:
            self._update_running_statistics(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalized = (values - mean.view(shape)) * scale.view(shape)
        if self.affine:
            normalized = normalized + self.bias.view(shape)
        return normalized.to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        seen, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        if seen is None or running_mean is None or running_var is None:  # built with track_running_stats=False
            return
        seen.add_(1)
        # momentum None means a cumulative average, as in the parent
        factor = 1 / seen if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        running_mean.lerp_(mean.to(running_mean.dtype), factor)
        running_var.lerp_(unbiased.to(running_var.dtype), factor)


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and biased variance per channel over the batch of all processes, with gradient.

    Args:
        x: (B, C) or (B, C, L), fp32.

    Returns:
        Mean (C,), biased variance (C,) and the number of values per channel, a scalar tensor.
    """
    dims = [0] if x.ndim == 2 else [0, 2]
    own_count = x.numel() // x.shape[1]
    own_variance, own_mean = torch.var_mean(x, dim=dims, correction=0)
    own = torch.cat([own_mean, own_variance * own_count, own_mean.new_full((1,), own_count)])
    means, deviations, counts = gather(own[None]).split([x.shape[1], x.shape[1], 1], dim=1)  # (W, C), (W, C), (W, 1)
    count = counts.detach().sum()
    mean = (means * counts).sum(0) / count
    # Deviations inside each process plus those of its mean (Chan et al.): no difference of large squares.
    variance = (deviations + counts * (means - mean).square()).sum(0) / count
    return mean, variance, count


class Projector(nn.Sequential):
    """MLP from representations to projections: [Linear, BatchNorm, ReLU] per hidden size, then Linear without bias.

    The expander of VICReg (https://arxiv.org/abs/2105.04906; ``Projector`` in facebookresearch/vicreg) by default.

    Args:
        in_features: Width of the input.
        sizes: Widths of the layers, the last one being that of the projections; at least one.
        bias: Whether the hidden layers have one; the batch normalisation behind them takes it out again.
        normalize: Whether a batch normalisation without gain and bias ends it.
        running_statistics: Whether batch normalisation keeps averages of its statistics, and uses them in evaluation
            mode. Without them it always normalises by the batch at hand, also in a teacher's head.

    Shapes:
        (M, in_features) -> (M, sizes[-1]).

    Raises:
        ValueError: If ``sizes`` is empty or holds something other than positive integers.
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        bias: bool = True,
        normalize: bool = False,
        running_statistics: bool = True,
    ) -> None:
        if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"A projector needs at least one positive layer width, e.g. (1024, 1024), got {sizes!r}.")
        *hidden, out_features = sizes
        norm = partial(SyncBatchNorm1d, track_running_stats=running_statistics)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(in_features, size, bias=bias), norm(size), nn.ReLU(inplace=True)]
            in_features = size
        layers.append(nn.Linear(in_features, out_features, bias=False))
        super().__init__(*layers, *([norm(out_features, affine=False)] if normalize else []))
        self.out_features = out_features


class HyperPredictor(nn.Module):
    """A linear map without bias whose d x d matrix is linear in a code c of the inputs: y = sum_k c_k W_k x.

    The code is the input itself, or that behind two bias-free layers with ReLU as wide as it. The sum is taken before
    the product, (W_1 ... W_q) (c kron x), so that no image has a matrix of its own in memory.

    Args:
        num_inputs: q.
        size: d.
        deep: Whether there are hidden layers.
        start: "random" is that of a linear layer of this shape, entries up to 1 / sqrt(q d); "authors" that of
            ``nn.Linear(q, d * d)``, up to 1 / sqrt(q), which SIE's and STL's authors have: predictions are sqrt(d)
            times as large; "identity" is "random" with the identity as the matrix of the last input, the constant 1:
            the first predictions are x itself, up to what the other inputs add.
    """

    def __init__(self, num_inputs: int, size: int, deep: bool = False, start: PredictorStart = "random") -> None:
        super().__init__()
        hidden = [nn.Linear(num_inputs, num_inputs, bias=False), nn.ReLU()] if deep else []
        again = [nn.Linear(num_inputs, num_inputs, bias=False), nn.ReLU()] if deep else []
        self.code = nn.Sequential(*hidden, *again)
        self.maps = nn.Linear(num_inputs * size, size, bias=False)
        if start == "authors":
            nn.init.uniform_(self.maps.weight, -(num_inputs**-0.5), num_inputs**-0.5)
        elif start == "identity":
            with torch.no_grad():
                nn.init.eye_(self.maps.weight[:, -size:])

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Map embeddings (B, d) by the matrices that belong to inputs (B, q): (B, d)."""
        code = self.code(inputs)
        return self.maps((code[:, :, None] * x[:, None, :]).flatten(1))


def cls_after(layer: int | None, config: EquiSSLConfig, name: str) -> tuple[int | None, nn.Module]:
    """Choose the block that an objective reads CLS after, and the norm that it reads it through.

    Args:
        layer: The block; ``None``, or the last one: behind the encoder's final norm.
        config: The encoder's configuration.
        name: The objective's, for the error.

    Returns:
        The block, ``None`` where it is the last one, and a LayerNorm of the objective's own, which changes nothing
        behind the final norm.

    Raises:
        ValueError: CLS is not there yet.
    """
    if layer is None or layer == config.num_hidden_layers:
        return None, nn.Identity()
    if 0 < layer <= config.cls_insertion_layer:
        raise ValueError(
            f"{name} reads CLS after block {layer}, and this encoder inserts it after block "
            f"{config.cls_insertion_layer}. Read a later block, or lower model.cls_insertion_layer."
        )
    return layer, nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


def warn_unless_g_is_all(name: str, facts: ViewFacts) -> None:
    """Warn where two views differ in more than the parameters of g say, which objective ``name`` is told."""
    if not facts.same_base:
        logger.warning_once(
            f"{name} is told g's parameters alone, and this view pipeline crops or colours each view in its own way, "
            "too: what it predicts is then only known in part. As published: views.pipeline: {name: center}."
        )


def off_diagonal(matrix: Tensor) -> Tensor:
    """View the entries of a square ``matrix`` (d, d), contiguous, beside its diagonal: (d - 1, d), without a copy."""
    width = len(matrix)
    # In a flat (d, d) matrix the diagonal is every (d + 1)-th entry.
    return matrix.flatten()[:-1].view(width - 1, width + 1)[:, 1:]


def linear_of_invariant(linear: nn.Linear, features: Features, tokens: Tensor) -> Tensor:
    """Compute ``linear(features.invariant(tokens))`` in the cheaper of two ways.

    Stem and head meet as two linear layers with nothing between them, so their weights can be multiplied first. With
    many rows and a wide stem (iBOT: 6144 invariant of 8192 dimensions behind 384) that saves most of the head's cost.
    The gradient of both layers flows through the product.

    Args:
        linear: (d_inv -> h), the head's first layer.
        features: Where the tokens come from, with their stem.
        tokens: (M, D).

    Returns:
        (M, h).
    """
    stem = features.stem
    # Processes have to decide alike, and have masks of their own: ZeRO-2 sums gradients of different processes in the
    # order in which backward passes make them, whatever their names.
    count = len(tokens) if world_size() == 1 else features.tokens[..., 0].numel()
    if not isinstance(stem, EquiSSLStem) or not stem.is_fold_cheaper(count, linear.out_features, "invariant"):
        return linear(features.invariant(tokens))
    weight, bias = stem.fold(linear.weight, "invariant")  # (h, D), (h,)
    return F.linear(tokens, weight, bias + linear.bias)
