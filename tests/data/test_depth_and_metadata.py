"""More than 8 bits per band, metadata of every kind, and files that must not be opened."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hf_equissl.data import Decoding, ImageDecodeError, decode_image, load_images

from .image_files import encode, jpeg_segment, picture, png_chunk, write_png, write_tiff

# 12-bit values in 16 bits, each band another.
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
TWELVE_BITS = np.rint(COLOUR.astype(np.float64) * 255 / 4095).astype(np.uint8)
OPAQUE = np.full((64, 64, 1), 65535, np.uint16)


def pixels(data: object, *decoding: object) -> np.ndarray:
    return np.asarray(decode_image(data, Decoding(*decoding)))


# ---- depth ----


@pytest.mark.parametrize("chosen", ["auto", (0, 4095)], ids=str)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(Image.fromarray(RAMP), "PNG"), TWELVE_BITS[..., :1]),
        (encode(Image.fromarray(RAMP), "TIFF"), TWELVE_BITS[..., :1]),
        (encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), TWELVE_BITS[..., :1]),
        (write_png(COLOUR), TWELVE_BITS),
        (write_png(np.concatenate([COLOUR, OPAQUE], axis=-1)), TWELVE_BITS),
        (write_tiff(COLOUR), TWELVE_BITS),
        (write_tiff(COLOUR, order=">"), TWELVE_BITS),
        (write_tiff(COLOUR, compress=True), TWELVE_BITS),
        (write_tiff(COLOUR, planar=True), TWELVE_BITS),
        (write_tiff(COLOUR, planar=True, order=">"), TWELVE_BITS),
        (write_tiff(RAMP[..., None], planar=True), TWELVE_BITS[..., :1]),
        (write_tiff(COLOUR, planar=True, compress=True), TWELVE_BITS),
        (write_tiff(COLOUR, planar=True, compress=True, order=">"), TWELVE_BITS),
        (write_tiff(RAMP[..., None], planar=True, compress=True), TWELVE_BITS[..., :1]),
        (write_tiff(np.concatenate([COLOUR, OPAQUE], axis=-1), planar=True, extra=2), TWELVE_BITS),
        (write_png(np.concatenate([RAMP[..., None], OPAQUE], axis=-1)), TWELVE_BITS[..., :1]),
    ],
    ids=[
        "grey png",
        "grey tiff",
        "32 bits",
        "png",
        "png with alpha",
        "tiff",
        "big",
        "deflate",
        "planar",
        "both",
        "one",
        "planar deflate",
        "big planar deflate",
        "one deflate",
        "planar with alpha",
        "grey png with alpha",
    ],
)
def test_a_range_of_values_fills_eight_bits(content: bytes, expected: np.ndarray, chosen: object) -> None:
    np.testing.assert_array_equal(pixels(content, chosen), np.broadcast_to(expected, COLOUR.shape))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compress", [False, True])
def test_planes_of_16_bits(order: str, compress: bool) -> None:
    values = COLOUR * 16
    together, apart = (write_tiff(values, planar=planar, order=order, compress=compress) for planar in (False, True))
    np.testing.assert_array_equal(pixels(together), values >> 8)
    np.testing.assert_array_equal(pixels(apart), values >> 8)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("compress", [False, True])
def test_a_fourth_plane_of_16_bits(extra: int, compress: bool) -> None:
    values = np.concatenate([COLOUR * 16, RAMP[..., None] * 16], axis=-1)
    together, apart = (write_tiff(values, planar=each, compress=compress, extra=extra) for each in (False, True))
    np.testing.assert_array_equal(pixels(apart), pixels(together))
    assert ((pixels(apart) == COLOUR >> 4).all()) == (extra == 0)  # else it is transparency


@pytest.mark.parametrize("orientation", range(1, 9))
def test_planes_are_turned_as_other_images(orientation: int) -> None:
    values = COLOUR[:48] * 16
    files = [write_tiff(values, planar=planar, orientation=orientation) for planar in (False, True)]
    for chosen in ("full", "auto"):
        np.testing.assert_array_equal(*(pixels(content, chosen) for content in files))
    assert decode_image(files[1]).size == ((64, 48) if orientation < 5 else (48, 64))


def test_a_range_beyond_its_ends_and_images_of_eight_bits() -> None:
    grey = pixels(encode(Image.fromarray(RAMP), "PNG"), (1000, 2000))
    assert (grey[RAMP <= 1000] == 0).all()
    assert (grey[RAMP >= 2000] == 255).all()
    eight = encode(picture(), "PNG")
    np.testing.assert_array_equal(pixels(eight, (0, 4095)), pixels(eight))
    flat = encode(Image.fromarray(np.full((4, 4), 7, np.uint16)), "PNG")
    assert (pixels(flat, "auto") == 0).all()


@pytest.mark.parametrize("value", ["half", [1], [5, 5], [0, float("nan")], [0, 1, 2]], ids=str)
def test_ranges_that_mean_nothing(value: object) -> None:
    with pytest.raises(ValueError, match="expected full, auto, or two numbers"):
        Decoding(value)


# ---- metadata ----


def exif_of(orientation: int, resolution: object = "72 dpi") -> bytes:
    """An EXIF block whose XResolution is text: two entries, and the text behind them."""
    text = str(resolution).encode() + b"\0"
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation) + struct.pack("<HHII", 0x011A, 2, len(text), 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + text


def jpeg_with(*segments: bytes) -> bytes:
    content = encode(picture(size=(96, 80)))
    return content[:2] + b"".join(segments) + content[2:]


def png_with(*chunks: bytes) -> bytes:
    content = encode(picture(size=(96, 80)), "PNG")
    return content[:33] + b"".join(chunks) + content[33:]


def test_a_wrong_exif_tag_costs_nothing() -> None:
    assert decode_image(jpeg_with(jpeg_segment(0xE1, exif_of(6)))).size == (80, 96)
    assert decode_image(jpeg_with(jpeg_segment(0xE1, exif_of(1)))).size == (96, 80)
    for broken in (b"Exif\0\0", b"Exif\0\0garbage", exif_of(77), exif_of(6)[:20]):
        assert decode_image(jpeg_with(jpeg_segment(0xE1, broken))).size == (96, 80)
    np.testing.assert_array_equal(
        pixels(jpeg_with(jpeg_segment(0xE1, exif_of(1)))), pixels(encode(picture(size=(96, 80))))
    )


def test_long_and_broken_chunks_cost_nothing() -> None:
    expected = np.asarray(picture(size=(96, 80)))
    info = [PngImagePlugin.PngInfo() for _ in range(3)]
    info[0].add_text("comment", "x" * 3_000_000, zip=True)
    info[1].add_itxt("comment", "x" * 3_000_000, zip=True)
    for number in range(80):
        info[2].add_text(f"comment {number}", "x" * 900_000, zip=True)
    files = [encode(picture(size=(96, 80)), "PNG", pnginfo=each) for each in info]
    files.append(png_with(png_chunk(b"tEXt", b"a\0b", checksum=1)))
    files.append(png_with(png_chunk(b"pHYs", b"short")))
    for content in files:
        np.testing.assert_array_equal(pixels(content), expected)
    turned = PngImagePlugin.PngInfo()
    turned.add_text("comment", "x" * 3_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(picture(size=(96, 80)), "PNG", pnginfo=turned, exif=exif)).size == (80, 96)


def test_wrong_tags_of_tiff_cost_nothing() -> None:
    content = write_tiff(COLOUR * 16, t282=b"72 dpi\0", t283=b"72 dpi\0")
    np.testing.assert_array_equal(pixels(content), COLOUR >> 4)


def test_broken_pixels_stay_broken() -> None:
    for content in (jpeg_with(jpeg_segment(0xE1, exif_of(6)))[:-300], png_with(png_chunk(b"tEXt", b"a\0b", 1))[:-100]):
        with pytest.raises(ImageDecodeError):
            decode_image(content)


# ---- what is not opened ----


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageDecodeError, match=r"PostScript file \(EPS\).*not run"):
        decode_image(path)


def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageDecodeError, match=r"a\.jpg' is not a regular file"):
        decode_image(tmp_path / "a.jpg")
    with pytest.raises(ImageDecodeError, match="not a regular file"):
        decode_image("/dev/zero")
    (tmp_path / "b.jpg").write_bytes(encode(picture()))
    assert len(load_images(tmp_path).check()) == 1


def test_large_images_need_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encode(Image.new("L", (16000, 12000)), "PNG")  # 192 megapixels
    with pytest.raises(ImageDecodeError, match=r"16000 x 12000 = 192,000,000 pixels .* max_pixels = 178,956,970"):
        decode_image(large)
    with pytest.raises(ImageDecodeError, match=r"max_pixels = 100"):
        decode_image(encode(picture()), Decoding(max_pixels=100))
    before = Image.MAX_IMAGE_PIXELS
    assert decode_image(large, Decoding(max_pixels=200_000_000)).size == (16000, 12000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_more_bands_are_named() -> None:
    with pytest.raises(ImageDecodeError, match="13 bands of 16 bits; images are grey or RGB"):
        decode_image(write_tiff(np.zeros((8, 8, 13), np.uint16)))
    with pytest.raises(ImageDecodeError, match="grey or RGB"):
        decode_image(np.zeros((8, 8, 13), np.uint8))


def test_heif_is_read_or_named() -> None:
    try:
        import pillow_heif
    except ImportError:
        with pytest.raises(ImageDecodeError, match=r"hf-equissl\[heif\]"):
            decode_image(b"\0\0\0\x1cftypheic" + bytes(60))
        return
    pillow_heif.register_heif_opener()
    assert decode_image(encode(picture(), "HEIF")).size == (40, 32)


def test_avif_is_read() -> None:
    assert decode_image(encode(picture(), "AVIF")).size == (40, 32)


def test_lack_of_memory_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        decode_image(encode(picture().convert("L"), "PNG"))
