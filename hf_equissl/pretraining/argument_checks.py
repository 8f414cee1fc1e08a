"""What ``EquiSSLTrainingArguments`` refuse: numbers out of range, names that mean nothing, settings without effect.

Tables, so that a field of transformers that nobody thought of is noticed by a test instead of in a run.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.training_args import trainer_log_levels

from ..utils.plain_values import shorten
from ..utils.suggestions import did_you_mean

if TYPE_CHECKING:
    from .arguments import EquiSSLTrainingArguments

_MOST = 2**31 - 1
# Closed intervals. A number that may be None is checked where it is not None.
RANGES: Mapping[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, _MOST),
    "num_train_epochs": (0, _MOST),
    "max_steps": (-1, _MOST),
    "learning_rate": (0, math.inf),
    "base_learning_rate": (0, math.inf),
    "learning_rate_reference_batch": (1, _MOST),
    "warmup_steps": (0, _MOST),
    "weight_decay": (0, math.inf),
    "weight_decay_end": (0, math.inf),
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "teacher_momentum": (0, 1),
    "teacher_momentum_end": (0, 1),
    "epoch_steps": (1, _MOST),
    "picture_steps": (0, _MOST),
    "layer_decay": (math.ulp(0), 1),
    "patch_embedding_lr_multiplier": (0, math.inf),
    "freeze_last_layer_epochs": (0, _MOST),
    "logging_steps": (0, _MOST),
    "save_steps": (math.ulp(0), _MOST),
    "save_total_limit": (1, _MOST),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, _MOST),
    "torch_empty_cache_steps": (1, _MOST),
    "ddp_bucket_cap_mb": (1, _MOST),
    "ddp_timeout": (1, _MOST),
}
_REMEDIES = {
    "save_steps": "To save nothing: save_strategy no.",
    "save_total_limit": "To keep all checkpoints, leave it out; to save nothing: save_strategy no.",
    "layer_decay": "1 means no decay.",
    "max_steps": "-1 counts num_train_epochs instead.",
    "dataloader_num_workers": "0 loads in the main process.",
}
_EVALUATES = "Pretraining has no evaluation of the Trainer: the section `monitor` measures during a run"
_COMMAND = "The command decides what is done"
_NO_TEXT = "It is made for language models"
_OWN_ORDER = "The order of images is this package's own, so that a run resumes exactly"
# Fields of transformers without effect in pretraining, or whose effect it cannot have, and why. Fine-tuning uses some.
WITHOUT_EFFECT: Mapping[str, str] = {
    "eval_strategy": _EVALUATES,
    "eval_steps": _EVALUATES,
    "eval_delay": _EVALUATES,
    "eval_on_start": _EVALUATES,
    "eval_do_concat_batches": _EVALUATES,
    "eval_use_gather_object": _EVALUATES,
    "eval_accumulation_steps": _EVALUATES,
    "per_device_eval_batch_size": _EVALUATES,
    "prediction_loss_only": _EVALUATES,
    "include_for_metrics": _EVALUATES,
    "batch_eval_metrics": _EVALUATES,
    "bf16_full_eval": _EVALUATES,
    "fp16_full_eval": _EVALUATES,
    "load_best_model_at_end": _EVALUATES,
    "metric_for_best_model": _EVALUATES,
    "greater_is_better": _EVALUATES,
    "do_train": _COMMAND,
    "do_eval": _COMMAND,
    "do_predict": _COMMAND,
    "local_rank": "The launcher gives it",
    "label_smoothing_factor": "There are no labels to smooth",
    "label_names": "Pretraining has none",
    "neftune_noise_alpha": _NO_TEXT,
    "use_cache": _NO_TEXT,
    "include_num_input_tokens_seen": _NO_TEXT,
    "average_tokens_across_devices": _NO_TEXT,
    "use_liger_kernel": _NO_TEXT,
    "liger_kernel_config": _NO_TEXT,
    "train_sampling_strategy": _OWN_ORDER,
    "length_column_name": _OWN_ORDER,
    "ignore_data_skip": _OWN_ORDER,
    "auto_find_batch_size": "The batch is part of the recipe: learning rate and steps follow from it. To find one that "
    "fits, use training/plan.py",
    "parallelism_config": "Engines come from the launcher: see training/accelerate_configs",
}
# Fields whose default is the only value that training here can have, and why.
_FIXED: Mapping[str, str] = {
    "hub_always_push": "Uploads would queue up. The next save publishes",
    "save_on_each_node": "All machines write into one shared folder",
    "remove_unused_columns": "The view pipeline reads every column",
    "logging_nan_inf_filter": "It would hide a loss that is not finite",
}
_NEED_METRICS = ("reduce_lr_on_plateau", "greedy")


def check_fields(args: EquiSSLTrainingArguments) -> None:
    """Check the fields, each by itself, before transformers reads them.

    Raises:
        ValueError: It names the field, its value, what was expected, and a remedy where there is one.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            remedy = f" {_REMEDIES[name]}" if name in _REMEDIES else ""
            raise ValueError(f"{name} must be {_describe(least, most, value)}, got {shorten(value)}.{remedy}")
    _check_default(vars(args), type(args), _FIXED)
    for name, valid in _CHOICES.items():
        value = getattr(args, name)
        if value is not None and value not in (choices := valid()):
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, got {shorten(value)}.{did_you_mean(value, choices)}"
            )
    for name in ("logging_steps", "save_steps"):
        if (value := getattr(args, name)) > 1 and value != int(value):
            raise ValueError(f"{name} must be a whole number of steps, or a share of them below 1, got {value}.")
    _check_loader(args)
    _check_compilation(args)


