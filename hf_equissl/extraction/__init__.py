"""Features of large sets of images, written to shards by many processes, each image exactly once.

``training/extract_features.py`` is the command. A shard holds a fixed range of rows and is written beside its final
name and renamed when it is whole, so that the result depends neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

from .settings import ExtractionError, ExtractionSettings
from .work import Extraction, prepare

__all__ = ["Extraction", "ExtractionError", "ExtractionSettings", "prepare"]
