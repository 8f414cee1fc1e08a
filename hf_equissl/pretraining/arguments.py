"""Arguments of a pretraining run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available, logging

from ..distributed.engines import check_engine, load_models_whole
from ..utils.devices import Precision, choose_device, choose_precision
from .argument_checks import check_fields

logger = logging.get_logger(__name__)
LARS_NAME = "lars"


@dataclass
class EquiSSLTrainingArguments(TrainingArguments):
    r"""``transformers.TrainingArguments`` with what self-supervised pretraining needs beside it.

    Learning rate. Papers state a base value and a rule: ``learning_rate = base_learning_rate * s(batch / reference)``
    with the *global* batch (per device x processes x accumulation) and s linear (iBOT, SIE: reference 256) or the
    square root (DINOv2: reference 1024). Without ``base_learning_rate``, ``learning_rate`` is used as it stands.

    Args:
        base_learning_rate: Learning rate at the reference batch; sets ``learning_rate``.
        learning_rate_scaling: "linear", "sqrt" or "none".
        learning_rate_reference_batch: Global batch at which the base value holds.
        picture_steps: Every so many steps, and in the last, keep what objectives paint in ``reconstructions.png``
            and show it in trackers (``pictures``); 0: never.
        run_report: Write ``report.md`` into the output folder when the run has ended (``running.run_report``).
        monitor_features: Log feature standard deviation and effective rank at every logging step.
        weight_decay_end: Weight decay follows half a cosine from ``weight_decay`` to this; ``None``: constant.
        teacher_momentum: The EMA teacher's momentum in the first step. Without a teacher it is not used.
        teacher_momentum_end: What that momentum approaches by the last step, along half a cosine.
        epoch_steps: Steps of an epoch, for what is stated in epochs (temperatures, held layers). ``None``: those of a
            pass over the data; DINOv2 has 1250, whatever the data.
        layer_decay: Learning rate of a block, relative to the block above it (``optimizer.parameter_group``).
        patch_embedding_lr_multiplier: Times the patch embedding's learning rate, beside ``layer_decay``.
        freeze_last_layer_epochs: The prototypes stay as they are for so many epochs.
        freeze_last_layer_by: "learning_rate", which is 0 meanwhile (DINOv2), or "gradient", which is dropped (DINO,
            iBOT): there the optimizer's moments start only afterwards. DeepSpeed needs the first.
        grad_clipping: What ``max_grad_norm`` bounds: "global", all gradients together; "parameter", each tensor (iBOT);
            "module", encoder, heads, stem and decoders apart (DINOv2).
        decay_one_dimensional: Weight decay acts on biases and other parameters with one dimension, too (MoCo-v3).
        freeze_patch_embedding: The patch embedding stays as it was initialised, which steadies ViTs (MoCo-v3).
        optim: One of transformers' optimizers, or "lars" (``lars.LARS``), whose ``momentum`` and ``trust_coefficient``
            are set by ``optim_args``, e.g. "momentum=0.9,trust_coefficient=0.001". DeepSpeed has no place for LARS.
        bf16: "auto" becomes true where the device of the run has units for bf16, unless ``fp16`` is on, and false
            elsewhere (``utils.devices.choose_precision``): once built, the arguments say what runs.

    With ``push_to_hub`` the run is published as ``hf_equissl.hub.build_repository`` lays it out: by
    ``trainer.push_to_hub()`` after training (``hub_strategy`` "end"), with "every_save" also after each checkpoint.
    Its licence is ``hub_license``, with ``hub_license_name``, ``hub_license_link`` and ``hub_license_file``, the
    ``license``, ``license_name``, ... of that function.

    Defaults that differ from ``TrainingArguments``: cosine schedule, weight decay 0.05, no gradient clipping,
    incomplete batches dropped, workers kept between epochs, losses logged every 10 steps and never replaced when they
    are not finite, columns kept, ``hub_strategy`` "end", CPU and gloo chosen where there is no accelerator, no
    ``find_unused_parameters``, no broadcast of buffers (centers and statistics are made from all processes' batches).
    With ``bf16`` or ``fp16``, what stays in fp32 (prototypes) is multiplied in TF32 on GPUs that have it, unless
    ``tf32`` says otherwise.

    Raises:
        ValueError: for an unknown scaling rule, a number out of its range, a setting that pretraining cannot have, or
            a launch that contradicts the arguments (``engines.check_engine``).
    """

    base_learning_rate: float | None = None
    learning_rate_scaling: str = "linear"
    learning_rate_reference_batch: int = 256
    picture_steps: int = 500
    run_report: bool = True
    monitor_features: bool = True
    weight_decay_end: float | None = None
    teacher_momentum: float = 0.996
    teacher_momentum_end: float = 1.0
    epoch_steps: int | None = None
    layer_decay: float = 1.0
    patch_embedding_lr_multiplier: float = 1.0
    freeze_last_layer_epochs: float = 0.0
    freeze_last_layer_by: str = "learning_rate"
    grad_clipping: str = "global"
    decay_one_dimensional: bool = False
    freeze_patch_embedding: bool = False
    hub_license: str | None = None
    hub_license_name: str | None = None
    hub_license_link: str | None = None
    hub_license_file: str | None = None
    optim: OptimizerNames | Literal["lars"] | str = TrainingArguments.optim

    bf16: bool | Literal["auto"] = False  # type: ignore[assignment]
    weight_decay: float = 0.05
    max_grad_norm: float = 0.0
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    dataloader_drop_last: bool = True
    dataloader_persistent_workers: bool | None = None  # type: ignore[assignment]
    remove_unused_columns: bool = False
    hub_strategy: HubStrategy | str = "end"
    label_names: list[str] | None = field(default_factory=list)
    ddp_broadcast_buffers: bool | None = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        self._validate()
        if not self.use_cpu and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 == "auto":
            device = choose_device("cpu" if self.use_cpu else "auto")
            self.bf16 = not self.fp16 and choose_precision("auto", device) == "bf16"
        check_engine(self)
        if self.use_cpu and self.ddp_backend is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.ddp_backend = "gloo"
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.use_cpu:
            self.dataloader_pin_memory = False
        elif self.tf32 is None and (self.bf16 or self.fp16) and is_torch_tf32_available():
            self.tf32 = True
        optim = self.optim
        if optim == LARS_NAME:  # the parent knows its own names only
            self.optim = TrainingArguments.optim
        super().__post_init__()
        if optim == LARS_NAME:
            self.optim = optim
        if cast(Any, torch.backends).fp32_precision == "tf32":
            # The same said in PyTorch's older words: parts of torch.compile still ask for them, and refuse a mixture.
            torch.set_float32_matmul_precision("high")
        if self.deepspeed_plugin is not None:
            load_models_whole()
        if self.n_gpu > 1:
            logger.warning("Only one of %d GPUs is used: start with `accelerate launch` to use all.", self.n_gpu)
            self._n_gpu = 1  # more would mean DataParallel, which cannot split views
        if not self.use_cpu and self.dataloader_pin_memory:
            # Else each copy of a batch waits for the step before.
            cast(AcceleratorConfig, self.accelerator_config).non_blocking = True
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.learning_rate_factor

    def _validate(self) -> None:
        check_fields(self)
        if self.grad_clipping != "global" and not self.max_grad_norm:
            raise ValueError(
                f"grad_clipping is {self.grad_clipping!r}, and max_grad_norm 0 clips nothing. Set max_grad_norm, "
                "e.g. to 3."
            )
        if self.deepspeed is not None and not self.deepspeed:
            raise ValueError(
                f"deepspeed is {self.deepspeed!r}, which asks for nothing. Name a configuration with a ZeRO stage, "
                "e.g. {zero_optimization: {stage: 2}}, or leave it out (null)."
            )
        if self.bf16 not in (True, False, "auto"):
            raise ValueError(f"bf16 must be true, false or auto, got {self.bf16!r}.")
        strategy = HubStrategy(self.hub_strategy)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy is {strategy.value!r}, which would upload pickled optimizer states. Use end or "
                "every_save: `pretraining/` in the repository holds what others need to go on."
            )

    @property
    def precision(self) -> Precision:
        """What autocast computes in; "fp32": there is none."""
        if self.bf16:
            return "bf16"
        return "fp16" if self.fp16 else "fp32"

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step: per device x processes x accumulation."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def epoch_multiple(self) -> int:
        """An epoch's images are a multiple of this: without an incomplete last step, unless that is wanted."""
        return self.global_batch_size if self.dataloader_drop_last else 1

    @property
    def learning_rate_factor(self) -> float:
        """What ``base_learning_rate`` is multiplied by."""
        ratio = self.global_batch_size / self.learning_rate_reference_batch
        return {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.learning_rate_scaling]
