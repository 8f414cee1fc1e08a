"""The usual operations on a batch of crops, each image with draws of its own: flip, colours, blur, solarize."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import photometric
from .view_specs import ViewSpec

__all__ = ["VIEW_DRAWS", "apply_where", "augment", "read_draws"]

# Uniform draws of one view, in this order. Every view has all of them, used or not, so that switching one operation
# off changes no other.
VIEW_DRAWS = (
    "flip",
    "jitter_applied",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grayscale",
    "blur_applied",
    "blur_sigma",
    "solarize",
)
# Devices on which counting the selected images does not make the host wait.
SELECTING_IS_FREE = frozenset(["cpu"])


def read_draws(draws: Tensor, spec: ViewSpec) -> dict[str, Tensor]:
    """Turn uniform numbers into what happens to each image of a view.

    Args:
        draws: (B, ``len(VIEW_DRAWS)``), uniform in [0, 1).
        spec: Probabilities and strengths.

    Returns:
        By name, each (B,), as ``ViewPipeline.__call__`` describes it.
    """
    draw = dict(zip(VIEW_DRAWS, draws.unbind(1), strict=True))
    jittered = draw["jitter_applied"] < spec.jitter_probability
    blurred = draw["blur_applied"] < spec.blur_probability
    factors = {
        key: _between(draw[key], max(0.0, 1.0 - strength), 1.0 + strength)
        for key, strength in (
            ("brightness", spec.brightness),
            ("contrast", spec.contrast),
            ("saturation", spec.saturation),
        )
    }
    factors["hue"] = _between(draw["hue"], -spec.hue, spec.hue)
    return {
        "flip": draw["flip"] < spec.flip_probability,
        "jitter_applied": jittered,
        "grayscale": draw["grayscale"] < spec.grayscale_probability,
        "solarize": draw["solarize"] < spec.solarize_probability,
        **{key: torch.where(jittered, value, 0.0 if key == "hue" else 1.0) for key, value in factors.items()},
        "blur_applied": blurred,
        "blur_sigma": torch.where(blurred, _between(draw["blur_sigma"], *spec.blur_sigma), 0.0),
    }


def augment(pixels: Tensor, draws: Tensor, spec: ViewSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """Make one view of each crop.

    Args:
        pixels: uint8 (B, 3, H, W).
        draws: (B, ``len(VIEW_DRAWS)``), uniform in [0, 1).
        spec: Probabilities and strengths.

    Returns:
        Images (B, 3, H, W), fp32 in [0, 1], not normalised yet; and what was drawn, as ``read_draws`` returns it.
    """
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    drawn = read_draws(draws, spec)
    kernel_size = spec.kernel_size(images.shape[-1])
    if spec.flip_probability:
        images = apply_where(drawn["flip"], lambda x: x.flip(-1), images)
    if spec.jitter_probability and (spec.brightness or spec.contrast or spec.saturation or spec.hue):
        factors = [drawn[key] for key in ("brightness", "contrast", "saturation", "hue")]
        images = apply_where(drawn["jitter_applied"], photometric.color_jitter, images, *factors)
    if spec.grayscale_probability:
        images = apply_where(drawn["grayscale"], photometric.to_grayscale, images)
    if spec.blur_probability:
        sigma = drawn["blur_sigma"]
        images = apply_where(
            drawn["blur_applied"], lambda x, s: photometric.gaussian_blur(x, s, kernel_size), images, sigma
        )
    if spec.solarize_probability:
        images = apply_where(drawn["solarize"], lambda x: photometric.solarize(x, spec.solarize_threshold), images)
    return images, drawn


def apply_where(mask: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """Apply ``operation`` to the images (B, ...) that ``mask`` (B,) selects, with their rows of ``parameters``.

    On CPU only the selected images are computed, in place. Elsewhere selecting would wait for the device, so all are
    computed and the result is chosen per image.
    """
    if images.device.type not in SELECTING_IS_FREE:
        return torch.where(mask.view(-1, *[1] * (images.dim() - 1)), operation(images, *parameters), images)
    index = mask.nonzero().squeeze(1)
    if len(index) == len(images):
        return operation(images, *parameters)
    if len(index) == 0:
        return images
    return images.index_copy_(0, index, operation(images[index], *(value[index] for value in parameters)))


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform
