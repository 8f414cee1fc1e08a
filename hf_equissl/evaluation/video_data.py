"""Videos with the masks of objects, in folders as DAVIS has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import decode_image
from ..data.decoding import open_image
from ..data.errors import explain_decode_errors
from ..data.subsets import choose_rows
from ..utils.suggestions import did_you_mean
from .data import EvaluationData
from .images import ImageSet

FRAMES, MASKS, LISTS = "JPEGImages", "Annotations", "ImageSets"
_SUFFIXES = {".jpg", ".jpeg", ".png"}
# Years of DAVIS, the one with several objects in a video first.
_YEARS = ("2017", "2016")


@dataclass(frozen=True)
class Video:
    """Frames in their order, and the masks of those that have one.

    Attributes:
        name: What messages call it.
        frames: Images.
        masks: Number of a frame -> its mask; of the first one always.
        objects: Numbers of the objects in the first mask.
    """

    name: str
    frames: tuple[Path, ...]
    masks: Mapping[int, Path]
    objects: tuple[int, ...]

    @property
    def judged(self) -> tuple[int, ...]:
        """Numbers of the frames that are judged: those with a mask but the first, which is given, and the last."""
        return tuple(number for number in sorted(self.masks) if 0 < number < len(self.frames) - 1)

    def frame(self, number: int) -> Image.Image:
        """Decode one frame to RGB."""
        return decode_image(self.frames[number])

    def mask(self, number: int) -> Tensor:
        """Read the mask of a frame: int64 (H, W), 0 where no object is.

        Raises:
            ValueError: it holds colours.
        """
        return read_mask(self.masks[number])


@dataclass(eq=False)
class VideoData(EvaluationData):
    """Videos; the images of both sets are all their frames.

    Attributes:
        videos: The videos.
    """

    videos: tuple[Video, ...] = ()

    @classmethod
    def load(
        cls, source: str, *, test_split: str | None = None, test_images: int | None = None, **options: Any
    ) -> Self:
        """List a folder as DAVIS has it: ``JPEGImages/480p/NAME/00000.jpg``, ``Annotations/480p/NAME/00000.png``.

        The folder of a resolution may be missing. ``ImageSets/2017/SPLIT.txt`` lists the videos of a split; where there
        is none all are taken. Masks hold the numbers of objects, as palettes do.

        Args:
            source: The folder.
            test_split: Name of a list; ``None``: val, if there is one.
            test_images: Use a fixed random subset of so many videos.
            **options: ``subset_seed``; others, which are those of images, mean nothing here.

        Raises:
            ValueError: no such folder or list, or a video whose first frame has no mask or no object, whose masks are
                not of its frames' size, or without a frame to be judged.
        """
        root = Path(source)
        frames, masks = (_resolution(root / name) for name in (FRAMES, MASKS))
        names, split = _names(root, frames, test_split)
        chosen = choose_rows(len(names), test_images, options.get("subset_seed", 0)).tolist()
        videos = tuple(_video(name, frames / name, masks / name) for name in (names[row] for row in chosen))
        images = ImageSet([str(path) for video in videos for path in video.frames], None, source, split, progress=False)
        return cls(images, images, videos=videos)


def read_mask(path: Path) -> Tensor:
    """Read a mask: int64 (H, W).

    Raises:
        ValueError: it does not decode, or holds colours.
    """
    with explain_decode_errors():
        image = open_image(path)
        mode, values = image.mode, np.asarray(image)
    if values.ndim != 2 or mode == "F":
        raise ValueError(
            f"{path}: the mask is {mode}; expected a palette, or one channel, whose values number objects."
        )
    return torch.from_numpy(values.astype(np.int64))


def _resolution(folder: Path) -> Path:
    """Return the folder of videos: the one of 480p if there is one, another resolution, or the folder itself."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder.parent}: there is no {folder.name}/. Expected the layout of DAVIS: {FRAMES}/480p/NAME/00000.jpg "
            f"and {MASKS}/480p/NAME/00000.png."
        )
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    holds_videos = [path for path in inner if any(deeper.is_dir() for deeper in path.iterdir())]
    return next((path for path in holds_videos if path.name == "480p"), holds_videos[0] if holds_videos else folder)


def _names(root: Path, frames: Path, split: str | None) -> tuple[list[str], str]:
    """List the videos of a split, and its name for records."""
    lists = {path.stem: path for year in reversed(_YEARS) for path in (root / LISTS / year).glob("*.txt")}
    if split is None and "val" not in lists:
        names = sorted(path.name for path in frames.iterdir() if path.is_dir())
        if not names:
            raise ValueError(f"{frames} holds no folders of frames.")
        return names, "all"
    split = split or "val"
    if split not in lists:
        raise ValueError(
            f"--test_split {split}: {root / LISTS} has no list of that name.{did_you_mean(split, lists)} Lists: "
            f"{', '.join(sorted(lists)) or 'none'}."
        )
    lines = lists[split].read_text(encoding="utf-8").splitlines()
    # Lists of 2016 name the files of every frame and its mask.
    names = [
        parts[0].strip("/").split("/")[-2] if "/" in parts[0] else parts[0] for line in lines if (parts := line.split())
    ]
    if not names:
        raise ValueError(f"{lists[split]} names no videos.")
    return list(dict.fromkeys(names)), split


def _video(name: str, frames: Path, masks: Path) -> Video:
    if not frames.is_dir():
        raise ValueError(f"{frames}: there is no such video.")
    images = sorted(path for path in frames.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not images:
        raise ValueError(f"{frames} holds no frames (.jpg or .png).")
    found = {number: masks / f"{path.stem}.png" for number, path in enumerate(images)}
    found = {number: path for number, path in found.items() if path.is_file()}
    if 0 not in found:
        raise ValueError(
            f"{images[0]}: the first frame has no mask ({masks / images[0].stem}.png), which is propagated."
        )
    first = read_mask(found[0])
    objects = tuple(number for number in first.unique().tolist() if number)
    if not objects:
        raise ValueError(f"{found[0]}: no object is marked in the first frame, and there is nothing to propagate.")
    for number, path in found.items():
        size, expected = _size(path), _size(images[number])
        if size != expected:
            raise ValueError(f"{path} has {size[0]} x {size[1]} pixels, and its frame {expected[0]} x {expected[1]}.")
    video = Video(name, tuple(images), found, objects)
    if not video.judged:
        raise ValueError(f"{masks}: no frame between the first and the last has a mask: there is nothing to judge.")
    return video


def _size(path: Path) -> tuple[int, int]:
    with explain_decode_errors():
        return open_image(path).size
