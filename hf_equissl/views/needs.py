"""What objectives ask for: the one thing that views, encoder and objectives all read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .makers import ViewMaker


@dataclass(frozen=True)
class ExtraViews:
    """A set of further images, which an objective asks for by name, and how they are encoded.

    A set has one or more views, as its maker says, which are counted from 0.

    Attributes:
        name: Where ``Views.extra``, ``Views.facts`` and ``Features.extra`` have them.
        maker: The class that makes them, which is built with the settings of the pipeline.
        options: Keyword arguments of ``maker``.
        student: Views that the student encodes; ``None``: all.
        teacher: Views that the teacher encodes, where there is one (``Needs.teacher`` says that there must be).
        hidden_layers: Blocks whose token maps are kept, as ``Needs.hidden_layers``.
        joins: Views whose CLS rows are appended to those of the usual crops: the first to global crop 1, and so on
            through all global, then all local crops. An objective that reads ``Features.cls`` then sees these images,
            too. A teacher encodes those that join global crops without being asked.
        patches: ``False``: only CLS and registers leave the last block, which is cheaper.
        last_layer: Stop after so many blocks, before the final norm; ``None``: after the last.
        sizes_are_drawn: Each view then has a pass of its own, where others of one size share one: processes draw
            different sizes, and those that share parameters (FSDP2, ZeRO-3) have to make as many passes as each other.
    """

    name: str
    maker: type[ViewMaker]
    options: Mapping[str, Any] = field(default_factory=dict)
    student: tuple[int, ...] | None = None
    teacher: tuple[int, ...] = ()
    hidden_layers: tuple[int, ...] = ()
    joins: tuple[int, ...] = ()
    patches: bool = True
    last_layer: int | None = None
    sizes_are_drawn: bool = False

    @property
    def of_student(self) -> tuple[int, ...] | None:
        """Views that the student has to encode, those that join included; ``None``: all."""
        return None if self.student is None else (*self.student, *self.joins)


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
        hidden_layers: Blocks whose token maps of the global crops are kept (1 = after the first block).
        extra: Sets of further images.
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
    extra: tuple[ExtraViews, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """Join two declarations. Reconstruction targets are made once, so fractions may not differ.

        Raises:
            ValueError: Different fractions, or two different sets of further images of one name.
        """
        if self.fractions and other.fractions and self.fractions != other.fractions:
            raise ValueError(
                f"Two objectives ask for different fractions of g, {self.fractions} and {other.fractions}. "
                "Give them the same number of intermediate images."
            )
        merged: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, tuple):
                merged[item.name] = mine + tuple(value for value in theirs if value not in mine)
            else:
                merged[item.name] = mine or theirs
        names = [extra.name for extra in merged["extra"]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two objectives ask for different further images called {twice[0]!r}. Train them in runs of their "
                "own, or let them ask for the same."
            )
        return Needs(**merged)
