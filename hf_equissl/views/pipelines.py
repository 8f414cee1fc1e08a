"""From cropped pixels to ``Views``: the base method's augmentation, g, normalisation; batched, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..utils.suggestions import check_keys
from . import photometric
from .base import TransformationFamily, Views
from .cropping import crop_views
from .masks import MaskSpec
from .needs import Needs
from .view_specs import PIPELINES, LocalSpec, PipelineSpec, ViewSpec

__all__ = ["PIPELINES", "LocalSpec", "MaskSpec", "PipelineSpec", "ViewPipeline", "ViewSpec", "build_pipeline"]

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
# At least so many draws come first for g: runs with another g, or with none, then see the same crops and colours.
TRANSFORMATION_DRAWS = 24
# Devices on which counting the selected images does not make the host wait.
SELECTING_IS_FREE = frozenset(["cpu"])


class ViewPipeline:
    """A base method's augmentation pipeline with the transformation family g behind it.

    The work is split in two. ``crop`` runs in a worker on one image and only cuts and resizes, in uint8. Calling the
    pipeline runs on a whole batch, on the batch's device, without waiting for the device: per view flip, colour jitter,
    grayscale, blur, solarize; then g on the last global crop; then normalisation. With u the augmented last crop,

        v_1 = A_1(I), u = A_2(I), v_2 = g_theta(u), u_k = g_{theta k/(K+1)}(u)

    and v_2 and all u_k come from one call of ``TransformationFamily.path``. Pixels stay fp32 in [0, 1] between
    operations (PIL pipelines round to 8 bits after each). All randomness is in the uniform ``draws`` that travel with
    the sample: first g's, then those of each view. Masks are made between the two, by ``ViewCollator`` in the worker,
    from a seed that ``crop`` draws. Only what ``needs`` asks for is computed.

    Args:
        spec: What happens to each view.
        image_size: Side of the global crops.
        transformation: The family g, or ``None``: the last view is then an ordinary view.
        needs: What the objectives ask for.
        image_mean, image_std: Per channel, for images in [0, 1].
        patch_size: The encoder's; masks need it.
        name: For messages.

    Attributes:
        num_draws: Uniform numbers per sample.
        local, masks: What the spec says of them, ``None`` where nothing asks for them.
        grid_side: Patches along each side of a global crop; 0 without ``patch_size``.

    Raises:
        ValueError: The objectives ask for something that this pipeline or this g cannot give.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        *,
        image_size: int,
        transformation: TransformationFamily | None,
        needs: Needs,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        patch_size: int | None = None,
        name: str = "custom",
    ) -> None:
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size is {image_size!r}, expected a positive integer.")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(
                f"image_mean is {image_mean!r} and image_std {image_std!r}, expected three numbers each, std above 0."
            )
        _check_needs(needs, transformation, spec, name)
        self.name, self.spec, self.needs = name, spec, needs
        self.image_size = image_size
        self.transformation = transformation
        self.image_mean, self.image_std = tuple(map(float, image_mean)), tuple(map(float, image_std))
        self.local = spec.local if needs.local_crops else None
        self.masks = spec.masks if needs.masks else None
        self.grid_side = image_size // patch_size if patch_size else 0
        if self.masks is not None:
            if not patch_size:
                raise ValueError(f"patch_size is {patch_size!r}: to mask patches, the pipeline needs the encoder's.")
            self.masks.check_grid(self.grid_side)
        # The full g is the last fraction of the path; objectives may ask for it as a target, too ("2+final").
        full = bool(needs.fractions) and needs.fractions[-1] == 1.0
        self.fractions = needs.fractions if full else (*needs.fractions, 1.0)
        self._transformation_draws = max(TRANSFORMATION_DRAWS, transformation.num_draws if transformation else 0)
        crops = len(spec.views) + (self.local.count if self.local else 0)
        self.num_draws = self._transformation_draws + len(VIEW_DRAWS) * crops
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the tensors kept per device: pipelines travel to worker processes."""
        return {**self.__dict__, "_constants": {}}

    def crop(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """The worker's part: cut and resize.

        Args:
            image: RGB.
            rng: The sample's generator, after its ``num_draws`` uniform numbers were taken.

        Returns:
            ``global_crops`` uint8 (V, 3, S, S); ``crop_boxes`` float32 (V, 4), top, left, height, width as fractions of
            the image (before any flip); with local crops ``local_crops`` uint8 (L, 3, s, s); with masks ``mask_seed``
            int64 (), drawn last, so that masks change no crop. Pixels lie channels-last in memory, as PIL makes them.
        """
        pixels, boxes = crop_views(image, self.spec.views, self.image_size, rng)
        crops = {"global_crops": torch.from_numpy(pixels).permute(0, 3, 1, 2), "crop_boxes": torch.from_numpy(boxes)}
        if self.local is not None:
            pixels, _ = crop_views(image, (self.local.view,) * self.local.count, self.local.size, rng)
            crops["local_crops"] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if self.masks is not None:
            crops["mask_seed"] = torch.tensor(int(rng.integers(1 << 63)))
        return crops

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """The device's part: a collated batch to views.

        Args:
            batch: ``global_crops`` uint8 (B, V, 3, S, S), ``draws`` (B, num_draws); as asked ``crop_boxes`` (B, V, 4),
                ``local_crops`` uint8 (B, L, 3, s, s), ``masks`` (B, V, N) with ``mask_indices`` (M,), ``labels`` (B,).

        Returns:
            Normalised fp32 views on the batch's device. ``photometric`` holds, each (V, B): ``flip``,
            ``jitter_applied``, ``grayscale``, ``solarize`` (bool); the factors ``brightness``, ``contrast``,
            ``saturation`` (1 where jitter was skipped), ``hue`` in turns (0 where skipped); ``blur_sigma`` in pixels
            (0 where skipped). ``crop_boxes`` are those of the stored image: where ``flip`` is set, a box's x runs from
            right to left in the view.
        """
        crops, draws = batch["global_crops"], batch["draws"]
        if draws.shape[1] != self.num_draws:
            raise ValueError(
                f"The batch brings {draws.shape[1]} draws per image, this pipeline uses {self.num_draws}. "
                "Crop and augment with the same pipeline."
            )
        if self.masks is not None and "masks" not in batch:
            raise ValueError("The batch brings no masks. Collate it with ViewCollator(pipeline), not collate_views.")
        # Autocast would run the blur's convolution, and g, in half precision.
        with torch.autocast(device_type=crops.device.type, enabled=False):
            for_g = draws[:, : self._transformation_draws]
            per_crop = draws[:, self._transformation_draws :].unflatten(1, (-1, len(VIEW_DRAWS))).transpose(0, 1)
            views, drawn = [], []
            for number, spec in enumerate(self.spec.views):
                images, parameters = _augment(crops[:, number], per_crop[number], spec)
                views.append(images)
                drawn.append(parameters)
            output = self._transform(views, for_g)
            if self.local is not None:
                # All local crops have one spec: one call for (L * B) of them.
                pixels, own = batch["local_crops"].transpose(0, 1), per_crop[len(views) :]
                images, _ = _augment(pixels.flatten(0, 1), own.flatten(0, 1), self.local.view)
                output.local_crops = self.normalize(images).unflatten(0, pixels.shape[:2])
        if self.masks is not None:
            output.masks, output.mask_indices = batch["masks"].transpose(0, 1).contiguous(), batch["mask_indices"]
        if self.needs.crop_boxes:
            output.crop_boxes = batch["crop_boxes"].transpose(0, 1)
        if self.needs.photometric:
            output.photometric = {key: torch.stack([item[key] for item in drawn]) for key in drawn[0]}
        if self.needs.labels:
            output.labels = batch.get("labels")
        return output

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images (..., 3, H, W) in [0, 1], in place."""
        mean, std, _ = self._on(images.device)
        return images.sub_(mean).div_(std)

    def describe(self) -> str:
        """What this pipeline does, for people."""
        lines = [f"pipeline {self.name}: {len(self.spec.views)} views of {self.image_size} px"]
        lines += [f"  view {number}: {spec.describe()}" for number, spec in enumerate(self.spec.views, start=1)]
        if self.local is not None:
            lines.append(f"  {self.local.count} local crops of {self.local.size} px: {self.local.view.describe()}")
        if self.masks is not None:
            lines.append(f"  {self.masks.describe(self.grid_side)}")
        if self.transformation is None:
            lines.append("  g: none")
        else:
            family = type(self.transformation)
            family_options = {key: self._option(key) for key in signature(family).parameters}
            settings = ", ".join(f"{key}={value}" for key, value in family_options.items() if value is not None)
            lines.append(f"  g on view {len(self.spec.views)}: {family.__name__}({settings})")
        if self.needs.fractions:
            lines.append("  intermediate images at " + ", ".join(f"{value:.3g}" for value in self.needs.fractions))
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.image_mean, self.image_std))
        lines.append(f"  normalised with mean ({mean}), std ({std})")
        return "\n".join(lines)

    def _option(self, key: str) -> Any:
        """An argument that g was built with. SE(2)'s ``path`` is kept as ``path_type``, beside the method."""
        return getattr(self.transformation, f"{key}_type", getattr(self.transformation, key, None))

    def _transform(self, views: list[Tensor], draws: Tensor) -> Views:
        """g on the last view, and normalisation of everything."""
        if self.transformation is None:
            return Views(global_crops=self.normalize(torch.stack(views)))
        parameters = self.transformation.sample(draws[:, : self.transformation.num_draws])
        fractions = self._on(draws.device)[2]
        path = self.normalize(self.transformation.path(views[-1], parameters, fractions))  # (B, F, C, H, W)
        stacked = [self.normalize(view) for view in views[:-1]]
        output = Views(global_crops=torch.stack([*stacked, path[:, -1]]))
        if self.needs.fractions:
            output.intermediate_images = path[:, : len(self.needs.fractions)]
        if self.needs.parameters:
            output.parameters = parameters
            output.normalized_parameters = self.transformation.targets(parameters)
        return output

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (3, 1, 1), std (3, 1, 1) and the path's fractions (F,) on ``device``, copied there once."""
        if device not in self._constants:
            mean, std = (torch.tensor(value).view(3, 1, 1).to(device) for value in (self.image_mean, self.image_std))
            self._constants[device] = (mean, std, torch.tensor(self.fractions, device=device))
        return self._constants[device]


