"""What travels to the Hub: the encoder's configuration, the encoder, its decoders. Imports nothing of hf_equissl.

Names load their file when they are first used: the configuration alone does not need transformers' modeling code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_equissl import EquiSSLPreTrainedModel
    from .configuration_equissl import EquiSSLConfig
    from .configuration_pyramid_equissl import FeaturePyramidConfig
    from .decoders_equissl import (
        EquiSSLConvDecoder,
        EquiSSLCrossAttentionDecoder,
        EquiSSLUpsampleConv2d,
        build_decoder,
    )
    from .layers_equissl import EquiSSLLayer, EquiSSLStem
    from .modeling_equissl import (
        EquiSSLBackbone,
        EquiSSLForImageClassification,
        EquiSSLModel,
        EquiSSLModelOutput,
    )
    from .pyramid_equissl import FeaturePyramidBackbone

_FILES = {
    "EquiSSLBackbone": "modeling_equissl",
    "EquiSSLConfig": "configuration_equissl",
    "EquiSSLConvDecoder": "decoders_equissl",
    "EquiSSLCrossAttentionDecoder": "decoders_equissl",
    "EquiSSLForImageClassification": "modeling_equissl",
    "EquiSSLLayer": "layers_equissl",
    "EquiSSLModel": "modeling_equissl",
    "EquiSSLModelOutput": "modeling_equissl",
    "EquiSSLPreTrainedModel": "base_equissl",
    "EquiSSLStem": "layers_equissl",
    "EquiSSLUpsampleConv2d": "decoders_equissl",
    "FeaturePyramidBackbone": "pyramid_equissl",
    "FeaturePyramidConfig": "configuration_pyramid_equissl",
    "build_decoder": "decoders_equissl",
}

__all__ = [
    "EquiSSLBackbone",
    "EquiSSLConfig",
    "EquiSSLConvDecoder",
    "EquiSSLCrossAttentionDecoder",
    "EquiSSLForImageClassification",
    "EquiSSLLayer",
    "EquiSSLModel",
    "EquiSSLModelOutput",
    "EquiSSLPreTrainedModel",
    "EquiSSLStem",
    "EquiSSLUpsampleConv2d",
    "FeaturePyramidBackbone",
    "FeaturePyramidConfig",
    "build_decoder",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in ("EquiSSLConfig", "FeaturePyramidConfig"):
        # The model's file imports the others. Loaded first, it is whole when a listener to transformers' Auto classes,
        # which that import brings in, asks for the model; from inside a helper file it would find a circle.
        import_module(".modeling_equissl", __name__)
    return getattr(import_module(f".{_FILES[name]}", __name__), name)
