"""Families whose parameters are uniform over ranges, and the checks that all families share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from .base import TransformationFamily


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf) -> float:
    """Return ``value`` as a float. Raises ValueError unless it is a finite number in [low, high]."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or not low <= number <= high:
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name}={value!r}: expected a finite number of at least {low:g}{upper}.")
    return number


def check_range(name: str, value: object, low: float, high: float = math.inf) -> tuple[float, float]:
    """Return ``value`` as a (smallest, largest) pair. Raises ValueError unless low <= smallest <= largest <= high."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: expected two numbers, the smallest and the largest.")
    smallest, largest = (check_number(name, item, low, high) for item in value)
    if smallest > largest:
        raise ValueError(f"{name}={value!r}: the smallest comes first; write ({largest:g}, {smallest:g}).")
    return smallest, largest


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value``. Raises ValueError unless it is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
    return str(value)


def as_float_images(images: Tensor) -> Tensor:
    """Turn images (B, C, H, W) into fp32: transformations never run in half precision, even where the batch does.

    Raises:
        ValueError: not four dimensions, or integers (8-bit values would be taken for intensities of 0 to 255).
    """
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}: expected (B, C, H, W); add a batch dimension.")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: expected floats in [0, 1]; divide 8-bit images by 255.")
    return images.float()


def at_fractions(parameters: Tensor, fractions: Tensor) -> Tensor:
    """Scale parameters (B, p) to ``fractions`` (F,) of the way from zero, linearly: (B, F, p) in fp32.

    Fractions may lie on the CPU whatever the device of the parameters: nothing waits for so small a copy.
    """
    fractions = fractions.to(parameters.device, torch.float32, non_blocking=True)
    return parameters.float()[:, None] * fractions[None, :, None]


def check_no_path(fractions: Tensor, reason: str) -> None:
    """Refuse fractions strictly between 0 and 1 of a family without intermediate images.

    Fractions on another device are not checked, which would wait for it: the pipeline checks them when it is built.

    Args:
        fractions: (F,).
        reason: Which family it is and what to do, after "fractions [0.5] of ".

    Raises:
        ValueError: There are some.
    """
    between = [value for value in fractions.tolist() if 0 < value < 1] if fractions.device.type == "cpu" else []
    if between:
        raise ValueError(f"fractions {between} of {reason}")


def check_draws(draws: Tensor, num_draws: int) -> Tensor:
    """Return ``draws`` in fp32. Raises ValueError unless their shape is (B, num_draws)."""
    if draws.dim() != 2 or draws.shape[1] != num_draws:
        raise ValueError(f"draws have shape {tuple(draws.shape)}: expected (B, {num_draws}) uniform numbers in [0, 1).")
    return draws.float()


def scale_to_unit(parameters: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """Scale the range of each of the parameters (B, p) to [-1, 1], a range of one value to 0."""
    columns = []
    for i, (low, high) in enumerate(ranges):
        column = parameters[:, i].float() - (high + low) / 2
        half = (high - low) / 2
        columns.append(column / half if half > 1e-9 else torch.zeros_like(column))
    return torch.stack(columns, dim=1)


class UniformFamily(TransformationFamily):
    """A family with one draw per parameter, uniform over a range of its own: ``sample`` and ``targets`` are given.

    Args:
        ranges: (smallest, largest) of each parameter, in the order of ``parameter_names``.
    """

    def __init__(self, ranges: Sequence[tuple[float, float]]) -> None:
        self.ranges = tuple(ranges)

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws (B, p) into parameters (B, p), each uniform over its range."""
        draws = check_draws(draws, self.num_draws)
        # Ranges enter as Python numbers: a tensor made from them would have to be copied to the device on every call.
        columns = [draws[:, i] * (high - low) + low for i, (low, high) in enumerate(self.ranges)]
        return torch.stack(columns, dim=1)

    def targets(self, parameters: Tensor) -> Tensor:
        """Scale the range of each of the parameters (B, p) to [-1, 1], a range of one value to 0."""
        return scale_to_unit(parameters, self.ranges)
