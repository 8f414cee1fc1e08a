"""More than 8 bits per band, metadata of every kind, and files that must not be opened."""

from __future__ import annotations

import io
import os
import struct
import zlib
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


WIDE_FILES = {
    "png": write_png(COLOUR),
    "png with alpha": write_png(np.concatenate([COLOUR, OPAQUE], axis=-1)),
    "grey png with alpha": write_png(np.concatenate([RAMP[..., None], OPAQUE], axis=-1)),
    "tiff": write_tiff(COLOUR),
    "planar tiff": write_tiff(COLOUR, planar=True),
}


@pytest.mark.parametrize("kind", WIDE_FILES)
@pytest.mark.parametrize("chosen", ["auto", (0, 4095)], ids=str)
def test_opened_images_of_wide_colours_are_refused_where_half_of_their_bits_are_lost(kind: str, chosen: object) -> None:
    content = WIDE_FILES[kind]
    with pytest.raises(ImageDecodeError, match="Give its path or its bytes"):
        pixels(Image.open(io.BytesIO(content)), chosen)
    if kind == "planar tiff":
        with pytest.raises(ImageDecodeError, match="Give its path or its bytes"):
            pixels(Image.open(io.BytesIO(content)))
    else:
        np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(content))), pixels(content))
    grey = encode(Image.fromarray(RAMP), "PNG")
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(grey)), chosen), pixels(grey, chosen))


@pytest.mark.parametrize("chosen", ["auto", (0, 4095)], ids=str)
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "f4"])
def test_a_range_holds_for_arrays(chosen: object, dtype: str) -> None:
    for values, expected in ((RAMP, TWELVE_BITS[..., :1]), (RAMP[..., None], TWELVE_BITS[..., :1]), (COLOUR, None)):
        expected = TWELVE_BITS if expected is None else np.broadcast_to(expected, COLOUR.shape)
        np.testing.assert_array_equal(pixels(values.astype(dtype), chosen), expected)
    hidden = np.concatenate([COLOUR, OPAQUE * 0], axis=-1)
    assert (pixels(hidden.astype(dtype) if dtype != "f4" else hidden / np.float32(65535), chosen) == 255).all()
    np.testing.assert_array_equal(pixels((COLOUR * 16).astype("<u2")), COLOUR >> 4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("chosen", ["full", "auto", (0, 65535)], ids=str)
def test_a_transparent_grey_of_any_depth_is_laid_over_white(bits: int, chosen: object) -> None:
    """Each value once, in turns with its neighbour's: only the transparent one becomes white."""
    white = 2**bits - 1
    for transparent in {0, 1, white // 2, white}:
        values = sorted({0, 1, white // 2, white - 1, white})
        row = "".join(format(value, f"0{bits}b") for value in values)
        row = row.ljust(-(-len(row) // 8) * 8, "0")
        header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big")))]
        plain, hidden = (
            b"\x89PNG\r\n\x1a\n"
            + b"".join(png_chunk(*chunk) for chunk in [chunks[0], *more, chunks[1], (b"IEND", b"")])
            for more in ([], [(b"tRNS", struct.pack(">H", transparent))])
        )
        expected = pixels(plain, chosen).copy()
        expected[:, values.index(transparent)] = 255
        np.testing.assert_array_equal(pixels(hidden, chosen), expected)


@pytest.mark.parametrize("chosen", ["full", "auto"])
def test_a_transparent_colour_of_16_bits_is_one_colour_alone(chosen: object) -> None:
    content = write_png(COLOUR)
    colour = struct.pack(">HHH", *COLOUR[3, 5].tolist())
    expected = pixels(content, chosen).copy()
    expected[3, 5] = 255
    np.testing.assert_array_equal(pixels(content[:33] + png_chunk(b"tRNS", colour) + content[33:], chosen), expected)


@pytest.mark.parametrize(
    "value", ["half", [1], [5, 5], [0, float("nan")], [0, 1, 2], 5, None, ("a", "b"), [None, 3]], ids=str
)
def test_ranges_that_mean_nothing(value: object) -> None:
    with pytest.raises(ValueError, match="expected full, auto, or two numbers"):
        Decoding(value)
    for count in (0, 2.5, None, "many"):
        with pytest.raises(ValueError, match=r"max_pixels is .*, expected a whole number of 1 or more"):
            Decoding(max_pixels=count)


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
    for data in (picture(), np.asarray(picture()), np.asarray(picture())[..., 0].astype(np.uint16)):
        with pytest.raises(ImageDecodeError, match=r"40 x 32 = 1,280 pixels .* max_pixels = 1,279"):
            decode_image(data, Decoding(max_pixels=1279))
        assert decode_image(data, Decoding(max_pixels=1280)).size == (40, 32)
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
