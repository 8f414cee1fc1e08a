"""What is known of views and data before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Self

import numpy as np
import torch

from .augmentation import VIEW_DRAWS, read_draws
from .base import TransformationFamily
from .cropping import as_fractions, draw_box
from .view_specs import PipelineSpec, ViewSpec

__all__ = ["ViewFacts", "measure_draws"]

_STRENGTHS = ("brightness", "contrast", "saturation", "hue", "solarize_threshold")
_PROBABILITIES = ("flip", "jitter", "grayscale", "blur", "solarize")
_BOX = ("top", "left", "height", "width")
# Draws per view behind means and deviations, and the side of the images.
SAMPLES, SIDE = 2048, 256


@dataclass(frozen=True)
class ViewFacts:
    """Facts that the sizes of an objective's heads follow from. A model's configuration stores them.

    Attributes:
        parameter_names: Parameters of the transformation family g, one name per column; empty without g.
        strengths: By global view the ranges of its colour factors, by name: brightness, contrast, saturation and hue;
            and its ``solarize_threshold`` (``ViewSpec``).
        num_classes: Classes of the data set; ``None`` where they were not counted.
        same_base: Whether g is all that tells two global views of an image apart: no view is cropped or coloured.
        means, deviations: Mean and standard deviation, over the global views, of what the augmentation pipeline draws,
            by its name in ``Views.photometric``; of ``crop_boxes`` as ``top``, ``left``, ``height`` and ``width``.
            Estimated from draws of the pipeline, of crops in square images: the same in each process and each run.
    """

    parameter_names: tuple[str, ...] = ()
    strengths: tuple[Mapping[str, float], ...] = ()
    num_classes: int | None = None
    same_base: bool = False
    means: Mapping[str, float] = field(default_factory=dict)
    deviations: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: PipelineSpec, family: TransformationFamily | None, num_classes: int | None = None) -> Self:
        """Read the facts off an augmentation pipeline and the family g behind it."""
        changed = (
            view.crop_scale is not None or any(getattr(view, f"{name}_probability") for name in _PROBABILITIES)
            for view in spec.views
        )
        means, deviations = measure_draws(spec.views)
        return cls(
            parameter_names=() if family is None else tuple(family.parameter_names),
            strengths=tuple({name: getattr(view, name) for name in _STRENGTHS} for view in spec.views),
            num_classes=num_classes,
            same_base=not any(changed),
            means=dict(means),
            deviations=dict(deviations),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote, also after it went through JSON."""
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by name."""
        return asdict(self)


@cache
def measure_draws(views: tuple[ViewSpec, ...], side: int = SIDE) -> tuple[dict[str, float], dict[str, float]]:
    """Estimate mean and deviation of what a pipeline draws of its global views, of images with that side, by name."""
    rng = np.random.default_rng(0)
    parts = []
    for view in views:
        uniform = torch.from_numpy(rng.random((SAMPLES, len(VIEW_DRAWS)), dtype=np.float32))
        boxes = [as_fractions(draw_box(side, side, side, view, rng), side, side) for _ in range(SAMPLES)]
        drawn = {name: values.numpy() for name, values in read_draws(uniform, view).items()}
        parts.append({**dict(zip(_BOX, np.array(boxes).T, strict=True)), **drawn})
    together = {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}
    means = {name: round(float(values.mean()), 6) for name, values in together.items()}
    return means, {name: round(float(values.std()), 6) for name, values in together.items()}
