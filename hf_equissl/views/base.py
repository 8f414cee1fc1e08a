"""What every view carries, and what every transformation family g can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class Item:
    """What a data set has under one key, decoded: what views are made of.

    Attributes:
        images: RGB, as arrays uint8 (H, W, 3) or PIL images. One, of which all views are made; or one for each global
            view, in its order.
        parameters: Name -> number, of the transformation between the images; ``None`` where the data has none. A
            ``GivenFamily`` says which of them it takes.
        label: The class, if there is one.
    """

    images: tuple[np.ndarray | Image.Image, ...]
    parameters: Mapping[str, float] | None = None
    label: int | None = None


@dataclass
class Views:
    """Everything that one batch offers to encoders and objectives. Absent parts are ``None`` or empty.

    Pixel values are normalised floats; B images, V global and L local crops, K' reconstruction targets. B does not
    count images that further views have for themselves (``ViewMaker.takes_from_batch``).

    Attributes:
        global_crops: (V, B, C, H, W). View 1 is ``global_crops[0]``; g acts on the last one, ``global_crops[-1]``.
        local_crops: (L, B, C, h, w), for multi-crop objectives.
        intermediate_images: (B, K', C, H, W), reconstruction targets g_{k theta/(K+1)}(u), normalised as the views.
        parameters: (B, p), g's parameters in the family's own units.
        normalized_parameters: (B, p), the same scaled to about [-1, 1] (``TransformationFamily.targets``).
        masks: (V, B, N) bool, patches that the student does not see.
        mask_indices: (M,) int64, positions of the M masked patches in ``masks.flatten()``, in ascending order. Workers
            count them: on a GPU, ``nonzero`` would make the host wait.
        crop_boxes: (V, B, 4), top, left, height, width of each global crop as fractions of the stored image.
        photometric: name -> (V, B, ...), what the augmentation pipeline drew (flip, brightness, ..., blur sigma).
        labels: (B,), int64, only where the data set has them and an objective asks; ``UNLABELLED`` where one image has
            none. Those of images that join the usual ones (``ExtraViews.joins``) follow, as they do in
            ``Features.cls``.
        extra: name -> one tensor (M, C, h, w) per view of that ``ExtraViews``.
        facts: name -> what the maker of those views says of them: plain values and tensors.
    """

    global_crops: Tensor
    local_crops: Tensor | None = None
    intermediate_images: Tensor | None = None
    parameters: Tensor | None = None
    normalized_parameters: Tensor | None = None
    masks: Tensor | None = None
    mask_indices: Tensor | None = None
    crop_boxes: Tensor | None = None
    photometric: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    extra: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Number of images in this batch, B."""
        return self.global_crops.shape[1]

    def map(self, function: Callable[[Tensor], Any]) -> Views:
        """Copy these views, with ``function`` of each tensor in its place."""
        return Views(**{f.name: map_tensors(getattr(self, f.name), function) for f in fields(self)})

    def to(self, device: torch.device | str) -> Views:
        """Copy these views to ``device``."""
        return self.map(lambda tensor: tensor.to(device))


# The label of an image without one: cross-entropy ignores it.
UNLABELLED = -100


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Copy nested dictionaries, lists and tuples, with ``function`` of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_tensors(item, function) for item in value)
    return value


class TransformationFamily(ABC):
    """A kind of image transformation g with known parameters: ``sample``, ``apply``, ``targets``.

    Randomness enters only through ``draws``, uniform numbers in [0, 1) that belong to one sample of one epoch, so the
    same draws give the same parameters on every device, in every process, after every resume.

    Attributes:
        parameter_names: One name per column of the parameters, with its unit in the class docstring.
        num_draws: Uniform numbers that ``sample`` consumes per image.
        continuous: Whether a path from the identity to g exists, i.e. whether ``0 < fraction < 1`` means anything.
        from_data: Whether parameters come with the data, which holds transformed images already: nothing is drawn.
    """

    parameter_names: tuple[str, ...]
    num_draws: int
    continuous: bool = True
    from_data: ClassVar[bool] = False

    @property
    def num_parameters(self) -> int:
        """Width p of the parameters."""
        return len(self.parameter_names)

    @property
    def identity_parameters(self) -> tuple[float, ...]:
        """Parameters of the g that changes nothing, p numbers; zeros unless a family says otherwise."""
        return (0.0,) * self.num_parameters

    @abstractmethod
    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform ``draws`` (B, num_draws) into parameters (B, p)."""

    @abstractmethod
    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Apply g at several fractions of the way from identity (0) to g (1), each directly from ``images``.

        Args:
            images: (B, C, H, W) in [0, 1].
            parameters: (B, p).
            fractions: (F,) in [0, 1].

        Returns:
            (B, F, C, H, W) in [0, 1]. One resampling for all fractions; never g applied repeatedly, which would blur.
        """

    def apply(self, images: Tensor, parameters: Tensor, fraction: float = 1.0) -> Tensor:
        """Apply g at one ``fraction``: images (B, C, H, W), parameters (B, p) -> (B, C, H, W). 0 is the identity."""
        return self.path(images, parameters, torch.full((1,), fraction, device=images.device))[:, 0]

    @abstractmethod
    def targets(self, parameters: Tensor) -> Tensor:
        """Scale parameters (B, p) to about [-1, 1]: what probes regress and what SIE's predictor is given."""
