"""EquiSSL: self-supervised vision encoders that keep where and how things are, not only what they are.

Importing this package makes transformers' Auto classes and pipelines know EquiSSL encoders. Names are resolved
when they are first used, so the import itself stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .auto_classes import register_auto_classes
from .utils.lazy_names import import_when_used
from .utils.versions import __version__

__all__ = [
    "EQUIVARIANCE_OBJECTIVES",
    "EVALUATORS",
    "INVARIANCE_OBJECTIVES",
    "PIPELINES",
    "TRANSFORMATIONS",
    "EquiSSLBackbone",
    "EquiSSLConfig",
    "EquiSSLForImageClassification",
    "EquiSSLForPreTraining",
    "EquiSSLModel",
    "EquiSSLPreTrainingConfig",
    "EquiSSLTrainer",
    "EquiSSLTrainingArguments",
    "Recipe",
    "__version__",
    "load_images",
    "paint_intermediate_images",
    "save_encoder",
]

if TYPE_CHECKING:
    from .data import load_images
    from .encoders import paint_intermediate_images, save_encoder
    from .evaluation import EVALUATORS
    from .modeling import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel
    from .objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES
    from .pretraining.arguments import EquiSSLTrainingArguments
    from .pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
    from .pretraining.trainer import EquiSSLTrainer
    from .recipes.recipe import Recipe
    from .views import TRANSFORMATIONS
    from .views.pipelines import PIPELINES

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "EquiSSLBackbone": "modeling",
        "EquiSSLConfig": "modeling",
        "EquiSSLForImageClassification": "modeling",
        "EquiSSLModel": "modeling",
        "EquiSSLForPreTraining": "pretraining.model",
        "EquiSSLPreTrainingConfig": "pretraining.model",
        "EquiSSLTrainer": "pretraining.trainer",
        "EquiSSLTrainingArguments": "pretraining.arguments",
        "EVALUATORS": "evaluation",
        "EQUIVARIANCE_OBJECTIVES": "objectives",
        "INVARIANCE_OBJECTIVES": "objectives",
        "PIPELINES": "views.pipelines",
        "TRANSFORMATIONS": "views",
        "Recipe": "recipes.recipe",
        "load_images": "data",
        "paint_intermediate_images": "encoders.painting",
        "save_encoder": "encoders.export",
    },
)
register_auto_classes()
