"""What objectives ask for: the one thing that views, encoder and objectives all read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the views and of the encoder; nothing else is computed.

    Attributes:
        teacher: An EMA teacher and its features of the global crops.
        local_crops: Small crops (multi-crop), for the student only.
        masks: Patch masks for the student's global crops.
        fractions: Fractions of g at which reconstruction targets are made, e.g. (1/3, 2/3) for K = 2.
        parameters: g's parameters.
        crop_boxes: Boxes of the global crops.
        photometric: Parameters that the augmentation pipeline drew.
        labels: Class labels.
        hidden_layers: Blocks whose token maps are kept (1 = after the first block).
        extra: Names of further image sets (``Views.extra``), each encoded by the student in a pass of its own.
    """

    teacher: bool = False
    local_crops: bool = False
    masks: bool = False
    fractions: tuple[float, ...] = ()
    parameters: bool = False
    crop_boxes: bool = False
    photometric: bool = False
    labels: bool = False
    hidden_layers: tuple[int, ...] = ()
    extra: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """The union of two declarations. Reconstruction targets are made once, so fractions may not differ."""
        if self.fractions and other.fractions and self.fractions != other.fractions:
            raise ValueError(
                f"Two objectives ask for different fractions of g, {self.fractions} and {other.fractions}. "
                "Give them the same number of intermediate images."
            )
        merged: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            merged[item.name] = tuple(dict.fromkeys(mine + theirs)) if isinstance(mine, tuple) else mine or theirs
        return Needs(**merged)
