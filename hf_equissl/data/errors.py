"""What can go wrong with a source of images, as exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.redaction import redact


class ImageSourceError(ValueError):
    """A source of images does not exist, holds no images, or leaves open which column or split is meant."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))  # a message repeats addresses


class UnknownSplitError(ImageSourceError):
    """The source exists but has no split of this name."""


class ImageDecodeError(ValueError):
    """An image could not be read or decoded."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@contextmanager
def explain_decode_errors() -> Iterator[None]:
    """Turn whatever a reader raises about an image into one error. Memory that runs out is not the image's fault.

    Raises:
        ImageDecodeError: In place of every other error: readers raise whatever a broken header led them into.
    """
    try:
        yield
    except (ImageDecodeError, MemoryError):
        raise
    except Exception as error:
        raise ImageDecodeError(f"{type(error).__name__}: {error}") from error


class TooManyBadImages(RuntimeError):
    """The share of files that do not decode is larger than the run allows."""
