"""The section of a recipe about measuring the encoder during training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MonitorSettings:
    """The section ``monitor`` of a recipe.

    Attributes:
        every_steps: Optimizer steps from one measurement to the next; ``None``: never measure.
        train_images: Images among which neighbours are looked for, and whose effective rank (at most this number) and
            feature std are measured.
        test_images: Images that are classified; 0: no accuracy.
        source: Another data set than the training data, as in ``load_images``.
        split: Split of ``source`` or, without one, of the training data; default: "train", or the one trained on.
        column, label_column: Columns of ``source``, where their types do not tell.
        neighbours: Number of neighbours k.
        evaluate_at_start: Whether to measure before the first step, too.

    Raises:
        ValueError: A number is out of its range, or a column has no source.
    """

    every_steps: int | None = None
    train_images: int = 5000
    test_images: int = 1000
    source: str | None = None
    split: str | None = None
    column: str | None = None
    label_column: str | None = None
    neighbours: int = 20
    evaluate_at_start: bool = True

    def __post_init__(self) -> None:
        smallest = {"every_steps": 1, "train_images": 2, "test_images": 0, "neighbours": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in ("column", "label_column"):
            if self.source is None and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to a source of its own. Name monitor.source, or set data.{name}.")
