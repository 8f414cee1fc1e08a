"""Embeddings and blocks of the EquiSSL encoder: DINOv2's, with the parameter names of transformers' `Dinov2Model`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_equissl import EquiSSLConfig

__all__ = [
    "EquiSSLAttention",
    "EquiSSLDropPath",
    "EquiSSLEmbeddings",
    "EquiSSLLayer",
    "EquiSSLLayerScale",
    "EquiSSLMLP",
    "EquiSSLStem",
]


# Attention as transformers calls it: (module, query, key, value, mask, **kwargs) -> (B, T, H, d), weights or None.
Kernel = Callable[..., tuple[Tensor, Tensor | None]]


class EquiSSLPatchEmbeddings(nn.Module):
    """Image -> one embedding per patch."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.patch_size, self.num_channels = config.patch_side, config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_side, stride=config.patch_side
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images: (B, C, H, W) -> (B, N, D)."""
        self._check(pixel_values)
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)

    def _check(self, pixel_values: Tensor) -> None:
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4:
            came = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values: expected a tensor (B, C, H, W), got {came}. Add the batch dimension.")
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channels, expected num_channels={self.num_channels} in (B, C, H, W); "
                f"got {tuple(pixel_values.shape)}."
            )
        if not all(_is_known(side) for side in (height, width)):
            return  # an exported program takes other sizes, which nobody can check here
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values is {height} x {width} pixels, expected multiples of patch_size={self.patch_size}. "
                "Resize or crop the images."
            )


class EquiSSLEmbeddings(nn.Module):
    """Patch embeddings with positions, CLS, registers, and mask token."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        rows, columns = config.grid_size
        self.grid_size = (rows, columns)
        self.is_cls_late = config.cls_insertion_layer > 0
        # The released DINOv2 models resize positions with antialiasing if and only if they have registers.
        self.antialias = config.num_register_tokens > 0
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size)) if config.use_mask_token else None
        has_registers = config.num_register_tokens > 0
        registers = torch.zeros(1, config.num_register_tokens, config.hidden_size)
        self.register_tokens = nn.Parameter(registers) if has_registers else None
        self.patch_embeddings = EquiSSLPatchEmbeddings(config)
        num_positions = rows * columns + (0 if self.is_cls_late else 1)
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))

    def interpolate_patch_positions(self, grid: tuple[int, int]) -> Tensor:
        """Return position embeddings (1, N, D) for a grid of patches, bicubic in fp32 unless it is the stored one."""
        positions = self.position_embeddings if self.is_cls_late else self.position_embeddings[:, 1:]
        if all(_is_known(side) for side in grid) and grid == self.grid_size:
            return positions
        positions = positions.unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        # Half precision would shift the embeddings.
        resized = nn.functional.interpolate(
            positions.float(), size=grid, mode="bicubic", align_corners=False, antialias=self.antialias
        )
        return resized.to(positions.dtype).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def resize_positions(self, grid: tuple[int, int]) -> None:
        """Store the positions of another grid of patches, interpolated once."""
        kept = self.position_embeddings[:, : 0 if self.is_cls_late else 1]
        resized = torch.cat((kept, self.interpolate_patch_positions(grid)), dim=1)
        self.position_embeddings = nn.Parameter(resized, requires_grad=self.position_embeddings.requires_grad)
        self.grid_size = grid

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embed (B, C, H, W) -> (B, 1 + R + N, D) and `None`; for a late CLS (B, N, D) and the prefix (B, 1 + R, D).

        Masked patches take the mask token before positions are added.
        """
        patches = self.patch_embeddings(pixel_values)
        cls_token: Tensor = self.cls_token
        if bool_masked_pos is not None:
            patches = self._mask(patches, bool_masked_pos)
        elif self.mask_token is not None and self.training:
            # A trainable parameter without gradient breaks resuming under FSDP2 and needs DDP's slow search for unused
            # ones. On the one CLS row the zero term is free; a `where` over all patches would not be.
            cls_token = cls_token + 0.0 * self.mask_token
        rows, columns = (side // self.patch_embeddings.patch_size for side in pixel_values.shape[2:])
        patches = patches + self.interpolate_patch_positions((rows, columns))
        if not self.is_cls_late:
            cls_token = cls_token + self.position_embeddings[:, :1]
        prefix = cls_token if self.register_tokens is None else torch.cat((cls_token, self.register_tokens), dim=1)
        prefix = prefix.expand(patches.shape[0], -1, -1)
        if self.is_cls_late:
            # Copied: it is used after this module has returned, when FSDP may have freed the parameters.
            return patches, prefix.to(patches.dtype).clone()
        return torch.cat((prefix, patches), dim=1), None

    def _mask(self, patches: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos was given, but this encoder has no mask token: set use_mask_token=True.")
        if bool_masked_pos.dtype != torch.bool or bool_masked_pos.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos: expected a torch.bool tensor (B, N) = {tuple(patches.shape[:2])}, one entry per "
                f"patch in row-major order, got {bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}."
            )
        return torch.where(bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches)


def _is_known(size: int | torch.SymInt | Tensor) -> bool:
    """Return whether a size is a number; while a model is traced or exported it may stand for any."""
    return isinstance(size, int) and not torch.jit.is_tracing()


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention with its weights: (B, H, T, d) each -> (B, T, H, d) and (B, H, T, T)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EquiSSLAttention(nn.Module):
    """Multi-head self-attention; the kernel is chosen by the model's `attn_implementation`."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, num_queries: int | None = None, kernel: Kernel | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) -> (B, Q, D) and the attention weights (B, H, Q, T) where the kernel has them.

        The first `num_queries` = Q tokens ask, all by default; all T answer. `kernel` takes the place of the model's.
        """
        asking = hidden_states[:, :num_queries]
        query, key, value = (
            layer(tokens).view(*tokens.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for layer, tokens in ((self.q_proj, asking), (self.k_proj, hidden_states), (self.v_proj, hidden_states))
        )
        attention = kernel or self.find_kernel()
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*asking.shape[:-1], -1)), weights

    def find_kernel(self) -> Kernel:
        """Find the kernel that the model's `attn_implementation` names."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)


