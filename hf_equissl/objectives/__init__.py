"""Objectives: terms of the loss with their heads, in two registries that recipes name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..utils.suggestions import check_keys, check_known
from .base import Features, LossOutput, Objective
from .cross_attention_reconstruction import CrossAttentionReconstructionObjective
from .dino import DINOObjective
from .dinov2 import DINOv2Objective
from .ibot import IBOTObjective
from .reconstruction import ReconstructionObjective
from .vicreg import VICRegObjective

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig

__all__ = [
    "EQUIVARIANCE_OBJECTIVES",
    "INVARIANCE_OBJECTIVES",
    "CrossAttentionReconstructionObjective",
    "DINOObjective",
    "DINOv2Objective",
    "Features",
    "IBOTObjective",
    "LossOutput",
    "Objective",
    "ReconstructionObjective",
    "VICRegObjective",
    "build_objective",
]

INVARIANCE_OBJECTIVES: dict[str, type[Objective]] = {
    "dino": DINOObjective,
    "dinov2": DINOv2Objective,
    "ibot": IBOTObjective,
    "vicreg": VICRegObjective,
}

EQUIVARIANCE_OBJECTIVES: dict[str, type[Objective]] = {
    "cross_attention_reconstruction": CrossAttentionReconstructionObjective,
    "reconstruction": ReconstructionObjective,
}


def build_objective(
    registry: Mapping[str, type[Objective]], name: str, config: EquiSSLConfig, **kwargs: Any
) -> Objective:
    """Build an objective by its registry key.

    Args:
        registry: ``INVARIANCE_OBJECTIVES`` or ``EQUIVARIANCE_OBJECTIVES``.
        name: Key in the registry.
        config: The encoder's configuration.
        kwargs: Keyword arguments of the objective's constructor.

    Raises:
        ValueError: For an unknown name or keyword, with the nearest and all valid ones; for a missing keyword.
    """
    check_known(name, registry, "objective")
    cls = registry[name]
    parameters = dict(list(inspect.signature(cls).parameters.items())[1:])  # without config
    check_keys(kwargs, parameters, f"objective {name!r}")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in kwargs]
    if missing:
        raise ValueError(f"Objective {name!r} needs a value for {', '.join(missing)}.")
    return cls(config, **kwargs)
