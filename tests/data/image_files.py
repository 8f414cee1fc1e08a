"""Small real files in every format, made on the spot."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
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


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_tar(path: Path, numbers: range) -> Path:
    """A WebDataset shard: ``000.jpg`` with its class in ``000.cls``."""
    members = []
    for number in numbers:
        members.append((f"{number:03d}.jpg", encode(picture(number))))
        members.append((f"{number:03d}.cls", str(number % 3).encode()))
    return write_members(path, members)


def write_tiff(
    values: np.ndarray,
    *,
    planar: bool = False,
    order: str = "<",
    compress: bool = False,
    extra: int | None = 0,
    orientation: int = 1,
    **tags: bytes,
) -> bytes:
    """A TIFF file of (H, W, bands), of one strip, or of one for each plane, which Pillow does not write.

    Args:
        values: uint8 or uint16.
        planar: One band after the other.
        order: "<" or ">".
        compress: With Deflate.
        extra: What bands behind the third are: 0 nothing that is said, 2 transparency; ``None``: the tag is missing.
        orientation: As in EXIF.
        **tags: ``t282=b"72 dpi"`` is a text under tag 282.
    """
    height, width, bands = values.shape
    values = values.astype(values.dtype.newbyteorder(order))
    strips = [values[..., band].tobytes() for band in range(bands)] if planar else [values.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if compress else strips
    file = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 0))
    offsets = []
    for strip in strips:
        offsets.append(len(file))
        file += strip
    shorts = {258: [8 * values.itemsize] * bands, 259: [8 if compress else 1], 262: [2 if bands > 2 else 1]}
    shorts |= {277: [bands], 284: [2 if planar else 1]}
    longs = {256: [width], 257: [height], 273: offsets, 278: [height], 279: [len(strip) for strip in strips]}
    if bands > 3 and extra is not None:
        shorts[338] = [extra] * (bands - 3)
    shorts |= {274: [orientation]} if orientation != 1 else {}
    fields = {
        tag: (3, len(numbers), struct.pack(f"{order}{len(numbers)}H", *numbers)) for tag, numbers in shorts.items()
    }
    fields |= {
        tag: (4, len(numbers), struct.pack(f"{order}{len(numbers)}I", *numbers)) for tag, numbers in longs.items()
    }
    fields |= {int(tag[1:]): (2, len(text), text) for tag, text in tags.items()}
    entries = b""
    for tag, (kind, count, content) in sorted(fields.items()):
        if len(content) > 4:
            content, place = struct.pack(order + "I", len(file)), content
            file += place
        entries += struct.pack(order + "HHI", tag, kind, count) + content.ljust(4, b"\0")
    file[4:8] = struct.pack(order + "I", len(file))
    return bytes(file + struct.pack(order + "H", len(fields)) + entries + bytes(4))


def write_png(values: np.ndarray) -> bytes:
    """A PNG file of (H, W, 1 to 4) uint16, which Pillow writes of grey alone."""
    height, width, bands = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, content) for name, content in chunks)


def png_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """One chunk of a PNG file, with its own or another checksum."""
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def jpeg_segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG file."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content
