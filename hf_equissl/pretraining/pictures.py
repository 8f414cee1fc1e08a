"""What the objectives paint, as pictures beside the losses: in the output folder and in trackers that show images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..objectives import Objective
from ..utils.figures import denormalize, picture_sheet
from ..utils.files import replacing
from .arguments import EquiSSLTrainingArguments

if TYPE_CHECKING:
    from ..objectives.base import LossOutput
    from ..views.base import Views

logger = logging.get_logger(__name__)
PICTURES_FILE = "reconstructions.png"
ROWS = 4


class PictureCallback(TrainerCallback):
    """Keeps what the objectives paint in a training step, every ``picture_steps`` and in the last one.

    Nothing is computed for it: the first images of the step's own batch are copied, on the main process. So it works
    under every engine without a message between processes, and changes no bit of the run. Pictures are as trained:
    views may be masked, and they are other images each time.

    Args:
        image_mean, image_std: Normalisation of the views, three numbers each.
        list_callbacks: Gives the Trainer's callbacks, those of trackers among them.
    """

    def __init__(
        self, image_mean: Sequence[float], image_std: Sequence[float], list_callbacks: Callable[[], Iterable[Any]]
    ) -> None:
        self._mean, self._std, self._list_callbacks = image_mean, image_std, list_callbacks
        self._hooks: list[RemovableHandle] = []
        self._columns: dict[str, Tensor] = {}

    def on_step_begin(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Listen to the objectives, if this step is one to show."""
        step = state.global_step + 1
        if state.is_world_process_zero and (step % args.picture_steps == 0 or step == state.max_steps):
            objectives = [module for module in model.modules() if isinstance(module, Objective)]
            self._hooks = [objective.register_forward_hook(self._keep) for objective in objectives]

    def _keep(self, objective: Objective, inputs: tuple[Any, Any, Views], output: LossOutput) -> None:
        """Copy the first images, which would be gone when the step is over."""
        if output.pictures is None:
            return
        crops = inputs[2].global_crops
        shown = {"view 1": crops[0], "view 2": crops[-1], **output.pictures()}
        self._columns |= {title: images[:ROWS].detach().clone() for title, images in shown.items()}

    def on_step_end(  # type: ignore[override]
        self, args: EquiSSLTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what was kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, columns, self._columns = [], self._columns, {}
        if not columns:
            return
        images = [(title, denormalize(value, self._mean, self._std)) for title, value in columns.items()]
        sheet = picture_sheet(images, ROWS)
        try:
            with replacing(Path(str(args.output_dir)) / PICTURES_FILE) as staging:
                sheet.save(staging)
        except OSError as error:  # a full disk: training weighs more
            logger.warning(f"{PICTURES_FILE} cannot be written in {args.output_dir} ({error}). The run goes on.")
        for callback in self._list_callbacks():
            try:
                _show(callback, sheet, state.global_step)
            except Exception as error:  # trackers raise whatever their network or disk does
                tracker = type(callback).__name__.removesuffix("Callback")
                logger.warning(f"{tracker} does not take {PICTURES_FILE} ({error}). The run goes on.")


def _show(callback: Any, sheet: Image.Image, step: int) -> None:
    """Hand a picture to a tracker, if the callback is that of one which shows images."""
    name = "reconstructions"
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")
    elif isinstance(callback, TrackioCallback):
        tracker = callback._trackio
        tracker.log({name: tracker.Image(np.asarray(sheet)), "train/global_step": step})
    elif isinstance(callback, WandbCallback) and callback._wandb is not None:
        callback._wandb.log({name: callback._wandb.Image(sheet), "train/global_step": step})
