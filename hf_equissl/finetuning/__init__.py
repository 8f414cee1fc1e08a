"""Fine-tuning for image classification: all weights, a linear head, or LoRA / DoRA adapters, on any encoder.

``fine_tune(settings)`` trains, ``load_finetuned`` loads what it left (a model, or an adapter onto its base), and
``merge_adapter`` writes an adapter and its base as one plain model. Who uses PEFT directly calls
``register_lora_targets()`` once: ``LoraConfig()`` then needs no target modules for EquiSSL, DINOv2 and ViT encoders.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapters import LORA_TARGETS, register_lora_targets
from .settings import METHODS, FineTuningSettings, Method

_EXPORTS = {
    "FineTuningRun": "prepared",
    "fine_tune": "run",
    "load_finetuned": "adapters",
    "merge_adapter": "publish",
    "prepare": "run",
    "train": "run",
}

__all__ = [
    "LORA_TARGETS",
    "METHODS",
    "FineTuningRun",
    "FineTuningSettings",
    "Method",
    "fine_tune",
    "load_finetuned",
    "merge_adapter",
    "prepare",
    "register_lora_targets",
    "train",
]

if TYPE_CHECKING:
    from .adapters import load_finetuned
    from .prepared import FineTuningRun
    from .publish import merge_adapter
    from .run import fine_tune, prepare, train


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
