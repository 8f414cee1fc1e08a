"""What is known of views and data before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from .base import TransformationFamily
from .view_specs import PipelineSpec

__all__ = ["ViewFacts"]

_STRENGTHS = ("brightness", "contrast", "saturation", "hue", "solarize_threshold")
_PROBABILITIES = ("flip", "jitter", "grayscale", "blur", "solarize")


@dataclass(frozen=True)
class ViewFacts:
    """Facts that the sizes of an objective's heads follow from. A model's configuration stores them.

    Attributes:
        parameter_names: Parameters of the transformation family g, one name per column; empty without g.
        strengths: By global view the ranges of its colour factors, by name: brightness, contrast, saturation and hue;
            and its ``solarize_threshold`` (``ViewSpec``).
        num_classes: Classes of the data set; ``None`` where they were not counted.
        same_base: Whether g is all that tells two global views of an image apart: no view is cropped or coloured.
    """

    parameter_names: tuple[str, ...] = ()
    strengths: tuple[Mapping[str, float], ...] = ()
    num_classes: int | None = None
    same_base: bool = False

    @classmethod
    def of(cls, spec: PipelineSpec, family: TransformationFamily | None, num_classes: int | None = None) -> Self:
        """Read them off an augmentation pipeline and the family g behind it."""
        changed = (
            view.crop_scale is not None or any(getattr(view, f"{name}_probability") for name in _PROBABILITIES)
            for view in spec.views
        )
        return cls(
            parameter_names=() if family is None else tuple(family.parameter_names),
            strengths=tuple({name: getattr(view, name) for name in _STRENGTHS} for view in spec.views),
            num_classes=num_classes,
            same_base=not any(changed),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote, also after it went through JSON."""
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by name."""
        return asdict(self)