def build_pipeline(
    name: str,
    *,
    image_size: int,
    transformation: TransformationFamily | None,
    needs: Needs,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    patch_size: int | None = None,
    **overrides: Any,
) -> ViewPipeline:
    """The pipeline called ``name`` in ``PIPELINES`` with some values replaced.

    Args:
        name: Key of ``PIPELINES``.
        image_size, transformation, needs, image_mean, image_std, patch_size: See ``ViewPipeline``.
        **overrides: See ``PipelineSpec.override``: ``crop_scale=(0.35, 1.0)`` for all views,
            ``view_2={"blur_probability": 0.5}`` for one, ``local={"count": 6}`` for local crops,
            ``masks={"ratio": (0.1, 0.3)}`` for masks.

    Raises:
        ValueError: Unknown name or key (the nearest one is named), or what ``ViewPipeline`` refuses.
    """
    check_keys([name], PIPELINES, "view pipelines")
    return ViewPipeline(
        PIPELINES[name].override(overrides, where=f"view pipeline {name!r}"),
        image_size=image_size,
        transformation=transformation,
        needs=needs,
        image_mean=image_mean,
        image_std=image_std,
        patch_size=patch_size,
        name=name,
    )


def _augment(pixels: Tensor, draws: Tensor, spec: ViewSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """One view of a batch: uint8 (B, 3, S, S) and draws (B, 10) to fp32 in [0, 1] and what was drawn, each (B,)."""
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    draw = dict(zip(VIEW_DRAWS, draws.unbind(1), strict=True))
    chosen = {
        "flip": draw["flip"] < spec.flip_probability,
        "jitter_applied": draw["jitter_applied"] < spec.jitter_probability,
        "grayscale": draw["grayscale"] < spec.grayscale_probability,
        "solarize": draw["solarize"] < spec.solarize_probability,
    }
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
    sigma = _between(draw["blur_sigma"], *spec.blur_sigma)
    kernel_size = spec.kernel_size(images.shape[-1])

    if spec.flip_probability:
        images = _apply_where(chosen["flip"], lambda x: x.flip(-1), images)
    if spec.jitter_probability and (spec.brightness or spec.contrast or spec.saturation or spec.hue):
        images = _apply_where(chosen["jitter_applied"], photometric.color_jitter, images, *factors.values())
    if spec.grayscale_probability:
        images = _apply_where(chosen["grayscale"], photometric.to_grayscale, images)
    if spec.blur_probability:
        images = _apply_where(blurred, lambda x, s: photometric.gaussian_blur(x, s, kernel_size), images, sigma)
    if spec.solarize_probability:
        images = _apply_where(chosen["solarize"], lambda x: photometric.solarize(x, spec.solarize_threshold), images)
    jittered = chosen["jitter_applied"]
    neutral = {key: torch.where(jittered, value, 0.0 if key == "hue" else 1.0) for key, value in factors.items()}
    return images, {**chosen, **neutral, "blur_sigma": torch.where(blurred, sigma, 0.0)}


def _apply_where(mask: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """``operation`` on the images (B, ...) that ``mask`` (B,) selects, with their rows of ``parameters`` (B,).

    On CPU only the selected images are computed, in place. Elsewhere selecting would wait for the device, so all are
    computed and the result is chosen per image.
    """
    if images.device.type not in SELECTING_IS_FREE:
        return torch.where(mask.view(-1, 1, 1, 1), operation(images, *parameters), images)
    index = mask.nonzero().squeeze(1)
    if len(index) == len(images):
        return operation(images, *parameters)
    if len(index) == 0:
        return images
    return images.index_copy_(0, index, operation(images[index], *(value[index] for value in parameters)))


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _check_needs(needs: Needs, transformation: TransformationFamily | None, spec: PipelineSpec, name: str) -> None:
    """Refuse, before training, what the objectives ask for and this pipeline cannot give."""
    if transformation is None and (needs.fractions or needs.parameters):
        asked = "intermediate images" if needs.fractions else "parameters of g"
        raise ValueError(
            f"An objective asks for {asked}, but the recipe names no transformation. "
            "Set views.transformation, for example {name: rotation}, or drop the equivariance objective."
        )
    if any(not 0.0 <= value <= 1.0 for value in needs.fractions):
        raise ValueError(f"fractions are {needs.fractions}, expected numbers in [0, 1].")
    if transformation is not None and not transformation.continuous and any(0.0 < f < 1.0 for f in needs.fractions):
        raise ValueError(
            f"An objective asks for {type(transformation).__name__} at the fractions {needs.fractions}, but this "
            "family has no path from the identity to g. Choose a continuous one, for example rotation."
        )
    lacking = {
        "local crops": ("local: {count: 8, size: 96}", needs.local_crops and spec.local is None),
        "masks": ("masks: {kind: per_view, probability: 0.5, ratio: [0.1, 0.5]}", needs.masks and spec.masks is None),
    }
    absent = {what: example for what, (example, is_lacking) in lacking.items() if is_lacking}
    if absent:
        having = [key for key, preset in PIPELINES.items() if preset.local and (preset.masks or not needs.masks)]
        raise ValueError(
            f"An objective asks for {' and '.join(absent)}, but the view pipeline {name!r} makes none. Choose one that "
            f"does (views.pipeline.name: {', '.join(having)}), or add, for example, views.pipeline."
            f"{' and views.pipeline.'.join(absent.values())}."
        )
    for missing in needs.extra:
        raise ValueError(f"An objective asks for {missing!r}, which the view pipeline {name!r} does not make.")
