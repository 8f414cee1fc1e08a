"""Tasks that an encoder can be fine-tuned for, by name: ``TASKS``."""

from __future__ import annotations

from typing import Any

from ...utils.coercion import check_arguments
from ...utils.registry import Registry
from ...utils.suggestions import check_known
from .base import EncoderInput, Samples, Splits, Step, Task
from .classification import ClassificationTask
from .dense import DenseTask
from .segmentation import SegmentationTask

__all__ = ["TASKS", "DenseTask", "EncoderInput", "Samples", "Splits", "Step", "Task", "make_task"]

# Own tasks join with ``register``: hf_equissl.utils.registry.
TASKS: Registry[Task] = Registry(
    "task", Task, {"classification": ClassificationTask, "semantic_segmentation": SegmentationTask}
)


def make_task(name: str, options: dict[str, Any]) -> Task:
    """Make a task of the registry with its own options.

    Raises:
        ValueError: there is no such task, or it has no such option, or an option has another type.
    """
    check_known(name, TASKS, "--task")
    return TASKS[name](**check_arguments(options, TASKS[name], f"--set ({name})"))
