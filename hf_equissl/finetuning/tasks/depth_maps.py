"""Images with depth maps: what the stored numbers mean, and where depth is not known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...data import ImageDecodeError, ImageSource
from ...data.decoding import MAX_PIXELS, open_image
from ...data.depth import read_wide_values
from ...data.errors import explain_decode_errors
from .labelled_images import SourceSamples

DEPTH_COLUMNS = ("depth", "depth_map", "depths", "depth_image")
DEPTH_FOLDERS = ("depth", "depths", "depth_maps")
# Value, in a depth map that was read, of pixels that count neither for the loss nor for metrics.
HOLE = 0.0
_FIRST = 8  # depth maps of each split that are looked at before training
_MODES = ("L", "I", "F", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class DepthUnits:
    """What the numbers in depth maps mean.

    Attributes:
        scale: What a metre is in them.
        max_depth: Metres, beyond which depth counts as not known.
    """

    scale: float
    max_depth: float

    def read(self, data: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode a depth map: metres, float32 (H, W), and ``HOLE`` where depth is 0, negative, no number or too large.

        Raises:
            ImageDecodeError: it does not decode, or holds colours.
        """
        with explain_decode_errors():
            image = open_image(data, max_pixels)
            if image.mode not in _MODES:
                raise ImageDecodeError(
                    f"The depth map is {image.mode}; expected one channel of numbers, such as a PNG of 16 bits."
                )
            values = read_wide_values(image, lambda: open_image(data, max_pixels))
            depth = np.asarray(image if values is None else values).astype(np.float32) / self.scale
        with np.errstate(invalid="ignore"):
            return np.where((depth > HOLE) & (depth <= self.max_depth), depth, np.float32(HOLE)).astype(np.float32)


class DepthSamples(SourceSamples):
    """Images (``image``, RGB) with depth maps of the same size (``depth``, as ``DepthUnits.read`` makes them)."""

    def __init__(self, source: ImageSource, units: DepthUnits) -> None:
        super().__init__(source)
        self.maps = replace(source, image_column=source.more["depth map"])
        self.units = units

    def read(self, index: int) -> dict[str, Any]:
        """Decode one image and its depth map.

        Raises:
            ImageDecodeError: one of the two does not decode, or they differ in size.
        """
        row = self.source.row(index)
        image = super().read(index)["image"]
        depth = self.units.read(self.maps.content(row), self.source.decoding.max_pixels)
        if image.size != depth.shape[::-1]:
            raise ImageDecodeError(
                f"The image has {image.width} x {image.height} pixels and its depth map {depth.shape[1]} x "
                f"{depth.shape[0]}."
            )
        return {"image": image, "depth": depth}

    def check(self) -> None:
        """Read the first samples.

        Raises:
            ValueError: none of them can be used, or depth is known nowhere in them; says why.
        """
        bad, holes = [], 0
        for index in range(min(_FIRST, len(self))):
            try:
                if (self.read(index)["depth"] > HOLE).any():
                    return
                holes += 1
            except ImageDecodeError as error:
                bad.append(f"{self.item_name(index)} ({error})")
        if holes:
            raise ValueError(
                f"{self.name}: {holes} of the first {holes + len(bad)} depth maps hold no depth above 0 and up to "
                f"{self.units.max_depth:g} m, where a metre is {self.units.scale:g}. Say what it is with --set "
                "depth_scale (1000 for millimetres, 256 for KITTI, 1 for metres), and --set max_depth."
            )
        raise ValueError(f"{self.name}: none of the first {len(bad)} depth maps can be used: {'; '.join(bad)}")
