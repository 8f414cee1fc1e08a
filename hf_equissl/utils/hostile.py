"""Check configurations and image processors of strangers: refuse numbers that no model has, before it is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MOST_LAYERS = 10_000
LARGEST_SIDE = 2**14  # pixels of an encoder's images
LARGEST_SIZE = 2**24  # anything else that a configuration counts
_COUNTED = ("size", "dim", "width", "layers", "depth", "heads", "channels", "tokens", "ratio")
MOST_WEIGHTS = 10**12  # all blocks together: 4 TB in fp32


def check_config_sizes(config: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a configuration, as its file has it, whose network no machine can hold, or that would take hours to build.

    Args:
        config: Key -> value; nested ones are looked at, too.
        source: Where it lies, for the message.

    Raises:
        ValueError: It names the key and the number.
    """
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if not any(word in name for word in _COUNTED):
            continue
        most = MOST_LAYERS if "layers" in name or "depth" in name else LARGEST_SIZE
        if name in ("image_size", "crop_size"):
            most = LARGEST_SIDE
        if not math.isfinite(value) or abs(value) > most:
            raise ValueError(f"{str(source)!r}: {key} is {value:g}, which no encoder has (the most: {most:,}).")
    layers, width = (config.get(name) for name in ("num_hidden_layers", "hidden_size"))
    if isinstance(layers, int) and isinstance(width, int) and 12 * layers * width**2 > MOST_WEIGHTS:
        raise ValueError(
            f"{str(source)!r}: {layers} layers of width {width} have {12 * layers * width**2:.1e} weights, which no "
            f"machine holds (the most: {MOST_WEIGHTS:.0e})."
        )


def check_image_settings(settings: Mapping[str, Any], source: str | Path) -> None:
    """Refuse what an image processor says of sizes and normalisation where no image can be made so.

    Args:
        settings: ``image_size`` in pixels, ``size`` and ``crop_size`` as processors have them, ``image_mean`` and
            ``image_std`` per channel; each may be absent.
        source: Where they are from, for the message: a folder, an option.

    Raises:
        ValueError: It names the setting and its value.
    """
    for name in ("image_size", "size", "crop_size"):
        for key, side in _numbers(settings.get(name), name):
            if not 1 <= side <= LARGEST_SIDE:
                raise ValueError(f"{source}: {key} is {side:g}, expected a side from 1 to {LARGEST_SIDE} pixels.")
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        if values is not None and not all(_is_number(value) and math.isfinite(value) for value in values):
            raise ValueError(f"{source}: {name} is {list(values)}, expected finite numbers.")
    if (deviations := settings.get("image_std")) is not None and min(deviations, default=1) <= 0:
        raise ValueError(f"{source}: image_std is {list(deviations)}, expected deviations above 0.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any, key: str = "") -> Iterable[tuple[str, float]]:
    """Walk over the numbers in plain data, but not over lists of labels and their like."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if name not in ("id2label", "label2id"):
                yield from _numbers(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for each in value[:64]:
            yield from _numbers(each, key)
    elif _is_number(value):
        yield key, value
