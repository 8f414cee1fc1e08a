"""Tasks that an encoder can be fine-tuned for, by name: ``TASKS``. Needs no torch before one is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...utils.lazy_names import import_when_used
from ...utils.registry import Later, Registry
from ...utils.suggestions import check_known

__all__ = ["TASKS", "DenseTask", "EncoderInput", "Samples", "Splits", "Step", "Task", "make_task"]

if TYPE_CHECKING:
    from .base import EncoderInput, Samples, Splits, Step, Task
    from .dense import DenseTask

# Tasks of other packages are added with ``register`` (see hf_equissl.utils.registry).
TASKS: Registry[Task] = Registry(
    "task",
    Later(f"{__package__}.base", "Task"),
    {
        "classification": Later(f"{__package__}.classification", "ClassificationTask"),
        "depth": Later(f"{__package__}.depth", "DepthTask"),
        "detection": Later(f"{__package__}.detection", "DetectionTask"),
        "homography": Later(f"{__package__}.homography", "HomographyTask"),
        "instance_segmentation": Later(f"{__package__}.instance_segmentation", "InstanceSegmentationTask"),
        "keypoints": Later(f"{__package__}.keypoints", "KeypointTask"),
        "linear_segmentation": Later(f"{__package__}.linear_segmentation", "LinearSegmentationTask"),
        "mpii_keypoints": Later(f"{__package__}.mpii_keypoints", "MpiiKeypointTask"),
        "semantic_segmentation": Later(f"{__package__}.segmentation", "SegmentationTask"),
    },
)

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "DenseTask": "dense",
        "EncoderInput": "base",
        "Samples": "base",
        "Splits": "base",
        "Step": "base",
        "Task": "base",
    },
)


def make_task(name: str, options: dict[str, Any]) -> Task:
    """Make a task of the registry with its own options.

    Raises:
        ValueError: there is no such task, or it has no such option, or an option has another type.
    """
    from ...utils.coercion import check_arguments

    check_known(name, TASKS, "--task")
    return TASKS[name](**check_arguments(options, TASKS[name], f"--set ({name})"))
