"""Blocks of the EquiSSL encoder: DINOv2's, with the parameter names of transformers' `Dinov2Model`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_equissl import EquiSSLConfig

__all__ = ["EquiSSLAttention", "EquiSSLDropPath", "EquiSSLLayer", "EquiSSLLayerScale", "EquiSSLMLP", "EquiSSLStem"]


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
    """Softmax attention with its weights. (B, H, T, d) each -> (B, T, H, d) and (B, H, T, T)."""
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

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and the attention weights (B, H, T, T) where the kernel has them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(hidden_states.shape).contiguous()), weights


class EquiSSLLayerScale(nn.Module):
    """A learned factor per channel on a residual branch (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.initial_value = 1.0 if config.layerscale_value is None else float(config.layerscale_value)
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), self.initial_value))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return hidden_states * self.lambda1


class EquiSSLMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.activation_fn = ACT2FN[hidden_act]
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class EquiSSLDropPath(nn.Module):
    """Stochastic depth per sample (https://arxiv.org/abs/1603.09382); the identity outside training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), rows zeroed with probability `rate`, the others scaled by 1 / (1 - rate)."""
        if not self.training:
            return hidden_states
        # Drawn in fp32: bf16 has eight bits, too few for a probability.
        keep = torch.rand(len(hidden_states), device=hidden_states.device) >= self.rate
        factor = keep.to(hidden_states.dtype) / (1 - self.rate)
        return hidden_states * factor.view(-1, *(1,) * (hidden_states.ndim - 1))

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3g}"


class EquiSSLLayer(GradientCheckpointingLayer):
    """One pre-norm block: x + scale(attention(norm(x))), then x + scale(mlp(norm(x)))."""

    def __init__(self, config: EquiSSLConfig, index: int) -> None:
        super().__init__()
        ramp = index / max(1, config.num_hidden_layers - 1) if config.drop_path_mode == "linear" else 1.0
        rate = config.drop_path_rate * ramp
        has_scale = config.layerscale_value is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EquiSSLAttention(config)
        self.layer_scale1 = EquiSSLLayerScale(config) if has_scale else nn.Identity()
        self.drop_path = EquiSSLDropPath(rate) if rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EquiSSLMLP(config.hidden_size, config.mlp_ratio, config.hidden_act)
        self.layer_scale2 = EquiSSLLayerScale(config) if has_scale else nn.Identity()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        branch, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = self.drop_path(self.layer_scale1(branch)) + hidden_states
        branch = self.mlp(self.norm2(hidden_states))
        return self.drop_path(self.layer_scale2(branch)) + hidden_states


class EquiSSLStem(nn.Linear):
    """The linear layer whose output is split: rows of the weight are d_inv invariant, then d_equi equivariant.

    A part is computed alone by slicing weight and bias inside `forward`, where ZeRO-3 and FSDP have gathered them.
    """

    def __init__(self, hidden_size: int, feature_size: int, equivariant_size: int) -> None:
        super().__init__(hidden_size, feature_size)
        self.invariant_size = feature_size - equivariant_size

    def forward(self, tokens: Tensor, part: str | None = None) -> Tensor:
        """Features of tokens.

        Args:
            tokens: (..., D), normed tokens.
            part: `"invariant"`, `"equivariant"` or `None` for both.

        Returns:
            (..., d_inv), (..., d_equi) or (..., d).

        Raises:
            ValueError: For another `part`.
        """
        if part is None:
            return super().forward(tokens)
        if part == "invariant":
            rows = slice(0, self.invariant_size)
        elif part == "equivariant":
            rows = slice(self.invariant_size, None)
        else:
            raise ValueError(f"part={part!r}: expected 'invariant', 'equivariant' or None (both).")
        return nn.functional.linear(tokens, self.weight[rows], self.bias[rows])
