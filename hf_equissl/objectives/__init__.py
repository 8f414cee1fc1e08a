"""Objectives: terms of the loss with their heads, in two registries that recipes name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..utils.coercion import check_arguments, parameters_of
from ..utils.registry import Registry
from .augself import AugSelfObjective
from .barlow_twins import BarlowTwinsObjective
from .base import Features, LossOutput, Objective, Reach
from .cross_attention_reconstruction import CrossAttentionReconstructionObjective
from .dino import DINOObjective
from .dinov2 import DINOv2Objective
from .equimod import EquiModObjective
from .essl import ESSLObjective
from .ibot import IBOTObjective
from .moco_v3 import MoCoV3Objective
from .parameter_regression import ParameterRegressionObjective
from .reconstruction import ReconstructionObjective
from .ser import SERObjective
from .sie import SIEObjective
from .simclr import SimCLRObjective
from .stl import STLObjective
from .supervised import SupervisedObjective
from .vicreg import VICRegObjective

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.facts import ViewFacts

__all__ = [
    "EQUIVARIANCE_OBJECTIVES",
    "INVARIANCE_OBJECTIVES",
    "AugSelfObjective",
    "BarlowTwinsObjective",
    "CrossAttentionReconstructionObjective",
    "DINOObjective",
    "DINOv2Objective",
    "ESSLObjective",
    "EquiModObjective",
    "Features",
    "IBOTObjective",
    "LossOutput",
    "MoCoV3Objective",
    "Objective",
    "ParameterRegressionObjective",
    "Reach",
    "ReconstructionObjective",
    "SERObjective",
    "SIEObjective",
    "STLObjective",
    "SimCLRObjective",
    "SupervisedObjective",
    "VICRegObjective",
    "build_objective",
    "takes_facts",
    "weight_of",
]

# Objectives of other packages are added with ``register`` (see hf_equissl.utils.registry).
INVARIANCE_OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    Objective,
    {
        "barlow_twins": BarlowTwinsObjective,
        "dino": DINOObjective,
        "dinov2": DINOv2Objective,
        "ibot": IBOTObjective,
        "moco_v3": MoCoV3Objective,
        "parameter_regression": ParameterRegressionObjective,
        "simclr": SimCLRObjective,
        "supervised": SupervisedObjective,
        "vicreg": VICRegObjective,
    },
)
EQUIVARIANCE_OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    Objective,
    {
        "augself": AugSelfObjective,
        "cross_attention_reconstruction": CrossAttentionReconstructionObjective,
        "equimod": EquiModObjective,
        "essl": ESSLObjective,
        "reconstruction": ReconstructionObjective,
        "ser": SERObjective,
        "sie": SIEObjective,
        "stl": STLObjective,
    },
)
# Parameters of constructors that the library fills in: no recipe may give them.
FILLED_IN = ("config", "facts")


def takes_facts(cls: type[Objective]) -> bool:
    """Return whether an objective is built from the ``ViewFacts`` of the run."""
    return "facts" in parameters_of(cls)


def weight_of(entry: Mapping[str, Any]) -> float:
    """Return the factor lambda of an equivariance objective, as recipes and configurations write it: 1 if not given."""
    return entry.get("weight", 1.0)


def build_objective(
    registry: Registry[Objective], name: str, config: EquiSSLConfig, *, facts: ViewFacts | None = None, **kwargs: Any
) -> Objective:
    """Build an objective by its registry key.

    Args:
        registry: ``INVARIANCE_OBJECTIVES`` or ``EQUIVARIANCE_OBJECTIVES``.
        name: Key in the registry.
        config: The encoder's configuration.
        facts: Facts of views and data, for objectives that are built from them.
        kwargs: Keyword arguments of the objective's constructor.

    Raises:
        RecipeError: For an unknown name or keyword, with the nearest and all valid ones; for a missing keyword; for a
            value of a wrong type.
        ValueError: The objective needs ``facts``, and there are none.
    """
    cls: Any = registry[name]
    arguments = check_arguments(kwargs, cls, f"objective {name!r}", skip=FILLED_IN)
    if not takes_facts(cls):
        return cls(config, **arguments)
    if facts is None or (cls.reads_num_classes and facts.num_classes is None):
        missing = "the number of classes" if facts is not None else "facts of views and data (ViewFacts)"
        raise ValueError(f"The objective {name!r} is built from {missing}, which this configuration does not say.")
    return cls(config, facts=facts, **arguments)
