"""Values that change during training, as pure functions of the step: a resumed run finds them again by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..objectives.progress import TrainingProgress, cosine, linear_ramp

if TYPE_CHECKING:
    from .arguments import EquiSSLTrainingArguments

__all__ = ["TrainingProgress", "cosine", "last_layer_is_held", "linear_ramp", "teacher_momentum", "weight_decay"]


def teacher_momentum(args: EquiSSLTrainingArguments, progress: TrainingProgress) -> float:
    """Return the momentum of the update that ends step ``progress.step``: half a cosine (iBOT, DINOv2)."""
    return cosine(args.teacher_momentum, args.teacher_momentum_end, progress.step, progress.max_steps)


def weight_decay(args: EquiSSLTrainingArguments, progress: TrainingProgress) -> float:
    """Return the weight decay of step ``progress.step``: half a cosine, constant without ``weight_decay_end``."""
    if args.weight_decay_end is None:
        return args.weight_decay
    return cosine(args.weight_decay, args.weight_decay_end, progress.step, progress.max_steps)


def last_layer_is_held(args: EquiSSLTrainingArguments, progress: TrainingProgress) -> bool:
    """Return whether step ``progress.step`` leaves the last layer, e.g. prototypes, as it is.

    Raises:
        ValueError: The length of an epoch is not known.
    """
    epochs = args.freeze_last_layer_epochs
    return epochs > 0 and progress.step < progress.steps_in(epochs)