def check_effect(given: Mapping[str, Any], kind: type[EquiSSLTrainingArguments]) -> None:
    """Refuse settings of a recipe that would change nothing, or what pretraining cannot change.

    Args:
        given: Field -> value.
        kind: The class of the arguments, whose defaults may be repeated.

    Raises:
        ValueError: It names the field and the reason.
    """
    _check_default(given, kind, WITHOUT_EFFECT)
    if (schedule := given.get("lr_scheduler_type")) in _NEED_METRICS:
        raise ValueError(f"lr_scheduler_type is {schedule!r}, which follows a metric. {_EVALUATES}.")


def _check_default(given: Mapping[str, Any], kind: type[EquiSSLTrainingArguments], reasons: Mapping[str, str]) -> None:
    for field in fields(kind):
        if field.name in given and field.name in reasons:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if (value := given[field.name]) != default:
                raise ValueError(
                    f"{field.name} must stay {shorten(default)}, got {shorten(value)}. {reasons[field.name]}."
                )


def _describe(least: float, most: float, value: float) -> str:
    if not math.isfinite(value):
        return "a finite number"
    if (least, most) == (0, 1):
        return "between 0 and 1"
    above = "> 0" if least == math.ulp(0) else f">= {least}"
    below = "< 1" if most == math.nextafter(1, 0) else f"<= {most}"
    return above if value < least else f"{above} and {below}"


def _check_loader(args: EquiSSLTrainingArguments) -> None:
    """Refuse what belongs to loader processes where there are none; PyTorch would, when the first batch is read."""
    if args.dataloader_num_workers:
        return
    for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)!r}, and dataloader_num_workers 0 has no processes that load. Set "
                "dataloader_num_workers, e.g. to 8, or leave it out."
            )


def _check_compilation(args: EquiSSLTrainingArguments) -> None:
    if not args.torch_compile:
        for name in ("torch_compile_mode", "torch_compile_backend"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is set, and torch_compile is false. Set it to true, or leave {name} out.")
    elif args.torch_compile_backend in (None, "inductor") and not any(map(shutil.which, _compilers())):
        raise ValueError(
            "torch_compile needs a C++ compiler, and there is none. Install g++ or clang++, name yours in CXX, or set "
            "torch_compile to false."
        )


def _compilers() -> list[str]:
    return [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]


def _backends() -> list[str]:
    return sorted(name for name in torch._dynamo.list_backends(exclude_tags=None) if "TESTING" not in name)


def _modes() -> list[str]:
    return sorted(torch._inductor.list_mode_options())


_CHOICES: Mapping[str, Callable[[], list[str]]] = {
    "learning_rate_scaling": lambda: ["none", "linear", "sqrt"],
    "grad_clipping": lambda: ["global", "parameter", "module"],
    "freeze_last_layer_by": lambda: ["learning_rate", "gradient"],
    "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods,
    "log_level": lambda: list(trainer_log_levels),
    "log_level_replica": lambda: list(trainer_log_levels),
    "torch_compile_backend": _backends,
    "torch_compile_mode": _modes,
}
