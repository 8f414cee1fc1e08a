"""Encoders as programs that run without this package: ONNX, and what ``torch.export`` writes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import EquiSSLModel
from .targets import INT8_FILE, PROGRAM_FILES, RECORD_FILE

# What a program may differ from PyTorch, as a share of one for small numbers and of the number for large ones.
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 5)
_TWO_GIB = 2**31  # a file of protocol buffers holds less

Run = Callable[[Tensor], dict[str, Tensor]]


class ProgramError(RuntimeError):
    """An exporter or a runtime failed on an encoder. The message is one line."""


class EncoderProgram(nn.Module):
    """An encoder that maps (B, C, H, W) to a tuple of tensors, and refuses sizes that its patches do not divide.

    Attributes:
        names: What the tensors are: ``last_hidden_state`` (B, 1 + R + N, D), ``pooler_output`` (B, D), and of an
            encoder with a stem ``invariant_features`` and ``equivariant_features`` (B, 1 + N, .).
    """

    def __init__(self, encoder: EquiSSLModel, *, tokens_only: bool = False) -> None:
        """Wrap an encoder; ``tokens_only`` leaves its stem out."""
        super().__init__()
        self.encoder = encoder
        self.with_features = encoder.stem is not None and not tokens_only
        self.names: tuple[str, ...] = ("last_hidden_state", "pooler_output")
        if self.with_features:
            self.names += ("invariant_features", "equivariant_features")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode images."""
        patch = self.encoder.config.patch_side
        # Without this a runtime would cut the last rows and columns off and say nothing; views cost nothing.
        rows = pixel_values.unflatten(2, (-1, patch)).flatten(2, 3)
        whole = rows.unflatten(3, (-1, patch)).flatten(3, 4)
        outputs = self.encoder(whole, output_features=self.with_features, return_dict=True)
        return tuple(outputs[name] for name in self.names)


