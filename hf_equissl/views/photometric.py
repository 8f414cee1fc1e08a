"""Colour and blur on batches with one strength per sample: pure functions for the families and the pipelines.

All take images (B, C, H, W) in [0, 1] and factors (B,), return new fp32 images in [0, 1], read no value back to the
host, and are the identity bit for bit at the neutral strength, so that "apply to some samples only" is a neutral
strength for the others. They carry no gradient. C is 3 (RGB) or 1 (grey, which has neither saturation nor hue).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .uniform import as_float_images

# Luma of ITU-R 601 as torchvision and PIL have it.
LUMA = (0.2989, 0.587, 0.114)
# Below this sigma a Gaussian has less than 1e-80 of its weight beside the centre pixel.
MIN_SIGMA = 0.05
# Output elements per pass on a CPU: 1 MB, so that the temporaries stay in its cache (three times faster than RAM).
CPU_CHUNK = 2**18


def _per_sample(factor: Tensor) -> Tensor:
    return factor.float().view(-1, 1, 1, 1)


def _check_channels(images: Tensor) -> Tensor:
    images = as_float_images(images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels: colours need 3 (RGB) or 1 (grey).")
    return images


def _in_chunks(function: Callable[..., Tensor], images: Tensor, *strengths: Tensor) -> Tensor:
    """Call function(images (B, C, H, W), *strengths (B, F)) -> (B, F, C, H, W), on a CPU for a few samples at once."""
    num_fractions = strengths[0].shape[1]
    size = max(1, CPU_CHUNK // max(1, num_fractions * images[0].numel())) if len(images) else 1
    if images.device.type != "cpu" or size >= len(images):
        return function(images, *strengths)
    out = images.new_empty(len(images), num_fractions, *images.shape[1:])
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        out[part] = function(images[part], *(strength[part] for strength in strengths))
    return out


def _luma(images: Tensor) -> Tensor:
    """Turn images (B, C, H, W) grey, (B, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Compute factor * images + (1 - factor) * other, clamped; exactly ``images`` at factor 1."""
    factor = _per_sample(factor)
    return (images * factor).add_(other * (1 - factor)).clamp_(0, 1)


@torch.no_grad()
def to_grayscale(images: Tensor) -> Tensor:
    """Put the luma of ITU-R 601 into all channels, (B, C, H, W)."""
    images = _check_channels(images)
    return _luma(images).repeat(1, images.shape[1], 1, 1)


@torch.no_grad()
def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor`` (B,), 1 is neutral; clamped to [0, 1]."""
    return (as_float_images(images) * _per_sample(factor)).clamp_(0, 1)


@torch.no_grad()
def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to the mean luma of the image (as torchvision) by ``factor`` (B,); 1 is neutral."""
    images = _check_channels(images)
    means = images.mean(dim=(-2, -1), keepdim=True)  # the mean luma is the luma of the means: no grey image is needed
    return _blend(images, _luma(means), factor)


@torch.no_grad()
def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to the luma of each pixel by ``factor`` (B,); 1 is neutral, 0 gives grey."""
    images = _check_channels(images)
    return _blend(images, _luma(images), factor)


@torch.no_grad()
def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the HSV hue by ``turns`` (B,), in whole turns (0.5 is the opposite colour); 0 is neutral.

    The same function as RGB -> HSV, shift, HSV -> RGB, without divisions, masks or gathers. With h in sixths of a turn
    and c = max - min, everything is kept in units of c: c h = sign(g - b) (g + b - r + max - 2 min) in [-3 c, 3 c].
    After the shift, j in [-6 c, 6 c], the channels are the trapezoids of HSV over j, folded so that the period of 6 c
    needs no modulo: r = min + clamp(||j| - 3 c| - c), g and b = min + clamp(2 c - ||j +- c| - 3 c|), clamped to [0, c].
    Grey pixels have c = 0 and stay as they are.
    """
    images = _check_channels(images)
    if images.shape[1] == 1:
        return images.clone()
    return _in_chunks(lambda part, shift: _turn_hue(part, shift[:, 0])[:, None], images, turns[:, None])[:, 0]


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)  # (B, H, W) each
    turns = turns.float().view(-1, 1, 1)
    high = torch.maximum(torch.maximum(green, blue), red)
    low = torch.minimum(torch.minimum(green, blue), red)
    chroma = high - low
    hue = (green + blue).sub_(red).add_(high).sub_(low, alpha=2).copysign_(green - blue)
    hue.addcmul_(chroma, 6 * (turns - turns.round()))
    low_minus, low_plus, triple = low - chroma, low.add(chroma, alpha=2), chroma * 3
    turned = torch.empty_like(images)
    torch.clamp(hue.abs().sub_(triple).abs_().add_(low_minus), low, high, out=turned[:, 0])
    for channel, sign in ((1, 1), (2, -1)):
        fold = hue.add(chroma, alpha=sign).abs_().sub_(triple).abs_()
        torch.clamp(torch.sub(low_plus, fold, out=fold), low, high, out=turned[:, channel])
    # lerp with weights 0 and 1 selects exactly, and is several times faster than torch.where on a CPU.
    return torch.lerp(images, turned, (turns != 0).float()[..., None])


@torch.no_grad()
def solarize(images: Tensor, threshold: Tensor | float) -> Tensor:
    """Invert what is at least ``threshold``, a number or (B,); above 1 it is neutral."""
    images = as_float_images(images)
    if isinstance(threshold, Tensor) and threshold.dim() > 0:
        threshold = _per_sample(threshold)
    return torch.where(images >= threshold, 1 - images, images)


def _jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, turns: Tensor) -> Tensor:
    batch, num_fractions = brightness.shape
    jittered = (images[:, None] * brightness[:, :, None, None, None]).clamp_(0, 1).flatten(0, 1)
    jittered = adjust_contrast(jittered, contrast.reshape(-1))
    jittered = adjust_saturation(jittered, saturation.reshape(-1))
    if images.shape[1] == 3:
        jittered = _turn_hue(jittered, turns.reshape(-1))
    return jittered.view(batch, num_fractions, *images.shape[1:])


@torch.no_grad()
def color_jitter_path(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, turns: Tensor
) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order, at F strengths per sample.

    Args:
        images: (B, C, H, W) in [0, 1].
        brightness: (B, F), factors.
        contrast: (B, F), factors.
        saturation: (B, F), factors.
        turns: (B, F), hue shifts in turns.

    Returns:
        (B, F, C, H, W).
    """
    return _in_chunks(_jitter, _check_channels(images), brightness, contrast, saturation, turns)


def color_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, turns: Tensor) -> Tensor:
    """Apply ``color_jitter_path`` at one strength per sample: factors and turns (B,) -> (B, C, H, W)."""
    strengths = (strength[:, None] for strength in (brightness, contrast, saturation, turns))
    return color_jitter_path(images, *strengths)[:, 0]


