"""What an augmentation pipeline does to each view, as checked values: ``ViewSpec``, ``PipelineSpec``, the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.suggestions import check_keys
from .masks import MaskSpec

MOST_LOCAL = {"count": 1024, "size": 2**14}
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")


def _field_names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _mapping(value: Any, key: str, example: str = "flip_probability: 0") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r}, expected settings by name, for example {key}: {{{example}}}.")
    return value


def _check_number(name: str, value: Any, lower: float, upper: float | None) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= lower
    if not good or (upper is not None and value > upper):
        limits = f"in [{lower:g}, {upper:g}]" if upper is not None else f"of at least {lower:g}"
        raise ValueError(f"{name} is {value!r}, expected a number {limits}.")


def _positive_range(name: str, value: Any, upper: float | None) -> tuple[float, float]:
    message = f"{name} is {value!r}, expected two numbers, lower first, above 0" + (
        f", at most {upper:g}." if upper else "."
    )
    try:
        low, high = (float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error
    if not 0.0 < low <= high or (upper is not None and high > upper):
        raise ValueError(message)
    return low, high


@dataclass(frozen=True)
class ViewSpec:
    """One view's crop and colours. The defaults are view 1 of VICReg and BYOL.

    Operations run in the order of the fields: crop, flip, jitter, grayscale, blur, solarize. A probability of 0 skips
    the operation for the whole batch.

    Attributes:
        crop_scale: Area of the crop as a share of the image's, uniform in this range; ``None``: centre crop, as in
            evaluation (see ``cropping.center_box``).
        crop_ratio: Width / height of the crop before resizing, log-uniform in this range.
        interpolation: Filter of the crop's resizing, with antialiasing. Bicubic is what VICReg, DINO, iBOT and DINOv2
            crop with, and what the image processors of released ViTs resize with; bilinear costs ~20 % less.
        flip_probability: Horizontal flip.
        jitter_probability: All four colour factors, in the fixed order brightness, contrast, saturation, hue.
            torchvision draws a new order per image; a fixed order keeps an image's parameters a plain vector.
        brightness, contrast, saturation: Factor uniform in [max(0, 1 - value), 1 + value].
        hue: Shift uniform in [-value, value], in turns of the colour circle.
        grayscale_probability: Luma in all three channels.
        blur_probability: Gaussian blur.
        blur_sigma: Standard deviation in pixels of the view, uniform in this range.
        blur_kernel_size: Odd length of the kernel; ``None``: about a tenth of the view's side (SimCLR's rule), which is
            23 at 224, 9 at 96 and 3 at 32 pixels. Small kernels cut large sigmas off, so small views blur less.
        solarize_probability: Inversion of pixels at or above ``solarize_threshold`` (128 of 255 upstream).
        solarize_threshold: A brightness in [0, 1].
    """

    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel_size: int | None = None
    solarize_probability: float = 0.0
    solarize_threshold: float = 128 / 255

    def __post_init__(self) -> None:
        """Turn YAML's lists into tuples and refuse values that no augmentation can mean."""
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            value = getattr(self, name)
            if value is None and name == "crop_scale":
                continue
            object.__setattr__(self, name, _positive_range(name, value, upper=1.0 if name == "crop_scale" else None))
        for item in dataclasses.fields(self):
            if item.name.endswith("_probability") or item.name == "solarize_threshold":
                _check_number(item.name, getattr(self, item.name), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            _check_number(name, getattr(self, name), 0.0, 100.0)
        _check_number("hue", self.hue, 0.0, 0.5)
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}.")
        size = self.blur_kernel_size
        if size is not None and (not isinstance(size, int) or size < 1 or size % 2 == 0):
            raise ValueError(f"blur_kernel_size is {size!r}, expected an odd positive integer or None.")

    def kernel_size(self, view_size: int) -> int:
        """Return the blur kernel's length for views of ``view_size`` pixels, which mirror once on each side."""
        length = self.blur_kernel_size or max(3, 2 * round((view_size - 10) / 20) + 1)
        return min(length, 2 * view_size - 1)

    def describe(self) -> str:
        """Describe the view in one line."""
        if self.crop_scale is None:
            parts = ["centre crop"]
        else:
            parts = [f"crop {self.crop_scale[0]:g}-{self.crop_scale[1]:g} {self.interpolation}"]
        if self.flip_probability:
            parts.append(f"flip p {self.flip_probability:g}")
        if self.jitter_probability:
            strengths = ", ".join(f"{v:g}" for v in (self.brightness, self.contrast, self.saturation, self.hue))
            parts.append(f"jitter ({strengths}) p {self.jitter_probability:g}")
        if self.grayscale_probability:
            parts.append(f"grayscale p {self.grayscale_probability:g}")
        if self.blur_probability:
            parts.append(f"blur {self.blur_sigma[0]:g}-{self.blur_sigma[1]:g} px p {self.blur_probability:g}")
        if self.solarize_probability:
            parts.append(f"solarize p {self.solarize_probability:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class LocalSpec:
    """Small crops of multi-crop methods: ``count`` views of ``size`` pixels, all drawn from one ``view`` spec."""

    count: int = 8
    size: int = 96
    view: ViewSpec = field(default_factory=lambda: ViewSpec(crop_scale=(0.05, 0.4), blur_probability=0.5))

    def __post_init__(self) -> None:
        """Refuse empty groups."""
        for name in ("count", "size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"local.{name} is {value!r}, expected a positive integer.")
            if value > MOST_LOCAL[name]:
                raise ValueError(f"local.{name} is {value}, expected at most {MOST_LOCAL[name]}.")


@dataclass(frozen=True)
class PipelineSpec:
    """A base method's augmentation pipeline: one spec per global view (view 1 first); local crops and masks or none."""

    views: tuple[ViewSpec, ...] = (ViewSpec(), ViewSpec())
    local: LocalSpec | None = None
    masks: MaskSpec | None = None

    def override(self, overrides: Mapping[str, Any], where: str = "the view pipeline") -> PipelineSpec:
        """Make a copy with other values.

        Args:
            overrides: Fields of ``ViewSpec`` for all global views; ``view_1``, ``view_2`` ... with fields for one of
                them (these win); ``local`` with ``count``, ``size`` and fields of ``ViewSpec``, or ``None`` for none;
                ``masks`` with fields of ``MaskSpec``, or ``None`` for none.
            where: Opens the error message.

        Raises:
            ValueError: A key does not exist (the nearest one is named) or a value is out of range.
        """
        view_fields = _field_names(ViewSpec)
        view_keys = [f"view_{number}" for number in range(1, len(self.views) + 1)]
        check_keys(overrides, [*view_fields, *view_keys, "local", "masks"], where)
        common = {key: value for key, value in overrides.items() if key in view_fields}
        views = []
        for key, spec in zip(view_keys, self.views, strict=True):
            own = _mapping(overrides.get(key, {}), key)
            check_keys(own, view_fields, f"{where}, {key}")
            views.append(dataclasses.replace(spec, **{**common, **own}))
        local = self._override_local(overrides["local"], where) if "local" in overrides else self.local
        masks = self._override_masks(overrides["masks"], where) if "masks" in overrides else self.masks
        return PipelineSpec(tuple(views), local, masks)

    def _override_local(self, overrides: Mapping[str, Any] | None, where: str) -> LocalSpec | None:
        if overrides is None:
            return None
        overrides = dict(_mapping(overrides, "local"))
        check_keys(overrides, [*_field_names(ViewSpec), "count", "size"], f"{where}, local")
        local = self.local or LocalSpec()
        group = {name: overrides.pop(name) for name in ("count", "size") if name in overrides}
        return dataclasses.replace(local, view=dataclasses.replace(local.view, **overrides), **group)

    def _override_masks(self, overrides: Mapping[str, Any] | None, where: str) -> MaskSpec | None:
        if overrides is None:
            return None
        overrides = _mapping(overrides, "masks", "probability: 0.5")
        check_keys(overrides, _field_names(MaskSpec), f"{where}, masks")
        return dataclasses.replace(self.masks or MaskSpec(), **overrides)


def _multi_crop(
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    num_local: int,
    masks: MaskSpec | None = None,
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    blur_kernel_size: int | None = None,
) -> PipelineSpec:
    """Make two global views, the second sometimes solarized, and local crops; ``blur``: p of these three kinds."""
    first, second, local = (ViewSpec(blur_probability=p, blur_kernel_size=blur_kernel_size) for p in blur)
    if blur_kernel_size is None:
        # DINO and iBOT blur with PIL, which cuts nothing off.
        local = dataclasses.replace(local, blur_kernel_size=_WHOLE_BLUR)
    return PipelineSpec(
        views=(
            dataclasses.replace(first, crop_scale=global_scale),
            dataclasses.replace(second, crop_scale=global_scale, solarize_probability=0.2),
        ),
        local=LocalSpec(count=num_local, size=96, view=dataclasses.replace(local, crop_scale=local_scale)),
        masks=masks,
    )


# 4 patches is the smallest area of a block in DINOv2's code, half of the grid the largest.
_DINOV2_MASKS = MaskSpec(kind="stratified", min_patches=4, max_share=0.5)
# Three standard deviations of the largest blur, 2 px, on both sides.
_WHOLE_BLUR = 13

_VICREG = ViewSpec()
_UNCHANGED = ViewSpec(
    crop_scale=None,
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
)

PIPELINES: dict[str, PipelineSpec] = {
    # VICReg, https://arxiv.org/abs/2105.04906, appendix C.1 (BYOL's two asymmetric views).
    "vicreg": PipelineSpec(
        views=(_VICREG, dataclasses.replace(_VICREG, blur_probability=0.1, solarize_probability=0.2)),
    ),
    # DINO, https://arxiv.org/abs/2104.14294: scales of the ViT-S/16 command with multi-crop.
    "dino": _multi_crop((0.4, 1.0), (0.05, 0.4), num_local=8),
    # iBOT, https://arxiv.org/abs/2111.07832: the ViT-S/16 command.
    "ibot": _multi_crop((0.25, 1.0), (0.05, 0.25), num_local=10, masks=MaskSpec()),
    # DINOv2, https://arxiv.org/abs/2304.07193, as its runs were: the blur of the code applies with 1 - p.
    "dinov2": _multi_crop((0.32, 1.0), (0.05, 0.32), 8, _DINOV2_MASKS, blur=(0.0, 0.9, 0.5), blur_kernel_size=9),
    # The same with the probabilities that the code names.
    "dinov2_nominal": _multi_crop((0.32, 1.0), (0.05, 0.32), 8, _DINOV2_MASKS, blur_kernel_size=9),
    # No augmentation: both views start from the same centre crop, and g alone makes them differ.
    "center": PipelineSpec(views=(_UNCHANGED, _UNCHANGED)),
}
