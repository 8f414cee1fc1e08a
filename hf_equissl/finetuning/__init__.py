"""Fine-tuning for a task, such as image classification: all weights, a head, or LoRA / DoRA adapters, on any encoder.

``TASKS`` holds the tasks and takes more of them. ``fine_tune(settings)`` trains, ``load_finetuned`` loads what it left
(a model, or an adapter onto its base), and ``merge_adapter`` writes an adapter and its base as one plain model. Who
uses PEFT directly calls ``register_lora_targets()`` once: ``LoraConfig()`` then needs no target modules for EquiSSL,
DINOv2 and ViT encoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used
from .settings import METHODS, FineTuningSettings, Method

__all__ = [
    "LORA_TARGETS",
    "METHODS",
    "TASKS",
    "DenseTask",
    "FineTuningRun",
    "FineTuningSettings",
    "Method",
    "Samples",
    "Splits",
    "Step",
    "Task",
    "fine_tune",
    "load_finetuned",
    "merge_adapter",
    "prepare",
    "register_lora_targets",
    "train",
]

if TYPE_CHECKING:
    from .adapters import LORA_TARGETS, load_finetuned, register_lora_targets
    from .prepared import FineTuningRun
    from .publish import merge_adapter
    from .run import fine_tune, prepare, train
    from .tasks import TASKS, DenseTask, Samples, Splits, Step, Task

# Found when they are asked for: the command's help must not wait for torch.
__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "LORA_TARGETS": "adapters",
        "TASKS": "tasks",
        "DenseTask": "tasks",
        "FineTuningRun": "prepared",
        "fine_tune": "run",
        "load_finetuned": "adapters",
        "Samples": "tasks",
        "Splits": "tasks",
        "Step": "tasks",
        "Task": "tasks",
        "merge_adapter": "publish",
        "prepare": "run",
        "register_lora_targets": "adapters",
        "train": "run",
    },
)
