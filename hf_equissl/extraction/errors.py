"""What can stop an extraction, as an exception."""

from __future__ import annotations


class ExtractionError(RuntimeError):
    """An extraction stopped on its way; the shards that are whole are kept, and the same command goes on."""
