"""Objectives: terms of the loss with their heads, in two registries that recipes name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..utils.coercion import check_arguments
from ..utils.registry import Registry
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
    "weight_of",
]

# Own objectives join with ``register``: hf_equissl.utils.registry.
INVARIANCE_OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    Objective,
    {"dino": DINOObjective, "dinov2": DINOv2Objective, "ibot": IBOTObjective, "vicreg": VICRegObjective},
)
EQUIVARIANCE_OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    Objective,
    {
        "cross_attention_reconstruction": CrossAttentionReconstructionObjective,
        "reconstruction": ReconstructionObjective,
    },
)
# Parameters of constructors that the library fills in: no recipe may give them.
FILLED_IN = ("config", "facts")


def weight_of(entry: Mapping[str, Any]) -> float:
    """Return the factor lambda of an equivariance objective, as recipes and configurations write it: 1 if not given."""
    return entry.get("weight", 1.0)


def build_objective(registry: Registry[Objective], name: str, config: EquiSSLConfig, **kwargs: Any) -> Objective:
    """Build an objective by its registry key.

    Args:
        registry: ``INVARIANCE_OBJECTIVES`` or ``EQUIVARIANCE_OBJECTIVES``.
        name: Key in the registry.
        config: The encoder's configuration.
        kwargs: Keyword arguments of the objective's constructor.

    Raises:
        RecipeError: For an unknown name or keyword, with the nearest and all valid ones; for a missing keyword; for a
            value of a wrong type.
    """
    cls = registry[name]
    return cls(config, **check_arguments(kwargs, cls, f"objective {name!r}", skip=FILLED_IN))
