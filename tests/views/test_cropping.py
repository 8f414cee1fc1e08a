"""How a box of an image becomes a crop: against the filter's definition, Pillow, and values that must not change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.views.cropping import RESAMPLING, Box, crop_views, resize_box, to_pixels
from hf_equissl.views.view_specs import ViewSpec


def picture(width: int = 31, height: int = 23) -> np.ndarray:
    """A picture (H, W, 3) of slow waves."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + y / 9), np.cos(x / 7 - y / 4), np.sin(x * y / 90)]
    return np.rint(127.5 + 110 * np.stack(waves, axis=-1)).astype(np.uint8)


def resized(pixels: np.ndarray, box: Box, interpolation: str, size: int) -> np.ndarray:
    out = np.full((size, size, 3), 7, dtype=np.uint8)
    resize_box(pixels, box, interpolation, out)
    return out


def weights(length: int, size: int, interpolation: str) -> np.ndarray:
    """Rows of the antialiased filter (size, length) in float64, from its definition: Keys' cubic with a = -1/2."""
    scale = length / size
    x = np.abs((np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / max(scale, 1.0))
    if interpolation == "bilinear":
        kernel = np.maximum(1 - x, 0)
    else:
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        kernel = np.where(x < 1, near, np.where(x < 2, far, 0))
    return kernel / kernel.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(0, 0, 31, 23), (4, 2, 27, 9), (5, 3, 11, 21)])
@pytest.mark.parametrize("size", [4, 16, 40])
def test_resizing_is_the_filter_of_the_cut(box: tuple[int, int, int, int], interpolation: str, size: int) -> None:
    left, top, right, lower = box
    cut = picture()[top:lower, left:right].astype(np.float64)
    rows, columns = weights(lower - top, size, interpolation), weights(right - left, size, interpolation)
    expected = np.einsum("ih,jw,hwc->ijc", rows, columns, cut).clip(0, 255)
    found = resized(picture(), box, interpolation, size)
    assert np.abs(found - expected).max() < 2  # it rounds to whole numbers twice
    beside = np.full_like(picture(), 255)
    beside[top:lower, left:right] = picture()[top:lower, left:right]
    np.testing.assert_array_equal(resized(beside, box, interpolation, size), found)


@pytest.mark.parametrize(
    ("interpolation", "box"),
    [("bicubic", (3.5, 2.25, 20.5, 19.25)), ("lanczos", (3, 2, 20, 19)), ("nearest", (3, 2, 20, 19))],
)
def test_what_torch_has_not_is_pillow_s(interpolation: str, box: Box) -> None:
    expected = Image.fromarray(picture()).resize((8, 8), RESAMPLING[interpolation], box=box)
    np.testing.assert_array_equal(resized(picture(), box, interpolation, 8), np.asarray(expected))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 9), (9, 1), (2, 2), (8, 8)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_images_of_few_pixels(width: int, height: int, interpolation: str, size: int) -> None:
    plain = np.broadcast_to(np.array([10, 100, 250], dtype=np.uint8), (height, width, 3)).copy()
    np.testing.assert_array_equal(
        resized(plain, (0, 0, width, height), interpolation, size),
        np.broadcast_to(plain[0, 0], (size, size, 3)),
    )
    if width == height == size:
        noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(resized(noise, (0, 0, size, size), interpolation, size), noise)


def test_pixels_stay_as_they_are() -> None:
    """Made by torch 2.13, the same with AVX512, AVX2 and neither: others would be other views of the same run."""
    y, x = np.mgrid[:200, :300]
    pattern = np.stack([x * y // 7, x * x // 50 + y, 3 * x - 2 * y], axis=-1).astype(np.uint8)
    for interpolation, digest in (("bicubic", "99b92c6888a7727a"), ("bilinear", "aae45a16e88e6a59")):
        total = hashlib.sha256()
        for size in (96, 224):
            for box in ((0, 0, 300, 200), (20, 30, 61, 75), (10, 5, 290, 180)):
                total.update(resized(pattern, box, interpolation, size).tobytes())
        assert total.hexdigest()[:16] == digest
    expected = [[[161, 61, 100], [115, 91, 58]], [[127, 81, 199], [130, 111, 67]]]
    assert resized(pattern, (20, 30, 61, 75), "bicubic", 2).tolist() == expected


def test_every_kind_of_image_gives_the_same_crops() -> None:
    pixels, specs = picture(), (ViewSpec(), ViewSpec(crop_scale=None))
    frozen = pixels.copy()
    frozen.flags.writeable = False
    images = [pixels, frozen, np.asfortranarray(pixels), pixels[::-1][::-1], Image.fromarray(pixels)]
    made = [crop_views((image,) * 2, specs, 16, np.random.default_rng(3)) for image in images]
    crops, boxes = made[0]
    assert crops.shape == (2, 3, 16, 16)
    assert crops.permute(0, 2, 3, 1).is_contiguous()
    assert boxes.dtype == torch.float32
    for others, their_boxes in made[1:]:
        assert torch.equal(others, crops)
        assert torch.equal(their_boxes, boxes)
    two = crop_views((pixels, pixels[::-1]), specs[:1] * 2, 16, np.random.default_rng(3))[0]
    assert torch.equal(two[0], crops[0])
    assert to_pixels(pixels) is pixels


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), Image.new("RGBA", (4, 4))])
def test_other_images_are_refused(image: np.ndarray | Image.Image) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\): convert it to RGB"):
        crop_views((image,), (ViewSpec(),), 8, np.random.default_rng(0))
