"""An image and what became of it, through several encoders: numbers and pictures. Knows nothing of any app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import decode_image
from ..encoders.base_image import base_image
from ..encoders.frozen import FrozenEncoder
from .change import Change
from .lens import Lens
from .shipped import CHECKPOINTS, shipped_checkpoint, shipped_photographs

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
MOST_GALLERY = 64
NAMES: Mapping[str, str] = {"base": "base (VICReg)", "reconstruction": "with reconstruction"}


@dataclass(frozen=True)
class Reading:
    """What one encoder makes of an image and of the changed one.

    Attributes:
        painted: Fraction of the way -> what the decoders paint, (3, S, S) in [0, 1]; empty without decoders.
        before: Colours of the image's patches, (3, rows, columns) in [0, 1].
        after: Those of the changed image.
        cosines: Part of the features -> cosine between both.
        angle: By how many degrees the image was turned, as a stored probe reads it; ``None`` without one.
        neighbours: Name in the gallery -> cosine with the changed image, the nearest first.
    """

    painted: Mapping[float, Tensor]
    before: Tensor
    after: Tensor
    cosines: Mapping[str, float]
    angle: float | None
    neighbours: Mapping[str, float]


@dataclass(frozen=True)
class Analysis:
    """An image, what became of it, and how each encoder reads both.

    Attributes:
        change: What was done.
        image: (3, S, S) in [0, 1], as the first encoder sees it.
        changed: Likewise.
        between: Fraction of the way -> the true image there, for the fractions that a decoder paints.
        readings: Name of the encoder -> its reading.
    """

    change: Change
    image: Tensor
    changed: Tensor
    between: Mapping[float, Tensor]
    readings: Mapping[str, Reading]

    def numbers(self) -> dict[str, Any]:
        """Return what was measured as JSON values, rounded to four digits."""
        return {
            "change": asdict(self.change),
            "encoders": {
                name: {
                    "cosines": {part: round(value, 4) for part, value in reading.cosines.items()},
                    "angle": None if reading.angle is None else round(reading.angle, 4),
                    "neighbours": [[other, round(value, 4)] for other, value in reading.neighbours.items()],
                }
                for name, reading in self.readings.items()
            },
        }


class Analyst:
    """Encoders side by side, and a gallery of images that they know.

    Attributes:
        lenses: Name -> encoder.
        gallery: Name -> image.
    """

    def __init__(
        self,
        encoders: Mapping[str, FrozenEncoder | str | Path] | None = None,
        images: str | Path | None = None,
    ) -> None:
        """Open encoders and images.

        Args:
            encoders: Name -> folder, Hub id or encoder; ``None``: the two that ship.
            images: Folder with images, of which the first 64 make the gallery; ``None``: the photographs that ship.

        Raises:
            LoadError: An encoder cannot be read.
            ValueError: There are fewer than two images, or one cannot be read.
        """
        encoders = encoders or {NAMES[name]: shipped_checkpoint(name) for name in CHECKPOINTS}
        self.gallery = read_gallery(images)
        self.lenses: dict[str, Lens] = {}
        for name, source in encoders.items():
            lens = Lens(name, source)
            lens.show_gallery(self.pixels(lens))
            self.lenses[name] = lens

    def pixels(self, lens: Lens) -> Tensor:
        """Return the gallery as an encoder sees it, (G, 3, S, S) uint8."""
        return torch.stack([base_image(image, lens.encoder.image_size) for image in self.gallery.values()])

    def analyse(self, image: Image.Image, change: Change) -> Analysis:
        """Change an RGB image, and look at both through every encoder."""
        sizes = {name: lens.encoder.image_size for name, lens in self.lenses.items()}
        pixels = {name: base_image(image, size)[None].float() / 255 for name, size in sizes.items()}
        changed = {name: change.apply(each) for name, each in pixels.items()}
        readings = {name: self._read(lens, pixels[name], changed[name]) for name, lens in self.lenses.items()}
        fractions = next((list(reading.painted) for reading in readings.values() if reading.painted), [])
        first = next(iter(self.lenses))  # what is shown is as the first encoder sees it
        between = change.path(pixels[first], fractions)[0] if fractions else ()
        return Analysis(
            change, pixels[first][0], changed[first][0], dict(zip(fractions, between, strict=True)), readings
        )

    def _read(self, lens: Lens, pixels: Tensor, changed: Tensor) -> Reading:
        before, after = lens.features(pixels), lens.features(changed)
        angles = lens.angles(before, after)
        indices, cosines = lens.neighbours(after)
        names = list(self.gallery)
        return Reading(
            painted={fraction: images[0] for fraction, images in lens.paint(pixels, changed).items()},
            before=lens.colours(before)[0],
            after=lens.colours(after)[0],
            cosines={part: value.item() for part, value in lens.cosines(before, after).items()},
            angle=None if angles is None else angles.item(),
            neighbours={names[i]: value for i, value in zip(indices[0].tolist(), cosines[0].tolist(), strict=True)},
        )


def read_gallery(folder: str | Path | None) -> dict[str, Image.Image]:
    """Read the images of a folder, name -> RGB, sorted, at most 64; ``None``: the photographs that ship.

    Raises:
        ValueError: There is no such folder, it holds fewer than two images, or one of them cannot be read.
    """
    paths = shipped_photographs() if folder is None else list_images(folder)
    gallery = {}
    for path in paths[:MOST_GALLERY]:
        try:
            gallery[path.stem if path.stem not in gallery else path.name] = decode_image(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is not an image that can be read ({error}). Move it away, then try again."
            ) from error
    return gallery


def list_images(folder: str | Path) -> list[Path]:
    """List the images that lie in a folder.

    Raises:
        ValueError: There is no such folder, or it holds fewer than two images.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"--images {folder}: no such folder. Give one with two images or more, or leave the option out."
        )
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < 2:
        raise ValueError(
            f"--images {folder}: {len(found)} images lie there, expected two or more. Their names end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}; sub-folders are not read."
        )
    return found


def to_picture(pixels: Tensor, side: int = 160, *, smooth: bool = True) -> Image.Image:
    """Make a picture of pixels (3, H, W) in [0, 1], enlarged to ``side``; patches are enlarged without smoothing."""
    array = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(array).resize((side, side), how)


def in_a_row(pictures: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    """Lay pictures of one height side by side, on transparent ground."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGBA", (width, pictures[0].height), (0, 0, 0, 0))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
