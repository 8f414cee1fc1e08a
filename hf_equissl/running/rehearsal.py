"""A rehearsal of what a run builds only once it trains: mistakes are found before the first step, in one sentence."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import get_scheduler

from ..planning.arithmetic import Schedule
from ..pretraining.arguments import LARS_NAME, EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining
from ..pretraining.optimizer import choose_optimizer, chooses_own_groups, optim_arguments, optimizer_groups
from .stops import refuse_errors

_STEPS = 3
_WITHOUT_SETTINGS = ("constant", "constant_with_warmup")
_USUAL_ATTENTION = (None, "sdpa", "eager")


def rehearse(args: EquiSSLTrainingArguments, model: EquiSSLForPreTraining, plan: Schedule) -> None:
    """Build the optimizer and the learning-rate schedule, take a few of their steps, and try the kernels asked for.

    Args:
        args: Arguments of the run.
        model: A model without weights: optimizers get parameters of four numbers in their place.
        plan: Says how long the run is.

    Raises:
        RecipeError: Something of them fails; it has the words of what failed.
    """
    with refuse_errors("training: the optimizer"):
        optimizer = _build_small_optimizer(args, model)
    steps = plan.steps or 1000  # a plan without data leaves the length open
    with refuse_errors("training: the loader"):
        _build_loader(args)
    with refuse_errors("training: the learning rate's schedule"):
        if args.lr_scheduler_kwargs and _word(args.lr_scheduler_type) in _WITHOUT_SETTINGS:
            raise ValueError(f"{_word(args.lr_scheduler_type)} has no settings: leave lr_scheduler_kwargs out.")
        scheduler: Any = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, cast(Any, args.lr_scheduler_kwargs)
        )
        _check_rates(scheduler, args.learning_rate, steps)
    with refuse_errors("training: the optimizer"):
        for _ in range(_STEPS):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            scheduler.step()
    _try_kernels(args, model)


def _build_small_optimizer(args: EquiSSLTrainingArguments, model: EquiSSLForPreTraining) -> torch.optim.Optimizer:
    """Build the run's optimizer on small parameters, in the run's groups."""
    kind, given = choose_optimizer(model, args)
    if chooses_own_groups(kind, given):  # it has taken the model's parameters, which have no memory here
        return torch.optim.SGD([_make_small_parameter(args)], lr=args.learning_rate)
    for name, value in optim_arguments(args).items() if args.optim != LARS_NAME else ():
        if not _is_read(name, args, model, given):
            raise ValueError(f"optim_args: {name}={value} changes nothing in {_word(args.optim)}. Leave it out.")
    if args.optim_target_modules is not None:
        raise ValueError(f"optim_target_modules changes nothing in {_word(args.optim)}. Leave it out.")
    groups = [{**group, "params": [_make_small_parameter(args)]} for group in optimizer_groups(model, args)]
    optimizer: torch.optim.Optimizer = kind(groups, **given)
    return optimizer


def _is_read(name: str, args: EquiSSLTrainingArguments, model: EquiSSLForPreTraining, given: dict[str, Any]) -> bool:
    """Whether the optimizer reads ``name`` of ``optim_args``: another word in its place fails, or gives another one.

    Without ``name`` it may be the same one, since its default may be repeated.
    """
    pairs = optim_arguments(args)
    for tried in ({key: value for key, value in pairs.items() if key != name}, {**pairs, name: "no_such_word"}):
        others = copy.copy(args)
        others.optim_args = ",".join(f"{key}={value}" for key, value in tried.items())
        try:
            if choose_optimizer(model, others)[1] != given:
                return True
        except (ValueError, TypeError, AttributeError, KeyError):
            return True
    return False


def _make_small_parameter(args: EquiSSLTrainingArguments) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2, 2, device=args.device))


def _build_loader(args: EquiSSLTrainingArguments) -> None:
    """Let PyTorch check the settings of the loader; no process starts before the first batch."""
    DataLoader(
        cast(Any, [0]),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        persistent_workers=bool(args.dataloader_persistent_workers),
        pin_memory=args.dataloader_pin_memory,
    )


def _check_rates(scheduler: Any, rate: float, steps: int) -> None:
    """Refuse a schedule with a learning rate that is negative or not finite, at a hundred steps of the run."""
    if not isinstance(scheduler, LambdaLR):
        return
    for step in sorted({0, 1, steps - 1, *(steps * part // 100 for part in range(100))}):
        if not (0 <= (value := float(rate * scheduler.lr_lambdas[0](step))) < math.inf):
            raise ValueError(
                f"lr_scheduler_kwargs and warmup_steps give the learning rate {value:g} at step {step} of {steps}."
            )


def _try_kernels(args: EquiSSLTrainingArguments, model: EquiSSLForPreTraining) -> None:
    """Run one block with an attention that is not PyTorch's, and one addition by a compiler that is not its own."""
    kernel = model.config.encoder_config._attn_implementation
    if kernel not in _USUAL_ATTENTION:
        with refuse_errors(f"model.attn_implementation {kernel!r} does not run here"):
            config = copy.deepcopy(model.config.encoder_config)
            config.num_hidden_layers, config.cls_insertion_layer = 1, 0
            encoder = type(model.student)._from_config(config, attn_implementation=kernel).to(args.device).train()
            side = config.patch_side
            pixels = torch.zeros(1, config.num_channels, *(side * count for count in config.grid_size))
            half = torch.float16 if args.fp16 else torch.bfloat16
            with torch.autocast(args.device.type, half, enabled=bool(args.fp16 or args.bf16)):
                encoder(pixels.to(args.device)).last_hidden_state.float().sum().backward()
    if args.torch_compile and args.torch_compile_backend != "inductor":
        with refuse_errors(f"training.torch_compile_backend {args.torch_compile_backend!r} does not run here"):
            add = torch.compile(lambda tensor: tensor + 1, backend=str(args.torch_compile_backend))
            add(torch.zeros(2, device=args.device))


def _word(choice: Any) -> str:
    """Return the word of a recipe for a choice that transformers may have turned into an enum."""
    return str(getattr(choice, "value", choice))
