"""Checkpoints: which are complete, how they are written, and how other engines read them (``portable``)."""

from .manifest import (
    ARGUMENTS_FILE,
    ENCODER_FOLDER,
    MANIFEST,
    MODEL_SHARDS,
    STAGING_FOLDER,
    IncompleteCheckpointError,
    Manifest,
    check_weights,
    checkpoint_step,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint_weights,
    weight_files,
)
from .whole import CheckpointError, WholeCheckpoints

__all__ = [
    "ARGUMENTS_FILE",
    "ENCODER_FOLDER",
    "MANIFEST",
    "MODEL_SHARDS",
    "STAGING_FOLDER",
    "CheckpointError",
    "IncompleteCheckpointError",
    "Manifest",
    "WholeCheckpoints",
    "check_weights",
    "checkpoint_step",
    "list_checkpoints",
    "newest_checkpoint",
    "read_checkpoint_weights",
    "weight_files",
]
