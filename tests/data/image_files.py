"""Small real files in every format, made on the spot."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth RGB picture; ``number`` makes it its own."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / width, y * 255 / height, (x + y + 17 * number) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, names: list[str]) -> Path:
    """A folder with one picture per name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number), "PNG" if path.suffix == ".png" else "JPEG"))
    return folder


def write_tar(path: Path, numbers: range) -> Path:
    """A WebDataset shard: ``000.jpg`` with its class in ``000.cls``."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for suffix, content in (("jpg", encode(picture(number))), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
