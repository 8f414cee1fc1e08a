"""From cropped pixels to ``Views``: the base method's augmentation, g, normalisation; batched, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..utils.suggestions import check_keys
from .augmentation import VIEW_DRAWS, augment
from .base import Item, TransformationFamily, Views, map_tensors
from .collator import ViewCollator
from .cropping import crop_views
from .makers import ViewMaker, ViewSettings, derived_generator
from .masks import MaskSpec, draw_masks
from .needs import Needs
from .pipeline_checks import check_extra, check_needs
from .view_specs import PIPELINES, LocalSpec, PipelineSpec, ViewSpec

__all__ = ["PIPELINES", "LocalSpec", "MaskSpec", "PipelineSpec", "ViewPipeline", "ViewSpec", "build_pipeline"]

# So many draws come first for g, whatever it is: runs with another g, or with none, then see the same crops and
# colours. A family that needs more gets the others from a generator of its own.
TRANSFORMATION_DRAWS = 24
# For so many images ``blank`` makes crops, and for so many it draws masks to count masked patches.
BLANK_CROPS, BLANK_MASKS = 16, 256


class ViewPipeline:
    """A base method's augmentation pipeline with the transformation family g behind it.

    The work is split in two. ``crop`` runs in a worker on one image and only cuts and resizes, in uint8. Calling the
    pipeline runs on a whole batch, on the batch's device, without waiting for the device: per view flip, colour jitter,
    grayscale, blur, solarize; then g on the last global crop; then normalisation. With u the augmented last crop,

        v_1 = A_1(I), u = A_2(I), v_2 = g_theta(u), u_k = g_{theta k/(K+1)}(u)

    and v_2 and all u_k come from one call of ``TransformationFamily.path``. Pixels stay fp32 in [0, 1] between
    operations (PIL pipelines round to 8 bits after each). All randomness is in the uniform ``draws`` that travel with
    the sample: first g's, then those of each view. Masks are made between the two, by ``ViewCollator`` in the worker,
    from a seed that ``crop`` draws; so is what a batch shares of further views (``ExtraViews``). Only what ``needs``
    asks for is computed.

    Args:
        spec: What happens to each view.
        image_size: Side of the global crops.
        transformation: The family g, or ``None``: the last view is then an ordinary view.
        needs: What the objectives ask for.
        image_mean, image_std: Per channel, for images in [0, 1].
        patch_size: The encoder's; masks need it.
        name: Its name in messages.

    Attributes:
        num_draws: Uniform numbers per sample.
        local, masks: What the spec says of them, ``None`` where nothing asks for them.
        makers: name -> the maker of those further views.
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
        # Far beyond what pixels can need, and near enough for float32: 1 / 1e-300 is infinite there.
        sane = all(abs(value) <= 1e6 for value in image_mean) and all(1e-6 <= value <= 1e6 for value in image_std)
        if len(image_mean) != 3 or len(image_std) != 3 or not sane:
            raise ValueError(
                f"image_mean is {image_mean!r} and image_std {image_std!r}, expected three numbers each, std above 0 "
                "(1e-6 to 1e6)."
            )
        check_needs(needs, transformation, spec, name)
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
        settings = ViewSettings(image_size, patch_size, spec)
        self.makers: dict[str, ViewMaker] = {e.name: e.maker(settings, **e.options) for e in needs.extra}
        check_extra(self, name)
        self._more_draws = max(0, (transformation.num_draws if transformation else 0) - TRANSFORMATION_DRAWS)
        self._transformation_draws = TRANSFORMATION_DRAWS + self._more_draws
        crops = len(spec.views) + (self.local.count if self.local else 0)
        self.num_draws = self._transformation_draws + len(VIEW_DRAWS) * crops
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tensors kept per device: pipelines travel to worker processes."""
        return {**self.__dict__, "_constants": {}}

    @property
    def replacing(self) -> str | None:
        """The name of the further views that take the place of the global crops, if there are any."""
        return next((name for name, maker in self.makers.items() if maker.replaces_global_crops), None)

    # ---- in a worker ----

    def crop(self, item: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Draw everything that belongs to one image, cut and resize: the worker's part.

        Args:
            item: The decoded image, or one for each global view.
            rng: The sample's generator, from (seed, epoch, image).

        Returns:
            ``draws`` float32 (num_draws,); ``global_crops`` uint8 (V, 3, S, S); ``crop_boxes`` float32 (V, 4), top,
            left, height, width as fractions of the image (before any flip); where there are any, ``local_crops``
            uint8 (L, 3, s, s) with ``local_boxes`` (L, 4), ``mask_seed``, ``parameters`` (p,), ``label``; with further
            views ``extra``, what their makers returned by name, and ``seed``. Pixels lie channels-last in memory, as
            decoders make them.

        Raises:
            ValueError: Neither one image nor one per global view; or no parameters, where g is in the data.
        """
        draws = rng.random(self.num_draws - self._more_draws, dtype=np.float32)
        sample: dict[str, Any] = {}
        if self.replacing is None:
            images = self._image_of_each_view(item)
            sample["global_crops"], sample["crop_boxes"] = crop_views(images, self.spec.views, self.image_size, rng)
        if self.local is not None:
            count = self.local.count
            specs = (self.local.view,) * count
            sample["local_crops"], sample["local_boxes"] = crop_views(
                item.images[:1] * count, specs, self.local.size, rng
            )
        # What follows is drawn last, so that masks and further views change no crop.
        if self.masks is not None:
            sample["mask_seed"] = int(rng.integers(1 << 63))
        if self.makers or self._more_draws:
            seed = sample["seed"] = int(rng.integers(1 << 63))
            sample["extra"] = {
                name: maker.crop(item, derived_generator(seed, name)) for name, maker in self.makers.items()
            }
            more = derived_generator(seed, "transformation").random(self._more_draws, dtype=np.float32)
            draws = np.concatenate((draws[:TRANSFORMATION_DRAWS], more, draws[TRANSFORMATION_DRAWS:]))
        sample["draws"] = torch.from_numpy(draws)
        if self.transformation is not None and self.transformation.from_data:
            sample["parameters"] = self._given_parameters(item)
        if item.label is not None:
            sample["label"] = item.label
        return sample

    def _image_of_each_view(self, item: Item) -> tuple[np.ndarray | Image.Image, ...]:
        views = len(self.spec.views)
        if len(item.images) not in (1, views):
            raise ValueError(
                f"The data set gives {len(item.images)} images at a time, and the view pipeline {self.name!r} makes "
                f"{views} views: of one image, or of {views}."
            )
        return item.images * (views // len(item.images))

    def _given_parameters(self, item: Item) -> Tensor:
        names, given = self.transformation.parameter_names if self.transformation else (), item.parameters or {}
        if absent := [name for name in names if name not in given]:
            raise ValueError(
                f"views.transformation takes {', '.join(absent)} from the data, and the data set gives "
                f"{', '.join(given) or 'no parameters'}."
            )
        return torch.tensor([given[name] for name in names], dtype=torch.float32)

    # ---- on the device ----

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Views:
        """Make views of a collated batch: the device's part.

        Args:
            batch: What ``ViewCollator`` returns, its tensors on the device.

        Returns:
            Normalised fp32 views on the batch's device. ``photometric`` holds, each (V, B): ``flip``,
            ``jitter_applied``, ``grayscale``, ``blur_applied``, ``solarize`` (bool); the factors ``brightness``,
            ``contrast``, ``saturation`` (1 where jitter was skipped), ``hue`` in turns (0 where skipped);
            ``blur_sigma`` in pixels (0 where skipped). ``crop_boxes`` are those of the stored image: where ``flip`` is
            set, a box's x runs from right to left in the view.

        Raises:
            ValueError: The batch was cropped for another pipeline.
        """
        draws = batch["draws"]
        self._check_batch(batch)
        # Autocast would run the blur's convolution, and g, in half precision; "meta" computes nothing and has none.
        kind = draws.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            made = {name: maker(batch["extra"][name]) for name, maker in self.makers.items()}
            for_g = draws[:, : self._transformation_draws]
            per_crop = draws[:, self._transformation_draws :].unflatten(1, (-1, len(VIEW_DRAWS))).transpose(0, 1)
            views, drawn = [], []
            if self.replacing is not None:
                views = list(made.pop(self.replacing)[0])
            else:
                for number, spec in enumerate(self.spec.views):
                    images, parameters = augment(batch["global_crops"][:, number], per_crop[number], spec)
                    views.append(images)
                    drawn.append(parameters)
            output = self._transform(views, for_g, batch.get("parameters"))
            if self.local is not None:
                # All local crops have one spec: one call for (L * B) of them.
                pixels, own = batch["local_crops"].transpose(0, 1), per_crop[len(self.spec.views) :]
                images, _ = augment(pixels.flatten(0, 1), own.flatten(0, 1), self.local.view)
                output.local_crops = self.normalize(images).unflatten(0, pixels.shape[:2])
            for name, (further, facts) in made.items():
                output.extra[name] = tuple(self.normalize(view) for view in further)
                if facts is not None:
                    output.facts[name] = facts
        if self.masks is not None:
            output.masks, output.mask_indices = batch["masks"].transpose(0, 1).contiguous(), batch["mask_indices"]
        if self.needs.crop_boxes:
            output.crop_boxes = batch["crop_boxes"].transpose(0, 1)
        if self.needs.photometric:
            output.photometric = {key: torch.stack([item[key] for item in drawn]) for key in drawn[0]}
        if self.needs.labels:
            output.labels = batch.get("labels")
        return output

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        if batch["draws"].shape[1] != self.num_draws:
            raise ValueError(
                f"The batch brings {batch['draws'].shape[1]} draws per image, this pipeline uses {self.num_draws}. "
                "Crop and augment with the same pipeline."
            )
        if self.masks is not None and "masks" not in batch:
            raise ValueError("The batch brings no masks. Collate it with ViewCollator(pipeline), not collate_views.")

    def blank(self, images: int, device: torch.device | str = "cpu") -> Views:
        """Make views of a batch of grey images: their shapes and types are those of training.

        ``mask_indices`` count as many masked patches as batches have on average, whatever ``masks`` hold.

        Args:
            images: B, as a DataLoader gives it: further views may take some of them for themselves.
            device: Where the device's part runs; on "meta" it computes nothing.
        """
        side = 2 * self.image_size
        names = self.transformation.parameter_names if self.transformation and self.transformation.from_data else ()
        grey = Image.new("RGB", (side, side), (128, 128, 128))
        item = Item((grey,), parameters=dict.fromkeys(names, 0.0), label=0)
        crops = [self.crop(item, np.random.default_rng(number)) for number in range(min(images, BLANK_CROPS))]
        for crop in crops:  # so that large batches of them take no memory on "meta"
            crop |= {key: crop[key].to(device) for key in ("global_crops", "local_crops") if key in crop}
        samples = [{**crops[number % len(crops)], "index": number} for number in range(images)]
        views = self(map_tensors(ViewCollator(self)(samples), lambda tensor: tensor.to(device)))
        if views.masks is not None and self.masks is not None:
            drawn = draw_masks(self.masks, range(BLANK_MASKS), len(views.masks), self.grid_side)
            count = round(drawn.sum() / BLANK_MASKS * views.batch_size)
            views.mask_indices = torch.zeros(count, dtype=torch.int64, device=device)
        return views

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images (..., 3, H, W) in [0, 1], in place, and return them."""
        mean, std, _ = self._on(images.device)
        return images.sub_(mean).div_(std)

    def describe(self) -> str:
        """Say what this pipeline does, for people."""
        lines = [f"pipeline {self.name}: {len(self.spec.views)} views of {self.image_size} px"]
        lines += [f"  view {number}: {spec.describe()}" for number, spec in enumerate(self.spec.views, start=1)]
        if self.local is not None:
            lines.append(f"  {self.local.count} local crops of {self.local.size} px: {self.local.view.describe()}")
        if self.masks is not None:
            lines.append(f"  {self.masks.describe(self.grid_side)}")
        lines += [f"  further views {name}: {type(maker).__name__}" for name, maker in self.makers.items()]
        if self.transformation is None:
            lines.append("  g: none")
        else:
            lines.append(f"  g on view {len(self.spec.views)}: {_describe_family(self.transformation)}")
        if self.needs.fractions:
            lines.append("  intermediate images at " + ", ".join(f"{value:.3g}" for value in self.needs.fractions))
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.image_mean, self.image_std))
        lines.append(f"  normalised with mean ({mean}), std ({std})")
        return "\n".join(lines)

    def _transform(self, views: list[Tensor], draws: Tensor, given: Tensor | None) -> Views:
        """Apply g to the last view, and normalise everything."""
        family = self.transformation
        if family is None:
            return Views(global_crops=self.normalize(torch.stack(views)))
        if family.from_data:
            parameters, path = given, None
            output = Views(global_crops=self.normalize(torch.stack(views)))
        else:
            parameters = family.sample(draws[:, : family.num_draws])
            fractions = self._on(draws.device)[2]
            path = self.normalize(family.path(views[-1], parameters, fractions))  # (B, F, C, H, W)
            stacked = [self.normalize(view) for view in views[:-1]]
            output = Views(global_crops=torch.stack([*stacked, path[:, -1]]))
        if self.needs.fractions and path is not None:
            output.intermediate_images = path[:, : len(self.needs.fractions)]
        if self.needs.parameters and parameters is not None:
            output.parameters = parameters
            output.normalized_parameters = family.targets(parameters)
        return output

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (3, 1, 1), std (3, 1, 1) and the path's fractions (F,) on ``device``, copied there once."""
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
    """Build the pipeline called ``name`` in ``PIPELINES`` with some values replaced.

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


def _describe_family(family: TransformationFamily) -> str:
    """Say a family's class and the values that it was built with."""
    settings = []
    for key in signature(type(family)).parameters:
        # SE(2)'s argument ``path`` is kept as ``path_type``, beside the method.
        value: Any = getattr(family, f"{key}_type", getattr(family, key, None))
        if key == "families":
            value = ", ".join(_describe_family(member) for member in value)
        if value is not None:
            settings.append(f"{key}={value}")
    return f"{type(family).__name__}({', '.join(settings)})"
