"""EquiSSLTrainer: transformers' Trainer, told about views, loss parts and checkpoints that are whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, IntervalStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..checkpoints import ARGUMENTS_FILE, checkpoint_step
from ..checkpoints.portable import PortableStates
from ..data import ImageViewDataset, SkippedImages, StreamingViewDataset
from ..distributed.agreement import gather_objects, leave_to_main
from ..distributed.engines import (
    Engine,
    check_same,
    find_asked_engine,
    find_granted_engine,
    find_running_engine,
    fp32_sharding,
)
from ..objectives.progress import TrainingProgress
from ..utils.files import write_text
from ..views.collator import ViewCollator
from ..views.pipelines import ViewPipeline
from .arguments import LARS_NAME, EquiSSLTrainingArguments
from .callbacks import EquiSSLProgressCallback, ScheduleCallback
from .compilation import compile_layers
from .data_feed import DataFeed
from .deepspeed import adapt_config, clip_by_parts, restricted_loading
from .log_lines import bound_lines
from .loss_history import LossHistory
from .model import EquiSSLForPreTraining
from .optimizer import (
    check_last_layer,
    choose_optimizer,
    chooses_own_groups,
    clip_gradients,
    clipping_parts,
    freeze_parameters,
    keep_own_settings,
    need_own_groups,
    optimizer_groups,
    own_settings,
    parameter_rules,
)
from .pictures import PictureCallback
from .run_record import RunRecordCallback, new_record
from .schedules import last_layer_is_held

logger = logging.get_logger(__name__)


class RunPublisher(Protocol):
    """What a Trainer is handed to publish its run with: ``hf_equissl.running.publishing.Publisher`` does it."""

    def open(self, name: str, *, token: str | None, revision: str | None, private: bool | None) -> str:
        """Create the repository ``name`` where it does not exist; returns its full id."""

    def start(self, commit_message: str, *, revision: str | None = None, **options: Any) -> Future[Any]:
        """Begin to publish the run as it stands on disk; the future holds the commit, or what went wrong."""

    def callback(self, start: Callable[[str], Future[Any]]) -> TrainerCallback:
        """Make the callback that calls ``start`` with a commit message after each checkpoint."""


class EquiSSLTrainer(DataFeed, PortableStates, Trainer):
    """``transformers.Trainer`` for ``EquiSSLForPreTraining``. What differs from the parent:

    - the collated batch (uint8 crops and random draws) becomes ``Views`` on the training device (``pipeline``);
    - samples are addressed as (epoch, index), so that views do not depend on workers, ranks or a resume;
    - named loss parts are averaged over steps and ranks and logged; a non-finite one stops the run before it is saved;
    - the optimizer's groups follow ``optimizer.parameter_group``: no weight decay on 1-D parameters, layer-wise
      learning rates; a resumed run goes on with the settings that it is given, not with those of its checkpoint;
    - temperatures, weight decay and the teacher follow their schedules (``ScheduleCallback``);
    - gradients are clipped together, per tensor or per module (``grad_clipping``);
    - checkpoints are complete-marked, and go on under another engine or number of processes (``PortableStates``);
    - a stream goes on where a checkpoint left it, and waiting for data shows in the log (``DataFeed``);
    - ``run.json`` beside the checkpoints says what the run was (``RunRecord``);
    - ``push_to_hub`` publishes the run, in one commit, by the ``publisher`` that it was given.

    Args:
        pipeline: Turns a collated batch into ``Views``.
        skipped_images: Counts images that do not decode and stops the run above its share.
        publisher: Needed with ``push_to_hub``.

    Raises:
        ValueError: A schedule is stated in epochs and the data is a stream without ``epoch_steps``; or a setting cannot
            act on this model, optimizer or launcher.
        NonFiniteLossError: from ``train``, naming the step, the part, and the last good checkpoint.
        TooManyBadImages: from ``train``.
        PublishError: with ``push_to_hub``, from the constructor: the repository cannot be created.
    """

    args: EquiSSLTrainingArguments
    has_begun = False  # whether a forward pass went through; until then, what fails is a matter of settings
    # The parent sets both to None and says no more of their types.
    hub_model_id: Any
    push_in_progress: Any

    def __init__(
        self,
        model: EquiSSLForPreTraining,
        args: EquiSSLTrainingArguments,
        pipeline: ViewPipeline,
        train_dataset: ImageViewDataset | StreamingViewDataset,
        skipped_images: SkippedImages | None = None,
        publisher: RunPublisher | None = None,
        **kwargs: Any,
    ) -> None:
        self.publisher = publisher
        if args.push_to_hub:
            self._require_publisher()
        freeze_parameters(model, args)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=ViewCollator(pipeline), **kwargs
        )
        self._check_settings(model, stream=isinstance(train_dataset, IterableDataset))
        self.pipeline = pipeline
        self.skipped_images = skipped_images or SkippedImages()
        self.history = LossHistory(averages=args.logging_strategy != IntervalStrategy.NO)
        # Drop path draws from the global generator, which the parent seeds alike on every process.
        torch.manual_seed(args.seed + args.process_index)
        self.schedules = ScheduleCallback()
        self.add_callback(self.schedules)
        record = new_record(
            args,
            data=train_dataset.source.name,
            num_images=train_dataset.source.num_rows,
            image_size=pipeline.image_size,
            image_mean=pipeline.image_mean,
            image_std=pipeline.image_std,
            data_fingerprint=train_dataset.source.fingerprint(),
        )
        self.run_record = RunRecordCallback(record)
        self.add_callback(self.run_record)
        if args.picture_steps:
            mean, std = pipeline.image_mean, pipeline.image_std
            self.add_callback(PictureCallback(mean, std, lambda: self.callback_handler.callbacks))
        if publisher is not None and args.push_to_hub and args.hub_strategy == HubStrategy.EVERY_SAVE:
            self.add_callback(publisher.callback(self._start_push))  # after run.json is written
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(EquiSSLProgressCallback())

    def _check_settings(self, model: EquiSSLForPreTraining, stream: bool) -> None:
        """Refuse what would fail at the first step, or do nothing and say nothing."""
        args = self.args
        if stream:
            progress = TrainingProgress(0, max(1, args.max_steps), args.epoch_steps)
            model.begin_step(progress)
            last_layer_is_held(args, progress)
        elif len(self.train_dataset) < args.epoch_multiple:  # type: ignore[arg-type]
            raise ValueError(
                f"{len(self.train_dataset)} images are fewer than one optimizer step takes, "  # type: ignore[arg-type]
                f"{args.global_batch_size}. Use more images, or a smaller batch."
            )
        check_last_layer(model, args)
        if self.is_deepspeed_enabled and args.optim == LARS_NAME:
            raise ValueError(
                "optim is 'lars', which DeepSpeed cannot: it steps on pieces of parameters, and LARS needs the "
                "length of whole ones. Use FSDP2 or DDP, or another optimizer."
            )
        held = args.freeze_last_layer_epochs > 0
        if self.is_deepspeed_enabled and held and args.freeze_last_layer_by == "gradient":
            raise ValueError(
                "freeze_last_layer_by is 'gradient', which DeepSpeed cannot: its optimizer has one state for many "
                "parameters. Set it to learning_rate (--training.freeze_last_layer_by learning_rate), or use FSDP2 or "
                "DDP."
            )

    # ---- engine ----

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        given = super()._build_accelerator_args(**kwargs)
        given["dynamo_plugin"] = TorchDynamoPlugin(backend="no")  # layers are compiled here, in their places
        if find_asked_engine(self.args) is Engine.FSDP2:
            given["fsdp_plugin"] = fp32_sharding(given.get("fsdp_plugin"))
        return given

    def create_accelerator_and_postprocess(self) -> None:
        """Create as the parent does, and refuse another engine than the one that was asked for."""
        super().create_accelerator_and_postprocess()
        check_same(find_asked_engine(self.args), find_granted_engine(self.accelerator), self.accelerator.device.type)
        if self.is_deepspeed_enabled:
            adapt_config(self.accelerator, self.args)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with restricted_loading() if self.is_deepspeed_enabled else nullcontext():
            prepared = super()._prepare_for_training(*args, **kwargs)
        running = find_running_engine(self.accelerator, self.model_wrapped)
        check_same(find_asked_engine(self.args), running, self.accelerator.device.type)
        if running.is_deepspeed and self.args.grad_clipping != "global":
            clip_by_parts(self.accelerator, cast(EquiSSLForPreTraining, self.model), self.args)
        if self.args.torch_compile:
            compile_layers(self.model_wrapped, self.args)
        return prepared

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Return autocast under FSDP2; elsewhere accelerate puts it into the model's forward pass."""
        if find_asked_engine(self.args) is Engine.FSDP2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    # ---- data ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.skipped_images.take_from(inputs, judge=self.args.world_size == 1)
        batch = super()._prepare_inputs(inputs)
        with torch.no_grad():
            return {"views": self.pipeline(batch)}

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and remember the loss parts. One process on a CPU checks them at once: it waits for nobody."""
        output = model(**inputs, monitor=self.args.monitor_features and self._next_step_logs())
        self.has_begun = True
        self.history.add(self.state.global_step + 1, output.loss, output.logs)
        if output.loss.device.type == "cpu" and self.args.world_size == 1:
            self.history.check(self._last_checkpoint)
        return (output.loss, output) if return_outputs else output.loss

    def _next_step_logs(self) -> bool:
        step, every = self.state.global_step + 1, self.state.logging_steps
        return (bool(every) and step % every == 0) or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss parts' mean since the last log to the parent's entry; keep the list of entries short."""
        if "loss" in logs:
            logs |= self.history.drain(self._last_checkpoint)
            logs |= self.throughput.drain()
            logs |= self.schedules.values
            self.skipped_images.exchange(gather_objects)
            logs["images_skipped"] = self.skipped_images.count
        super().log(logs, start_time)
        bound_lines(self.state.log_history)

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the parent's optimizer with the groups of ``optimizer.optimizer_groups``.

        Raises:
            ValueError: The optimizer chooses its groups itself, and a setting needs ours.
        """
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            kind, given = self.optimizer_cls_and_kwargs or choose_optimizer(module, self.args)
            if chooses_own_groups(kind, given):
                if settings := need_own_groups(self.args):
                    raise ValueError(
                        f"The optimizer {self.args.optim} chooses its parameter groups itself, which {settings[0]} "
                        "cannot reach. Use another, e.g. optim: adamw_torch, or leave that setting out."
                    )
            else:
                given = {**given, "params": optimizer_groups(module, self.args)}
            self.optimizer_cls_and_kwargs = kind, given
        optimizer = super().create_optimizer(model)
        self._own_settings = own_settings(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            keep_own_settings(cast(Any, self.optimizer), cast(Any, self.lr_scheduler), self._own_settings)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """List parameters with weight decay, for optimizers that choose their groups themselves."""
        return [rule.name for rule in parameter_rules(model, self.args) if rule.group.decayed]  # type: ignore[arg-type]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip by the chosen rule; the norm of all gradients together before that."""
        if self.args.grad_clipping == "global" or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        own = cast(EquiSSLForPreTraining, self.model)
        return clip_gradients(clipping_parts(own, self.args.grad_clipping), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the parent's in steps that are logged: without clipping it takes one more pass over all gradients."""
        return super()._get_grad_norm(model, grad_norm) if self._next_step_logs() else grad_norm

    # ---- checkpoints ----

    def check_finite(self) -> None:
        """Raise ``NonFiniteLossError`` on all processes if a loss or a weight is not finite on one of them."""
        model = cast(nn.Module, self.model)
        self.history.check_with_weights(model, self.state.global_step, self._last_checkpoint, self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, config and arguments as JSON: the parent would pickle the arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with self.writing():
            folder.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder, state_dict=state_dict)
            write_text(folder / ARGUMENTS_FILE, self.args.to_json_string())

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository ``hub_model_id``, on the main process; by default it is called like the output folder.

        Raises:
            PublishError: it cannot be created, with the reason.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        self.hub_model_id = self._require_publisher().open(
            args.hub_model_id or Path(str(args.output_dir)).absolute().name,
            token=args.hub_token if token is None else token,
            revision=args.hub_revision,
            private=args.hub_private_repo if private is None else private,
        )
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publish the run as it stands: its newest checkpoint, or one that is written now. Call it on every process.

        Args:
            commit_message: Title of the commit.
            blocking: Wait for the end of the upload.
            token, revision, private: Used in place of ``hub_token``, ``hub_revision`` and ``hub_private_repo``.
            **kwargs: Options of ``hf_equissl.hub.build_repository``: ``results``, ``license``, ``parts``, ...

        Returns:
            On the main process the commit, or its future if not ``blocking``; ``None`` on the others, which wait.

        Raises:
            ValueError: the repository cannot be built; as ``PublishError``: it cannot be uploaded.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        newest = gather_objects(self._last_checkpoint())[0]  # the processes may see the folder at different times
        if self.state.global_step and (newest is None or checkpoint_step(newest) != self.state.global_step):
            self._save_checkpoint(self.model_wrapped, trial=None)

        def push() -> Any:
            super(EquiSSLTrainer, self)._finish_current_push()
            if self.hub_model_id is None or (token, private) != (None, None):
                self.init_hf_repo(token=token, private=private)
            future = self._start_push(commit_message or "End of training", revision=revision, **kwargs)
            return future.result() if blocking else future

        return leave_to_main(push)

    def _require_publisher(self) -> RunPublisher:
        if self.publisher is None:
            raise ValueError(
                "This Trainer has nothing to publish with. Build it with "
                "publisher=hf_equissl.running.publishing.Publisher(output_dir)."
            )
        return self.publisher

    def _finish_current_push(self) -> None:
        # A run that is asked to stop has no time for an upload. At the end of a whole run the other processes wait for
        # it here, since the exchange that comes next would time out.
        if self.args.push_to_hub and self.state.global_step >= self.state.max_steps:
            leave_to_main(super()._finish_current_push)

    def _start_push(self, commit_message: str, **options: Any) -> Any:
        if "license" not in options:  # who says another one says all of it
            names = ("license", "license_name", "license_link", "license_file")
            options |= {name: getattr(self.args, f"hub_{name}") for name in names} | options
        future = self._require_publisher().start(commit_message, **options)
        self.push_in_progress = PushInProgress([future])  # type: ignore[arg-type]  # the end of training waits for it
        return future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: a checkpoint is not in its place yet. ``PublishCallback`` pushes later."""
