"""Which weights of a model are its encoder's, which its head's, and which of them are trained."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .samples import TaskDataset
from .tasks.base import Splits, Task
from .tasks.dense import save_plain

# Files of a saved model or adapter beside those of an encoder.
SAVED_BESIDE = (
    "README.md",
    "results.json",
    "finetuning.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
# Parts of an encoder that no head reads.
_UNREAD = ("decoder.", "pooler.")
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")


def architecture_of(config: Any) -> dict[str, Any]:
    """Return what decides whether weights of one encoder fit another."""
    return {name: getattr(config, name, None) for name in _ARCHITECTURE}


def num_blocks(encoder: Any) -> int:
    """Return the number of blocks of an encoder; 0 where its config does not count them in a row."""
    return getattr(encoder.config, "num_hidden_layers", 0)


@torch.no_grad()
def encoder_digest(encoder: nn.Module) -> str:
    """Compute SHA-256 over the names, shapes and values of an encoder's weights, without what no head reads."""
    sha = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.startswith(_UNREAD):
            data = tensor.detach().to("cpu", torch.float32).contiguous()
            sha.update(f"{name}{tuple(data.shape)}".encode())
            sha.update(data.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def head_names(model: nn.Module, encoder_name: str) -> list[str]:
    """Return the names of the modules with weights beside the encoder, each as far up as the encoder is not in it.

    Of lists and dictionaries of modules, which have no ``forward`` that PEFT could wrap, the modules in them.
    """
    path = encoder_name.split(".")
    names: list[str] = []
    for depth in range(len(path)):
        above = ".".join(path[:depth])
        for name, module in model.get_submodule(above).named_children():
            if name != path[depth]:
                names += _callable_modules(module, f"{above}.{name}" if above else name)
    return names


def _callable_modules(module: nn.Module, name: str) -> list[str]:
    """Return the name of a module with weights, or of those in it where it is a mere container."""
    if isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        return [found for key, inner in module.named_children() for found in _callable_modules(inner, f"{name}.{key}")]
    return [name] if any(True for _ in module.parameters()) else []


def freeze_unused(task: Task, model: nn.Module, splits: Splits) -> None:
    """Take weights out of training that the loss does not depend on: mask tokens, stems and poolers nobody reads.

    Found by one backward pass over the first sample, so that data, task and model are tried before anything is trained.
    Such weights would only decay, and DDP would wait for their gradients.

    Raises:
        ValueError: from the model, when it cannot read images of this size.
    """
    sample = TaskDataset(task, splits.train, seed=0)[0, 0]
    model.eval()
    task.loss(model, task.to_inputs(task.collate([sample]))).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count (trained, all) weights; the untrained copy of the head that PEFT keeps is not counted."""
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if ".original_module." not in name]
    sizes = [(parameter.numel(), parameter.requires_grad) for _, parameter in parameters]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def save_weights(task: Task, model: Any, folder: Path) -> None:
    """Write a whole model with its config, or of a PEFT model the adapter."""
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, save_embedding_layers=False)
    elif isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_plain(model, task.encoder(model), folder)
