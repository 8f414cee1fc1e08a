"""CLS tokens of the last blocks, each through the final norm: what the linear probes of DINO, SER and DINOv2 read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .feature_names import BLOCK_FEATURES
from .outputs import last_state

# How many blocks are read.
NUM_BLOCKS = 4
# What transformers' vision encoders and EquiSSLModel call the norm after the last block.
_NORMS = ("layernorm", "norm", "post_layernorm")


def final_norm(module: nn.Module) -> nn.Module | None:
    """Find the norm that a transformer applies after its last block; ``None`` where there is none of a known name."""
    return next((found for name in _NORMS if isinstance(found := getattr(module, name, None), nn.Module)), None)


def read_last_blocks(module: nn.Module, output: Any, num_patches: int, name: str) -> Tensor:
    """Read ``last_cls_tokens`` off what an encoder returned when it was asked for its hidden states.

    Raises:
        ValueError: It has no final norm of a known name, returned no hidden states, or as ``last_cls_tokens``.
    """
    norm, states = final_norm(module), getattr(output, "hidden_states", None)
    if norm is None or not states:
        lacks = "it gives no hidden states" if norm else f"there is no norm called {' or '.join(_NORMS)} after the last"
        raise ValueError(
            f"{name} ({type(module).__name__}) has no features of single blocks: {lacks}. Choose other features than "
            f"{', '.join(BLOCK_FEATURES)}."
        )
    return last_cls_tokens(states, norm, num_patches, last_state(output))


def last_cls_tokens(hidden_states: Sequence[Tensor], norm: nn.Module, num_patches: int, last: Tensor) -> Tensor:
    """Concatenate the CLS tokens of the last ``NUM_BLOCKS`` blocks, the last one's at the end.

    Blocks before a late CLS (``cls_insertion_layer``) have none and are left out: fewer tokens, never a patch in their
    place. Of an encoder without CLS it is the mean patch of each block, as in ``FrozenEncoder``.

    Args:
        hidden_states: (B, T, D) each: the input of the first block and the output of every block, before ``norm``.
        norm: The final norm.
        num_patches: How many of the T tokens are patches; they stand last.
        last: (B, T, D), the last hidden state, after ``norm``.

    Returns:
        (B, k D), k at most ``NUM_BLOCKS``.

    Raises:
        ValueError: ``norm`` does not turn the last hidden state into ``last``.
    """
    normed = [norm(state) for state in hidden_states[1:][-NUM_BLOCKS:]]
    if not torch.allclose(normed[-1].float(), last.float(), atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"The last {NUM_BLOCKS} blocks cannot be read: {type(norm).__name__} of the last hidden state is not the "
            f"output. Choose other features than {', '.join(BLOCK_FEATURES)}."
        )
    if last.shape[1] == num_patches:
        return torch.cat([state.mean(1) for state in normed], 1)
    return torch.cat([state[:, 0] for state in normed if state.shape[1] > num_patches], 1)
