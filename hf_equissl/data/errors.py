"""What can go wrong with a source of images, as exceptions."""

from __future__ import annotations

from ..utils.redaction import redact


class ImageSourceError(ValueError):
    """A source of images does not exist, holds no images, or leaves open which column or split is meant."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))  # addresses are repeated in it


class UnknownSplitError(ImageSourceError):
    """The source exists but has no split of this name."""


class ImageDecodeError(ValueError):
    """An image could not be read or decoded."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class TooManyBadImages(RuntimeError):
    """The share of files that do not decode is larger than the run allows."""
