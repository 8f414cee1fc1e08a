"""Loading a whole pretraining state, from the Hub, from a folder, or from a checkpoint whose weights are sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import MODEL_SHARDS, check_weights, read_checkpoint_weights
from ..pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig


def load_pretraining_state(source: str | Path, **options: Any) -> EquiSSLForPreTraining:
    """Load as ``EquiSSLForPreTraining.from_pretrained`` does, also a checkpoint that FSDP2 wrote in shards.

    Args:
        source: A Hub id, a folder, or a checkpoint of any engine.
        **options: Arguments of ``from_pretrained``.

    Raises:
        OSError: There is no such state, or its weights cannot be read.
        ValueError: Weights that its objectives need are missing.
    """
    folder = Path(source, options.get("subfolder", ""))
    check_weights(folder)
    if not (folder / MODEL_SHARDS).is_dir():
        loaded: EquiSSLForPreTraining = EquiSSLForPreTraining.from_pretrained(source, **options)
        return loaded
    config = EquiSSLPreTrainingConfig.from_pretrained(folder)
    weights = read_checkpoint_weights(folder)
    kept = {key: value for key, value in options.items() if key not in ("subfolder", "revision")}
    sharded: EquiSSLForPreTraining = EquiSSLForPreTraining.from_pretrained(
        None, config=config, state_dict=weights, **kept
    )
    return sharded
