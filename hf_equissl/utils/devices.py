"""The device that a command runs on."""

from __future__ import annotations

import torch

from .suggestions import RecipeError


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def choose_device(name: str) -> torch.device:
    """``auto``: an accelerator if there is one.

    Raises:
        RecipeError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: not a device of PyTorch. Give auto, cpu or cuda.") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise RecipeError(f"--device {name}: this machine has {accelerator or 'no accelerator'}. Give auto or cpu.")
    return device
