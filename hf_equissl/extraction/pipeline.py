"""Decode, encode and write at the same time: features of a batch are fetched when the next one has begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..encoders.frozen import FrozenEncoder, extremes
from .reading import Batch
from .settings import ExtractionError

# A function that waits for the features of a batch that was begun, and returns them on the CPU.
Result = Callable[[], dict[str, Tensor]]


def begin(encoder: FrozenEncoder, pixels: Tensor, names: Sequence[str], *, normalised: bool, dtype: str) -> Result:
    """Begin one forward pass. On CUDA this returns while the device still works, also on what was begun before.

    Args:
        encoder: The encoder that makes them.
        pixels: As for ``encoder.encode``, on the CPU. Pinned memory is copied without waiting.
        names: Names of the features.
        normalised: Whether the pixels are what ``encoder.features`` reads.
        dtype: Type in which features are stored; they are cast and checked on the encoder's device.

    Returns:
        A function that waits and returns name -> (B, .) on the CPU, in pinned memory where the encoder is on CUDA. It
        raises ``NonFiniteFeaturesError``, and ``ExtractionError`` where a feature exceeds what ``dtype`` holds.
    """
    device, stored_dtype = encoder.device, getattr(torch, dtype)
    asynchronous = device.type == "cuda"
    pixels = pixels.to(device, non_blocking=asynchronous) if normalised else encoder.normalise(pixels)
    # Contiguous: tensors with gaps between their rows are slow to check and to copy.
    made = {name: value.contiguous() for name, value in encoder.unchecked_features(pixels, names).items()}
    ends = _to_host(extremes(made), torch.float32)
    stored = {name: _to_host(value, stored_dtype) for name, value in made.items()}
    done = None
    if asynchronous:
        done = torch.cuda.Event(blocking=True)  # who waits for it sleeps: cores are for decoding
        done.record(torch.cuda.current_stream(device))

    def result() -> dict[str, Tensor]:
        if done is not None:
            done.synchronize()
        encoder.check_finite(ends)
        # Rounding keeps the order of numbers: where the extremes fit, all do.
        for name, fits in zip(stored, torch.isfinite(ends.to(stored_dtype)).all(1), strict=True):
            if not fits:
                raise ExtractionError(f"{name} exceeds what {dtype} holds. Give --dtype float32.")
        return stored

    return result


def _to_host(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy to the CPU, never as a view, which would keep the whole tensor. From CUDA the copy is still under way."""
    pinned = value.device.type == "cuda"
    host = torch.empty(value.shape, dtype=dtype, pin_memory=pinned)
    return host.copy_(value.to(dtype) if pinned else value, non_blocking=pinned)


def attach_features(
    batches: Iterable[Batch], start: Callable[[Batch], Result]
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Yield batches with their features, in order, each when the next one has been begun.

    Where the next one cannot be read or begun, the one before is still yielded, and then the error raised: everything
    before an error is complete.

    Args:
        batches: Batches to read, one after the other.
        start: Calls ``begin`` for one of them.
    """
    source = iter(batches)
    behind: tuple[Batch, Result] | None = None
    while True:
        begun, failure = None, None
        try:
            batch = next(source, None)
            if batch is not None:
                begun = batch, start(batch)
        except Exception as error:
            failure = error
        if behind is not None:
            yield behind[0], behind[1]()
        if failure is not None:
            raise failure
        if begun is None:
            return
        behind = begun
