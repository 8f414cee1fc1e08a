"""What the output of a vision module holds, whoever wrote the module: the last state, all states, a map of patches."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor


def last_state(output: Any) -> Tensor:
    """Return what stands for the image in a module's output: the last hidden state, of a backbone its last map."""
    if isinstance(output, Tensor):
        return output
    last = getattr(output, "last_hidden_state", None)
    return output.feature_maps[-1] if last is None else last


def read_states(output: Any) -> tuple[Any, ...]:
    """Return the states after each layer that an output holds, the last one after the final norm; or that one alone."""
    states = getattr(output, "feature_maps", None)  # the chosen stages of a backbone
    if states is not None:
        return tuple(states)
    earlier = getattr(output, "reshaped_hidden_states", None) or getattr(output, "hidden_states", None)
    return (*(earlier or (None,))[:-1], last_state(output))


def as_map(tokens: Tensor, image_sides: tuple[int, ...], patch: int | None, name: str) -> Tensor:
    """Lay tokens (B, T, D) out in the grid of their patches, (B, D, rows, columns); return a map as it is.

    Args:
        tokens: The tokens, patches last.
        image_sides: Height and width of the images.
        patch: Side of a patch in pixels; ``None`` where it is not known.
        name: Name of the encoder, for the message.

    Raises:
        ValueError: it gives one vector per image, or its patches have no known size.
    """
    if tokens.ndim == 4:
        return tokens
    if tokens.ndim == 2 or patch is None:
        raise ValueError(f"{name} gives {tuple(tokens.shape[1:])} per image: it has no map of features.")
    rows, columns = (side // patch for side in image_sides)
    if tokens.shape[1] < rows * columns:  # patches were merged on the way, as in Swin
        merged = isqrt(rows * columns // tokens.shape[1])
        rows, columns = rows // merged, columns // merged
    return tokens[:, tokens.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
