"""Features of large sets of images, written to shards by many processes, each image exactly once.

``training/extract_features.py`` is the command. A shard holds a fixed range of rows and is written beside its final
name and renamed when it is whole, so that the result depends neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used
from .settings import ExtractionError, ExtractionSettings

__all__ = ["Extraction", "ExtractionError", "ExtractionSettings", "prepare"]

if TYPE_CHECKING:
    from .work import Extraction, prepare

# Found when they are asked for: the command's help must not wait for torch.
__getattr__, __dir__ = import_when_used(__name__, __all__, {"Extraction": "work", "prepare": "work"})
