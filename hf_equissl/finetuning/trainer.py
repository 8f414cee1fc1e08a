"""transformers' Trainer, told about tasks, layer-wise learning rates, and checkpoints that can be resumed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalPrediction

from ..checkpoints import ARGUMENTS_FILE, WholeCheckpoints
from ..data import SkippedImages, TooManyBadImages
from ..distributed.agreement import gather_objects
from ..distributed.signals import guard_workers
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.loss_history import LossHistory
from ..utils.files import write_text
from .samples import EvaluationDataset, TaskCollator, TaskDataset
from .tasks.base import Splits, Task
from .weights import num_blocks, save_weights

_BLOCK = re.compile(r"\.layers?\.(\d+)\.")


class FineTuningTrainer(WholeCheckpoints, Trainer):
    """``transformers.Trainer`` for a ``Task``. What differs from the parent:

    - training samples are addressed as (epoch, index), and the task makes them into a batch and a loss;
    - at evaluation the task judges each batch, and measures once all batches of all processes are judged;
    - weight decay spares what has one dimension; ``layer_decay`` makes lower blocks learn slower;
    - a frozen encoder stays in evaluation mode;
    - a checkpoint is complete or absent, and what is not finite stops the run before it is saved
      (``WholeCheckpoints``);
    - a checkpoint holds the names that the weights have in memory: the parent reads it with a plain
      ``load_state_dict``, which finds nothing under the names that DINOv2's and ViT's files otherwise have.

    Args:
        model: What the task made, or a PEFT model around it.
        args: Arguments; ``layer_decay`` is read here.
        task: Bound to what its encoder reads.
        splits: What the task's ``load`` returned.
        skipped_images: Counts training images that do not decode.
        encoder: The encoder in it.
        keep_best: Never delete the checkpoint with the best primary metric.
        frozen: Whether none of the encoder's weights is trained.

    Raises:
        NonFiniteLossError, TooManyBadImages: from ``train``.
    """

    args: EquiSSLTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: EquiSSLTrainingArguments,
        task: Task,
        splits: Splits,
        *,
        skipped_images: SkippedImages,
        encoder: nn.Module,
        keep_best: bool = False,
        frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=TaskDataset(task, splits.train, args.seed),
            eval_dataset=EvaluationDataset(task, splits.test),
            data_collator=TaskCollator(task),
            compute_metrics=self._measure,
            **kwargs,
        )
        self.task, self.skipped_images = task, skipped_images
        self.encoder, self.keep_best, self.frozen = encoder, keep_best, frozen
        self.loss_is_scaled_for_ga = False
        self.history = LossHistory()
        # Dropout draws from the global generator, which the parent seeds alike on every process.
        torch.manual_seed(args.seed + args.process_index)

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return dataset.sampler(multiple=self.args.epoch_multiple)

    def get_train_dataloader(self) -> DataLoader:
        """Build the parent's loader, whose workers leave a scheduler's signals to this process."""
        return guard_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Build a loader of test samples in order.

        A loader draws a seed for its workers. Were that from the global generator, dropout after an evaluation would
        draw other numbers than in a run that goes on from a checkpoint saved before it.
        """
        loader = DataLoader(
            self.eval_dataset if eval_dataset is None else eval_dataset,  # type: ignore[arg-type]
            generator=torch.Generator(),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return guard_workers(self.accelerator.prepare(loader))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Build a loader as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "pixel_values" in inputs:  # ready: prediction_step and compute_loss both come here
            return inputs
        self.skipped_images.take_from(inputs, judge=self.args.world_size == 1)
        batch = super()._prepare_inputs(inputs)
        with torch.no_grad():
            return self.task.to_inputs(batch)

    # ---- loss and metrics ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Let the task compute its loss, and remember it."""
        if self.frozen:
            self.encoder.eval()
        loss, output, parts = self.task.loss(model, inputs)
        if model.training:
            self.history.add(self.state.global_step + 1, loss, parts)
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Judge one batch; what a sample is judged by stands beside whether it is missing."""
        missing = inputs["missing"].to(self.args.device)
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, batch, return_outputs=True)
            predictions, targets = (None, None) if prediction_loss_only else self.task.judge(output, batch)
        return loss.detach(), nested_detach(predictions), (nested_detach(targets), missing)

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the task's metrics over the samples that decode."""
        labels: Any = prediction.label_ids  # the third value that prediction_step returned
        targets, missing = labels
        bad, allowed = int(missing.sum()), self.skipped_images.max_share
        if bad > allowed * len(missing):
            raise TooManyBadImages(
                f"{bad} of {len(missing)} test images did not decode; {allowed:.1%} are allowed. Repair or remove the "
                "files that are named above, or raise --max_bad_share."
            )
        known = missing == 0
        return self.task.measure(*(_rows(values, known) for values in (prediction.predictions, targets)))

    def check_finite(self) -> None:
        """Raise ``NonFiniteLossError`` on all processes if a loss or a weight is not finite on one of them."""
        model = cast(nn.Module, self.model)
        self.history.check_with_weights(model, self.state.global_step, self._last_checkpoint, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Check the losses since the last log, and add the means of their parts, before the parent reports the rest."""
        if "loss" in logs:
            logs |= self.history.drain(self._last_checkpoint)
            self.skipped_images.exchange(gather_objects)
        super().log(logs, start_time)

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the parent's optimizer with the groups of ``parameter_groups``."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            kind, given = self.get_optimizer_cls_and_kwargs(self.args, module)
            groups = parameter_groups(module, self.args, self.encoder)
            self.optimizer_cls_and_kwargs = kind, {**given, "params": groups}
        return super().create_optimizer(model)

    # ---- checkpoints ----

    @property
    def best_checkpoint(self) -> str | None:
        """The first checkpoint among those with the best primary metric so far, if the best are kept."""
        # Not the parent's bookkeeping, which remembers paths: checkpoints move into place, and a run may be moved.
        key, sign = f"eval_{self.task.primary.name}", 1 if self.task.primary.higher_is_better else -1
        measured = [entry for entry in self.state.log_history if key in entry]
        if not self.keep_best or not measured:
            return None
        step = max(measured, key=lambda entry: sign * entry[key])["step"]
        return os.path.join(str(self.args.output_dir), f"checkpoint-{step}")

    def load_weights(self, checkpoint: str) -> None:
        """Take the weights of a checkpoint, not its optimizer."""
        self._load_from_checkpoint(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights under the names that they have in memory, config, and arguments as JSON."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        else:
            save_weights(self.task, model, folder)
        write_text(folder / ARGUMENTS_FILE, self.args.to_json_string())


def _rows(values: Any, chosen: Any) -> Any:
    """Choose samples in nested arrays."""
    if isinstance(values, Mapping):
        return {name: _rows(value, chosen) for name, value in values.items()}
    return tuple(_rows(value, chosen) for value in values) if isinstance(values, (tuple, list)) else values[chosen]


def parameter_groups(model: nn.Module, args: EquiSSLTrainingArguments, encoder: nn.Module) -> list[dict[str, Any]]:
    """Group the trained weights for the optimizer by ``learning_rate``, ``weight_decay`` and ``layer_decay``.

    With layer decay d, block i of the encoder's n has the learning rate times d^(n - i), its embeddings d^(n + 1), and
    everything else (final norm, stem, head with layers of its own) 1, as in BEiT and MAE. Weight decay spares biases
    and what has one dimension.

    Raises:
        ValueError: layer decay, and the encoder's blocks are not as many in a row as its configuration says.
    """
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    blocks, inside = num_blocks(encoder), {id(parameter) for parameter in encoder.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        power, of_encoder = 0, id(parameter) in inside
        if of_encoder and (block := _BLOCK.search(name)):
            power = blocks - int(block[1])
            if power < 1 and args.layer_decay < 1:
                raise ValueError(
                    f"--layer_decay {args.layer_decay:g}: the blocks of {type(model).__name__} do not follow one "
                    f"another as in a ViT ({name}, {blocks} blocks). Give --layer_decay 1 and a smaller "
                    "--learning_rate."
                )
        elif of_encoder and ".embeddings." in name:
            power = blocks + 1
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decayed = sum(side > 1 for side in shape) > 1 and not name.endswith(".bias")
        members.setdefault((args.layer_decay**power, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": args.learning_rate * scale, "weight_decay": args.weight_decay if decayed else 0.0}
        for (scale, decayed), parameters in sorted(members.items(), key=lambda item: (-item[0][0], not item[0][1]))
    ]
