"""simplejpeg in Pillow's place: the same bits of every plain JPEG file, and none of any other file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_equissl.data import Decoding, ImageDecodeError, decode_image, jpeg, load_images
from hf_equissl.data.decoding import decode_pixels

from .image_files import encode, picture

PILLOW = Decoding(fast=False)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
needs_simplejpeg = pytest.mark.skipif(
    jpeg._find_simplejpeg() is None, reason="simplejpeg is absent, or its pixels are not Pillow's: install fast-decode"
)


def outcome(content: bytes, decoding: Decoding) -> np.ndarray | str:
    try:
        return decode_pixels(content, decoding)
    except ImageDecodeError as error:
        return str(error)


def with_exif(orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(NOISE, exif=exif, **options)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


PLAIN = encode(NOISE)
BROKEN = bytearray(PLAIN)
BROKEN[len(PLAIN) // 2 : len(PLAIN) // 2 + 8] = b"\xff\xfe\x00\x42\xff\xff\xff\xd5"
FILES = {  # name -> file, and whether simplejpeg decodes it
    "4:4:4": (encode(NOISE, subsampling=0), True),
    "4:2:2": (encode(NOISE, subsampling=1), True),
    "4:2:0": (encode(NOISE, subsampling=2, quality=30), True),
    "optimised tables": (encode(NOISE, optimize=True), True),
    "restart markers": (encode(NOISE, restart_marker_blocks=3), True),
    "an EXIF block, upright": (with_exif(1), True),
    "an EXIF block, turned": (with_exif(6), True),
    "an EXIF block, mirrored": (with_exif(5), True),
    "a comment": (PLAIN[:2] + segment(0xFE, b"hello") + PLAIN[2:], True),
    "bytes behind the end": (PLAIN + b"more", True),
    "progressive": (encode(NOISE, progressive=True), False),
    "grey": (encode(NOISE.convert("L")), False),
    "CMYK": (encode(NOISE.convert("CMYK")), False),
    "RGB inside": (encode(NOISE, keep_rgb=True), False),
    "PNG": (encode(NOISE, "PNG"), False),
    "cut off": (PLAIN[: len(PLAIN) // 2], False),
    "no end marker": (PLAIN[:-2], False),
    "broken in the middle": (bytes(BROKEN), False),
    "12 bits": (PLAIN.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), False),
    "empty": (b"", False),
    "header alone": (PLAIN[:30], False),
}


@needs_simplejpeg
@pytest.mark.parametrize("name", FILES)
def test_whatever_decodes_pixels_and_errors_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, by_simplejpeg = FILES[name]
    found: list[np.ndarray | None] = []
    decode = jpeg.decode_plain_jpeg
    monkeypatch.setattr(
        "hf_equissl.data.decoding.decode_plain_jpeg", lambda *words: (found.append(decode(*words)), found[-1])[1]
    )
    fast, slow = outcome(content, Decoding()), outcome(content, PILLOW)
    assert any(pixels is not None for pixels in found) == by_simplejpeg
    assert type(fast) is type(slow)
    np.testing.assert_array_equal(fast, slow)
    if isinstance(fast, np.ndarray):
        assert fast.flags.writeable
        np.testing.assert_array_equal(decode_image(content), slow)


@needs_simplejpeg
def test_large_images_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ImageDecodeError, match="more than max_pixels = 100"):
        decode_pixels(PLAIN, Decoding(max_pixels=100))


@needs_simplejpeg
@pytest.mark.parametrize("folder", ["imagenet-sample", "camvid/images/val", "coco-mini/val2017", "cifar10"])
def test_real_images(shared_data: Path, folder: str) -> None:
    if not (shared_data / folder).is_dir():
        pytest.skip(f"{shared_data / folder} is absent")
    fast = 0
    for content in islice(contents(shared_data / folder), 40):
        pixels = decode_pixels(content)
        np.testing.assert_array_equal(pixels, decode_pixels(content, PILLOW))
        fast += jpeg.decode_plain_jpeg(content, Image.open(io.BytesIO(content))) is not None
    assert fast > 35


def contents(folder: Path) -> Iterator[bytes]:
    source = load_images(folder)
    return (source.content(source.row(index)) for index in range(len(source)))


@pytest.mark.parametrize("fault", ["other pixels", "an error", "no such function"])
def test_a_library_with_other_pixels_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_jpeg(content: bytes) -> np.ndarray:
        pixels = np.array(Image.open(io.BytesIO(content)))
        if fault == "an error":
            raise ValueError("no")
        pixels[3, 5, 1] ^= 1
        return pixels

    module = SimpleNamespace(**({} if fault == "no such function" else {"decode_jpeg": decode_jpeg}))
    monkeypatch.setattr(jpeg.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(jpeg.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(jpeg, "_find_simplejpeg", jpeg._find_simplejpeg.__wrapped__)
    assert jpeg._find_simplejpeg() is None
    assert jpeg.name_decoder().startswith("Pillow ")
    np.testing.assert_array_equal(decode_pixels(encode(picture())), decode_pixels(encode(picture()), PILLOW))