def save_program(
    encoder: EquiSSLModel,
    directory: Path,
    target: str,
    image_size: int,
    *,
    tokens_only: bool = False,
    int8: bool = False,
    images: Tensor | None = None,
) -> dict[str, Any]:
    """Write an encoder as a program for any batch and any image size that the patch size divides, and check it.

    It is compared with PyTorch at batches of 1 and 5 and two image sizes, one of them not square.

    Args:
        encoder: The encoder, in float32 on the CPU.
        directory: An existing folder; it gets ``model.onnx`` or ``model.pt2``, and ``program.json`` with what is
            returned.
        target: "onnx" or "torch_export".
        image_size: One of the sizes to compare at, in pixels.
        tokens_only: Leave out the invariant and equivariant features.
        int8: Also write ``model_int8.onnx``, whose linear layers multiply integers, and measure what that loses.
        images: (B, C, H, W), normalised, to measure that loss on; default: 16 that are made up.

    Returns:
        ``outputs``, ``max_difference`` (of the program from PyTorch, as ``TOLERANCE`` counts it), and with ``int8`` the
        ``int8_cosine`` of each output: mean and least over tokens.

    Raises:
        ValueError: The program computes something else than PyTorch.
        ProgramError: It could not be made, or does not run.
    """
    program = EncoderProgram(encoder.eval(), tokens_only=tokens_only).eval()
    path = directory / PROGRAM_FILES[target]
    with torch.no_grad(), _quietly():
        with _explain_failures("torch.export"):
            exported = _export(program)
        with _explain_failures(f"Writing {path.name}"):
            if target == "onnx":
                _write_onnx(program, exported, path)
            else:
                torch.export.save(exported, path)
        run = open_program(directory, target, program.names)
        record: dict[str, Any] = {
            "outputs": list(program.names),
            "patch_size": encoder.config.patch_side,
            "max_difference": _compare(program, run, image_size),
        }
        if int8:
            with _explain_failures("onnxruntime.quantization"):
                _quantise(path, directory / INT8_FILE)
            given = _made_up(encoder.config.num_channels, image_size) if images is None else images
            record["int8_images"] = "made up" if images is None else len(images)
            record["int8_cosine"] = _cosines(
                run(given), open_program(directory, target, program.names, int8=True)(given)
            )
    (directory / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def open_program(directory: Path, target: str, names: tuple[str, ...], *, int8: bool = False) -> Run:
    """Open a program of ``save_program``; returns a function from (B, C, H, W) to its outputs by name.

    Raises:
        ProgramError: It does not open; the function raises it where the program does not run.
    """
    path = directory / (INT8_FILE if int8 else PROGRAM_FILES[target])
    with _explain_failures(f"Opening {path.name}"):
        compute = _open_exported(path) if target == "torch_export" else _open_onnx(path, names)

    def run(images: Tensor) -> dict[str, Tensor]:
        with _explain_failures(f"Running {path.name}"):
            return dict(zip(names, compute(images), strict=True))

    return run


def _open_exported(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    return torch.export.load(path).module()


def _open_onnx(path: Path, names: Sequence[str]) -> Callable[[Tensor], Sequence[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [
        torch.from_numpy(value) for value in session.run(list(names), {"pixel_values": images.numpy()})
    ]


@contextmanager
def _explain_failures(what: str) -> Iterator[None]:
    """Turn whatever an exporter or a runtime raises, over many lines, into one sentence.

    Raises:
        ProgramError: In place of every other error but those of memory and of disks.
    """
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ProgramError(
            f"{what} failed ({type(error).__name__}: {said.rstrip('.')}). Other versions of torch, onnxscript or "
            "onnxruntime may do better."
        ) from error


def _export(program: EncoderProgram) -> torch.export.ExportedProgram:
    """Trace the program with symbols for the batch and for the rows and columns of patches."""
    patch = program.encoder.config.patch_side
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    sizes = {0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns}
    # Different numbers: two that are equal would be taken for one.
    example = torch.zeros(2, program.encoder.config.num_channels, 3 * patch, 4 * patch)
    return torch.export.export(program, (example,), dynamic_shapes={"pixel_values": sizes})


def _write_onnx(program: EncoderProgram, exported: torch.export.ExportedProgram, path: Path) -> None:
    written = torch.onnx.export(
        exported, input_names=["pixel_values"], output_names=list(program.names), dynamo=True, verbose=False
    )
    if written is None:
        raise RuntimeError("torch.onnx.export returned no program.")
    size = sum(weight.numel() * weight.element_size() for weight in program.parameters())
    written.save(path, external_data=size > 0.9 * _TWO_GIB)


def _compare(program: EncoderProgram, run: Run, image_size: int) -> float:
    """Find the largest difference from PyTorch.

    Raises:
        ValueError: It is above ``TOLERANCE``.
    """
    patch, channels = program.encoder.config.patch_side, program.encoder.config.num_channels
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for height, width in ((image_size, image_size), (image_size + patch, image_size + 2 * patch)):
        for batch in CHECKED_BATCHES:
            images = torch.randn(batch, channels, height, width, generator=generator)
            computed = run(images)
            for name, expected in zip(program.names, program(images), strict=True):
                difference = (computed[name] - expected).abs() / expected.abs().clamp(min=1)
                worst = max(worst, float(difference.max()))
                if not difference.max() <= TOLERANCE:  # NaN, too
                    raise ValueError(
                        f"The program's {name} differs from PyTorch's by {float(difference.max()):.1e} on {batch} "
                        f"images of {height} x {width} pixels, more than {TOLERANCE:.0e}: nothing was written. "
                        "Other versions of torch, onnxscript or onnxruntime may do better."
                    )
    return worst


def _quantise(path: Path, target: Path) -> None:
    """Write the program with linear layers in int8: weights per channel, activations by their range of the moment."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)


def _made_up(channels: int, size: int, count: int = 16) -> Tensor:
    """Make images with structure of every size, as photographs have it, of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, channels, size, size)
    side = 2
    while side <= size:
        coarse = torch.randn(count, channels, side, side, generator=generator)
        images += nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
        side *= 2
    return (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)


def _cosines(exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Compare the outputs token by token."""
    found = {}
    for name, value in exact.items():
        cosine = nn.functional.cosine_similarity(value, rounded[name], dim=-1)
        found[name] = {"mean": float(cosine.mean()), "least": float(cosine.min())}
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what exporters say of torchvision, of deprecations inside of torch, and of pre-processing."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