def gaussian_weights(sigma: Tensor, radius: int) -> Tensor:
    """Compute a normalised Gaussian: sigma (...) in pixels -> (..., radius + 1), weights at distances 0 to radius."""
    distance = torch.arange(radius + 1, device=sigma.device, dtype=torch.float32)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=MIN_SIGMA)[..., None]) ** 2)
    return weights / (2 * weights.sum(dim=-1, keepdim=True) - 1)  # the centre has weight 1 and counts once


def _blur_axis(padded: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Sum weighted, shifted copies along ``dim``: fp32 whatever autocast or TF32 say, the same bits for any batch."""
    radius = weights.shape[-1] - 1
    size = padded.shape[dim] - 2 * radius
    blurred = padded.narrow(dim, radius, size) * weights[..., 0]
    for distance in range(1, radius + 1):
        pair = padded.narrow(dim, radius - distance, size) + padded.narrow(dim, radius + distance, size)
        blurred.addcmul_(pair, weights[..., distance])
    return blurred


def _blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    radius = kernel_size // 2
    padded = F.pad(images, (radius,) * 4, mode="reflect")[:, None]  # (B, 1, C, H + 2 radius, W + 2 radius)
    weights = gaussian_weights(sigma, radius)[:, :, None, None, None]  # (B, F, 1, 1, 1, radius + 1)
    blurred = _blur_axis(_blur_axis(padded, weights, dim=-1), weights, dim=-2).clamp_(0, 1)
    return blurred.lerp_(images[:, None], (sigma < MIN_SIGMA).float()[:, :, None, None, None])


@torch.no_grad()
def gaussian_blur_path(images: Tensor, sigma: Tensor, kernel_size: int = 13) -> Tensor:
    """Blur by a separable Gaussian at F strengths per sample, with reflected edges (as torchvision).

    Args:
        images: (B, C, H, W) in [0, 1].
        sigma: (B, F) in pixels; below ``MIN_SIGMA`` the image is returned as it is.
        kernel_size: Odd length of the kernel in pixels.

    Returns:
        (B, F, C, H, W).

    Raises:
        ValueError: an even kernel, or an image too small to reflect half a kernel at its edges.
    """
    images = as_float_images(images)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: expected an odd number of at least 1, such as 13.")
    if min(images.shape[-2:]) <= kernel_size // 2:
        raise ValueError(
            f"a blur of kernel_size {kernel_size} needs images of at least {kernel_size // 2 + 1} pixels, not "
            f"{images.shape[-2]} x {images.shape[-1]}; take larger images or a smaller kernel."
        )
    return _in_chunks(lambda part, strength: _blur(part, strength, kernel_size), images, sigma.float())


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int = 13) -> Tensor:
    """Apply ``gaussian_blur_path`` at one strength per sample: sigma (B,) -> (B, C, H, W)."""
    return gaussian_blur_path(images, sigma[:, None], kernel_size)[:, 0]
