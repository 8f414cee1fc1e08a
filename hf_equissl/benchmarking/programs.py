"""How many images a second an encoder's program takes, beside the encoder in PyTorch, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..encoders.programs import EncoderProgram, open_program
from ..encoders.targets import INT8_FILE
from ..modeling import EquiSSLModel
from .timing import measure_seconds, take_turns


def time_program(
    encoder: EquiSSLModel,
    directory: Path,
    target: str,
    *,
    image_size: int,
    batch_size: int = 16,
    repeats: int = 5,
    tokens_only: bool = False,
) -> dict[str, float]:
    """Measure images per second, all with the same outputs and number of threads, in turns.

    Args:
        encoder: The encoder that the program was made of.
        directory: Folder of ``save_program``.
        target: "onnx" or "torch_export".
        image_size: Side of the images, in pixels.
        batch_size: Images per call.
        repeats: Calls of each; the median counts.
        tokens_only: As the program was made.

    Returns:
        Name ("PyTorch", "onnx", "onnx int8", "torch_export") -> images per second.
    """
    program = EncoderProgram(encoder, tokens_only=tokens_only).eval()
    runs: dict[str, Callable[[Tensor], object]] = {
        "PyTorch": program,
        target: open_program(directory, target, program.names),
    }
    if (directory / INT8_FILE).is_file():
        runs[f"{target} int8"] = open_program(directory, target, program.names, int8=True)
    images = torch.randn(batch_size, encoder.config.num_channels, image_size, image_size)
    with torch.inference_mode():
        taken = take_turns({name: partial(_seconds, run, images) for name, run in runs.items()}, repeats)
    return {name: batch_size / median(seconds) for name, seconds in taken.items()}


def _seconds(run: Callable[[Tensor], object], images: Tensor) -> float:
    """Measure the seconds of one call by the clock."""

    def call() -> None:
        run(images)

    return measure_seconds(call)["wall"]
