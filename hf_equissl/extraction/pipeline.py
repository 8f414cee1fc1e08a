"""Decode, encode and write at the same time: features of a batch are fetched when the next one has begun."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..encoders.frozen import FrozenEncoder, extremes
from .reading import Batch

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
        raises ``NonFiniteFeaturesError``, and ``OverflowError`` where a feature exceeds what ``dtype`` holds.
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
                raise OverflowError(f"{name} exceeds what {dtype} holds.")
        return stored

    return result


def _to_host(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy to the CPU, never as a view, which would keep the whole tensor. From CUDA the copy is still under way."""
    pinned = value.device.type == "cuda"
    host = torch.empty(value.shape, dtype=dtype, pin_memory=pinned)
    return host.copy_(value.to(dtype) if pinned else value, non_blocking=pinned)


def with_features(
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


class DataWait:
    """Measures the share of time in which the encoder waited for images, from the first batch on.

    As in ``data.throughput``, only the time counts in which the device had nothing left to do: an accelerator still
    works while the host asks for the next batch.

    Args:
        device: Device of the encoder.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: float | None = None
        self._waited = 0.0
        self._events: deque[tuple[torch.Event, torch.Event]] = deque()

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and measure the time for which each is waited for."""
        source = iter(batches)
        while True:
            before, start = self._event(), time.perf_counter()
            batch = next(source, None)
            after, end = self._event(), time.perf_counter()
            if batch is None:
                return
            if self._begin is None:  # for the first one, workers start
                self._begin = end
            elif before is not None and after is not None:
                self._events.append((before, after))
                self._collect()
            else:
                self._waited += end - start
            yield batch

    def share(self) -> float:
        """Compute the share until now; call it when the features of all batches have been fetched."""
        self._collect()
        elapsed = time.perf_counter() - self._begin if self._begin is not None else 0.0
        return self._waited / elapsed if elapsed else 0.0

    def _event(self) -> torch.Event | None:
        if self._device.type == "cpu":
            return None
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        """Add up the events that the device has passed, which would pile up in a long extraction."""
        while self._events and self._events[0][1].query():
            before, after = self._events.popleft()
            self._waited += before.elapsed_time(after) / 1000
