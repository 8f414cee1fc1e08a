"""Encoders in and out: loaded frozen, converted from public checkpoints, saved as folders that ``AutoModel`` loads.

Names are imported when they are first used, so that an export does not load what evaluation needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

__all__ = [
    "FEATURES",
    "FrozenEncoder",
    "convert_encoder",
    "load_encoder",
    "open_frozen",
    "paint_intermediate_images",
    "save_encoder",
    "save_native",
    "to_native",
]

if TYPE_CHECKING:
    from .convert import convert_encoder
    from .export import save_encoder
    from .feature_names import FEATURES
    from .frozen import FrozenEncoder
    from .loading import load_encoder
    from .native import save_native, to_native
    from .painting import paint_intermediate_images
    from .references import open_frozen

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "FEATURES": "feature_names",
        "FrozenEncoder": "frozen",
        "convert_encoder": "convert",
        "load_encoder": "loading",
        "open_frozen": "references",
        "paint_intermediate_images": "painting",
        "save_encoder": "export",
        "save_native": "native",
        "to_native": "native",
    },
)
