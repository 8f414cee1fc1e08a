"""Every kind of file becomes an upright RGB image, or an ImageDecodeError."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_equissl.data import ImageDecodeError, decode_image

from .image_files import encode, picture

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(data: object) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(RAMP), "PNG", RAMP),
        (Image.fromarray(RAMP > 127), "PNG", np.where(RAMP > 127, 255, 0)),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", RAMP),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF", RAMP),
        (Image.fromarray(RAMP.astype(np.int32)), "TIFF", RAMP),
        (Image.fromarray(RAMP.astype(np.int32) * 256), "TIFF", RAMP),
        (Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF", RAMP),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF", RAMP),
        (Image.fromarray(RAMP.astype(np.float32) * 1000 - 500), "TIFF", RAMP),
        (Image.fromarray(RAMP).convert("P"), "PNG", RAMP),
        (Image.fromarray(RAMP).convert("LA"), "PNG", RAMP),
        (Image.fromarray(RAMP).convert("RGBA"), "PNG", RAMP),
        (Image.fromarray(RAMP).convert("RGB"), "BMP", RAMP),
        (Image.fromarray(RAMP).convert("CMYK"), "TIFF", RAMP),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes(image: Image.Image, kind: str, expected: np.ndarray) -> None:
    result = pixels(encode(image, kind))
    for channel in range(3):
        np.testing.assert_allclose(result[..., channel].astype(int), expected, atol=1)


def test_transparency_is_laid_over_white() -> None:
    half = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    half.paste((0, 0, 200, 255), (4, 0, 8, 8))
    grey = Image.merge("LA", [Image.new("L", (8, 8), 90), half.getchannel("A")])
    palette = half.convert("RGB").quantize(4)
    background = palette.getpixel((0, 0))
    for data in (encode(half, "PNG"), encode(half, "WEBP", lossless=True), encode(grey, "PNG")):
        assert (pixels(data)[:, :4] == 255).all()
    shown = pixels(encode(palette, "PNG", transparency=background))
    assert (shown[:, :4] == 255).all()
    np.testing.assert_array_equal(shown[0, 7], (0, 0, 200))
    # A palette with one alpha per colour, and a transparent colour without any alpha channel.
    alphas = bytes(0 if index == background else 255 for index in range(4))
    assert (pixels(encode(palette, "PNG", transparency=alphas))[:, :4] == 255).all()
    assert (pixels(encode(half.convert("RGB"), "PNG", transparency=(200, 0, 0)))[:, :4] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = picture(size=(48, 32))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        np.testing.assert_array_equal(pixels(encode(stored, kind, exif=exif, **options)), np.asarray(upright))
    jpeg = pixels(encode(stored, "JPEG", exif=exif, quality=100, subsampling=0))
    np.testing.assert_allclose(jpeg.astype(int), np.asarray(upright).astype(int), atol=4)


def test_kinds_of_input(tmp_path: Path) -> None:
    content = encode(picture(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    expected = np.asarray(picture())
    mappings = {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}
    for data in (content, path, str(path), picture(), *mappings):
        np.testing.assert_array_equal(pixels(data), expected)
    np.testing.assert_array_equal(pixels(expected), expected)
    np.testing.assert_array_equal(pixels(expected.astype(np.float32) / 255), expected)
    np.testing.assert_array_equal(pixels(expected[..., :1]), expected[..., :1].repeat(3, axis=-1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(picture())[:-100], "truncated"),
        (encode(picture())[:400], "(?i)truncated"),
        (encode(picture(), "PNG")[:-100], "(?i)truncated|incomplete|broken"),
        (encode(picture(), "WEBP")[:-100], "(?i)webp|decode|truncated|not an image"),
        (b"", "empty"),
        (b"This is a text called photo.jpg", "^not an image that Pillow reads$"),
        ("/no/such/file.jpg", "No such file"),
        ({"bytes": None, "path": None}, "NoneType"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((8, 8), dtype=np.int64), "int64"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "^8 x 0 pixels"),
        (np.zeros((8, 0), dtype=np.uint16), "^0 x 8 pixels"),
        (np.zeros((0, 0, 4), dtype=np.float32), "^0 x 0 pixels"),
        (Image.new("RGB", (0, 5)), "^0 x 5 pixels"),
        (7, "int"),
    ],
)
def test_bad_files(data: object, message: str) -> None:
    with pytest.raises(ImageDecodeError, match=message):
        decode_image(data)
