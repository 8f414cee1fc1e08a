"""Checks, before training, that a view pipeline gives what the objectives ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import TransformationFamily
from .needs import Needs
from .view_specs import PIPELINES, PipelineSpec

if TYPE_CHECKING:
    from .pipelines import ViewPipeline


def check_needs(needs: Needs, transformation: TransformationFamily | None, spec: PipelineSpec, name: str) -> None:
    """Refuse, before training, what the objectives ask for and this pipeline cannot give."""
    if transformation is None and (needs.fractions or needs.parameters):
        asked = "intermediate images" if needs.fractions else "parameters of g"
        raise ValueError(
            f"An objective asks for {asked}, but the recipe names no transformation. "
            "Set views.transformation, for example {name: rotation}, or drop the equivariance objective."
        )
    if any(not 0.0 <= value <= 1.0 for value in needs.fractions):
        raise ValueError(f"fractions are {needs.fractions}, expected numbers in [0, 1].")
    if transformation is not None and not transformation.continuous and any(0.0 < f < 1.0 for f in needs.fractions):
        raise ValueError(
            f"An objective asks for {type(transformation).__name__} at the fractions {needs.fractions}, but this "
            "family has no path from the identity to g. Choose a continuous one, for example rotation."
        )
    lacking = {
        "local crops": ("local: {count: 8, size: 96}", needs.local_crops and spec.local is None),
        "masks": ("masks: {kind: per_view, probability: 0.5, ratio: [0.1, 0.5]}", needs.masks and spec.masks is None),
    }
    absent = {what: example for what, (example, is_lacking) in lacking.items() if is_lacking}
    if absent:
        having = [key for key, preset in PIPELINES.items() if preset.local and (preset.masks or not needs.masks)]
        raise ValueError(
            f"An objective asks for {' and '.join(absent)}, but the view pipeline {name!r} makes none. Choose one that "
            f"does (views.pipeline.name: {', '.join(having)}), or add, for example, views.pipeline."
            f"{' and views.pipeline.'.join(absent.values())}."
        )


def check_extra(pipeline: ViewPipeline, name: str) -> None:
    """Refuse further views that do not go together with each other or with the usual ones."""
    needs, local = pipeline.needs, pipeline.local
    crops = len(pipeline.spec.views) + (local.count if local else 0)
    for extra in needs.extra:
        if extra.joins and len(extra.joins) != crops:
            raise ValueError(
                f"{len(extra.joins)} of the further views {extra.name!r} join the usual crops, and the view pipeline "
                f"{name!r} makes {crops} for this invariance objective: each needs one. Let both have as many local "
                "crops (views.pipeline.local.count and local_crops of the invariance objective), or neither any."
            )
    replacing = [key for key, maker in pipeline.makers.items() if maker.replaces_global_crops]
    if len(replacing) > 1 or (replacing and (needs.crop_boxes or needs.photometric)):
        raise ValueError(
            f"{replacing[0]!r} replaces the global crops, and another objective asks for "
            f"{repr(replacing[1]) if len(replacing) > 1 else 'how they were cropped and coloured'}. Train them in runs "
            "of their own."
        )
    reading = [key for key, maker in pipeline.makers.items() if maker.reads_global_crops]
    if replacing and reading:
        raise ValueError(
            f"{replacing[0]!r} replaces the global crops, and {reading[0]!r} is made of them. Train them in runs of "
            "their own."
        )