class EquiSSLLayerScale(nn.Module):
    """A learned factor per channel on a residual branch (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.initial_value = 1.0 if config.layerscale_value is None else float(config.layerscale_value)
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), self.initial_value))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., D) -> (..., D)."""
        return hidden_states * self.lambda1


class EquiSSLMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.activation_fn = ACT2FN[hidden_act]
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., D) -> (..., D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class EquiSSLDropPath(nn.Module):
    """A residual branch with stochastic depth per sample (https://arxiv.org/abs/1603.09382).

    Each sample loses its branch with probability `rate`. Or, as DINOv2 does it, the branch runs on a random subset of
    exactly floor(B * (1 - rate)) samples (at least one), and what is dropped is not computed. Either way the rest is
    scaled, so that the branch's expectation is that of evaluation.
    """

    def __init__(self, rate: float, exact: bool = False) -> None:
        super().__init__()
        self.rate, self.exact = rate, exact

    def forward(
        self, hidden_states: Tensor, branch: Callable[[Tensor], Tensor], num_tokens: int | None = None
    ) -> Tensor:
        """Add the branch: (B, T, D) -> hidden_states + branch(hidden_states), with samples dropped in training.

        A branch that gives the first `num_tokens` only is added to those: (B, num_tokens, D).
        """
        residual = hidden_states[:, :num_tokens]
        if not self.training or self.rate == 0:
            return branch(hidden_states) + residual
        batch_size, device = hidden_states.shape[0], hidden_states.device
        if self.exact:
            count = max(1, int(batch_size * (1 - self.rate)))
            index = torch.randperm(batch_size, device=device)[:count]
            kept = branch(hidden_states.index_select(0, index)).to(residual.dtype)
            return residual.index_add(0, index, kept, alpha=batch_size / count)
        # Drawn in fp32: bf16 has eight bits, too few for a probability.
        keep = torch.rand(batch_size, device=device) >= self.rate
        output = branch(hidden_states)
        factor = keep.to(output.dtype) / (1 - self.rate)
        return output * factor.view(-1, *(1,) * (output.ndim - 1)) + residual

    def extra_repr(self) -> str:
        """Return the rate, which `repr` shows."""
        return f"rate={self.rate:.3g}, exact={self.exact}"


class EquiSSLLayer(GradientCheckpointingLayer):
    """One pre-norm block: x + scale(attention(norm(x))), then x + scale(mlp(norm(x)))."""

    def __init__(self, config: EquiSSLConfig, index: int) -> None:
        super().__init__()
        uniform = config.drop_path_mode == "uniform"
        ramp = 1.0 if uniform else index / max(1, config.num_hidden_layers - 1)
        has_scale = config.layerscale_value is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EquiSSLAttention(config)
        self.layer_scale1 = EquiSSLLayerScale(config) if has_scale else nn.Identity()
        self.drop_path = EquiSSLDropPath(config.drop_path_rate * ramp, exact=uniform)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EquiSSLMLP(config.hidden_size, config.mlp_ratio, config.hidden_act)
        self.layer_scale2 = EquiSSLLayerScale(config) if has_scale else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        num_queries: int | None = None,
        paths: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map (B, T, D) -> (B, T, D), or (B, Q, D) for the first `num_queries` = Q tokens alone.

        `paths` add the two branches in place of `drop_path`; further arguments go to the attention.
        """

        def attend(x: Tensor) -> Tensor:
            return self.layer_scale1(self.attention(self.norm1(x), num_queries, **kwargs)[0])

        add_attention, add_mlp = paths or (self.drop_path, self.drop_path)
        hidden_states = add_attention(hidden_states, attend, num_queries)
        return add_mlp(hidden_states, lambda x: self.layer_scale2(self.mlp(self.norm2(x))))


class EquiSSLStem(nn.Module):
    """The linear layer whose output is split: rows of the weight are d_inv invariant, then d_equi equivariant.

    A part is computed alone by slicing weight and bias inside `forward`, where ZeRO-3 and FSDP have gathered them. It
    is no `nn.Linear`, because tools that put something in the place of every linear layer (adapters on "all-linear",
    quantisation) would lose the split.
    """

    def __init__(self, hidden_size: int, feature_size: int, equivariant_size: int) -> None:
        super().__init__()
        linear = nn.Linear(hidden_size, feature_size)
        self.in_features, self.out_features = hidden_size, feature_size
        self.weight, self.bias = linear.weight, linear.bias
        self.invariant_size = feature_size - equivariant_size
        self._sizes = {"invariant": self.invariant_size, "equivariant": equivariant_size}

    def forward(self, tokens: Tensor, part: str | None = None) -> Tensor:
        """Compute features of tokens.

        Args:
            tokens: (..., D), normed tokens.
            part: `"invariant"`, `"equivariant"` or `None` for both.

        Returns:
            (..., d_inv), (..., d_equi) or (..., d).

        Raises:
            ValueError: For another `part`.
        """
        if part is None:
            return nn.functional.linear(tokens, self.weight, self.bias)
        rows = self._rows(part)
        return nn.functional.linear(tokens, self.weight[rows], self.bias[rows])

    def fold(self, weight: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """Fold a linear map of a part and the stem into one map of the tokens, with gradient for both.

        Args:
            weight: (h, d_inv) or (h, d_equi).
            part: `"invariant"` or `"equivariant"`.

        Returns:
            Weight (h, D) and bias (h,), so that `linear(tokens, *fold(weight, part))` equals
            `linear(stem(tokens, part), weight)`.
        """
        rows = self._rows(part)
        return weight @ self.weight[rows], (weight @ self.bias[rows].unsqueeze(-1)).squeeze(-1)

    def is_fold_cheaper(self, num_tokens: int, output_size: int, part: str) -> bool:
        """Return whether `fold` saves products for so many tokens.

        Never under ZeRO-3, which gathers a weight only inside the `forward` of its own layer.
        """
        if hasattr(self.weight, "ds_id"):
            return False
        part_size = self._sizes[part]
        apart = num_tokens * part_size * (self.in_features + output_size)
        return apart > self.in_features * output_size * (num_tokens + part_size)

    def _rows(self, part: str) -> slice:
        if part == "invariant":
            return slice(0, self.invariant_size)
        if part == "equivariant":
            return slice(self.invariant_size, None)
        raise ValueError(f"part={part!r}: expected 'invariant', 'equivariant' or None (both).")
