"""STL: read a transformation off one image's two views, and move another image's features by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..distributed.collectives import world_size
from ..views.augmentation import VIEW_DRAWS, augment
from ..views.cropping import crop_views, resize_box, to_pixels
from ..views.makers import ViewMaker, ViewSettings
from ..views.needs import ExtraViews, Needs
from .base import Features, LossOutput, Objective, Reach
from .contrast import CONTRASTS, contrast
from .heads import HyperPredictor, Projector

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Item, Views
    from ..views.facts import ViewFacts

__all__ = ["PairedViews", "STLObjective", "swap"]

logger = logging.get_logger(__name__)

# What the authors draw for each image of a pair on its own.
OWN_DRAWS = ("flip", "blur_applied", "blur_sigma")


class PairedViews(ViewMaker):
    """The global crops, of which images 2i and 2i + 1 of a batch have the same box and the same colours.

    Flip and blur are each image's own, as the authors have it. Images are squashed to the size of the crops first, so
    that one box means the same in both; the draws are those of image 2i, so a pair's views follow from seed, epoch and
    its two images.

    Args:
        settings: Settings of the pipeline.
    """

    replaces_global_crops: ClassVar[bool] = True

    def __init__(self, settings: ViewSettings) -> None:
        super().__init__(settings)
        self.shared = torch.tensor([name not in OWN_DRAWS for name in VIEW_DRAWS])

    def crop(self, item: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Squash the image and draw what happens to each view: ``draws`` (V, n), ``seed`` of the boxes, ``image``.

        Raises:
            ValueError: There is an image for each view.
        """
        if len(item.images) > 1:
            raise ValueError(
                f"STL makes all views of one image, and the data set gives {len(item.images)} at a time. Choose "
                "another equivariance objective."
            )
        size, views = self.settings.image_size, self.settings.spec.views
        draws = torch.from_numpy(rng.random((len(views), len(VIEW_DRAWS)), dtype=np.float32))
        pixels, image = to_pixels(item.images[0]), np.empty((size, size, 3), dtype=np.uint8)
        height, width = pixels.shape[:2]
        resize_box(pixels, (0, 0, width, height), views[0].interpolation, image)
        return {"draws": draws, "seed": int(rng.integers(1 << 63)), "image": image}

    def collate(self, own: Sequence[dict[str, Any]], samples: Any, rng: np.random.Generator) -> dict[str, Any]:
        """Cut the views of each pair alike: ``draws`` (B, V, n), ``pixels`` uint8 (B, V, 3, S, S).

        The last one of an odd number of images, which no training has, is a pair of its own.
        """
        views, size = self.settings.spec.views, self.settings.image_size
        pixels, draws = [], []
        for number, mine in enumerate(own):
            first = own[number - number % 2]
            boxes = np.random.default_rng(first["seed"])
            crops, _ = crop_views((mine["image"],) * len(views), views, size, boxes)
            pixels.append(crops.permute(0, 2, 3, 1))
            draws.append(torch.where(self.shared, first["draws"], mine["draws"]))
        return {"draws": torch.stack(draws), "pixels": torch.stack(pixels).permute(0, 1, 4, 2, 3)}

    def __call__(self, batch: dict[str, Any]) -> tuple[Sequence[Tensor], Any]:
        """Colour the crops: one tensor (B, 3, S, S) per view."""
        pixels, draws = batch["pixels"], batch["draws"]
        specs = self.settings.spec.views
        return [augment(pixels[:, view], draws[:, view], spec)[0] for view, spec in enumerate(specs)], None


class STLObjective(Objective):
    r"""Predict the features of a view by the transformation that another image went through.

    .. math::
        L = w_e\, \ell(E[h_1 ; h_2],\, E[\hat h_1 ; \hat h_2]) +
            w_t\, \ell(P[t^{12}_{even} ; t^{21}_{even}],\, P[t^{12}_{odd} ; t^{21}_{odd}]), \quad
        \hat h_1 = H(\sigma t^{21})\, h_2, \quad \hat h_2 = H(\sigma t^{12})\, h_1, \quad t^{ab} = T(h_a, h_b)

    "Self-supervised Transformation Learning for Equivariant Representations" (https://arxiv.org/abs/2501.08712), as in
    ``model.py`` of jaemyung-u/stl. Images 2i and 2i + 1 of a process's batch are cropped and coloured alike
    (``PairedViews``). h (B, D) are CLS representations of the first and the last global crop, before any stem or
    projector. T, an MLP, reads a code of the transformation off the two views of an image; sigma exchanges the codes of
    a pair, so that no image is predicted with its own; H, a linear hypernetwork, makes a D x D matrix of a code. The
    rows that l contrasts are those of all processes. Nothing is detached. The paper's third term is that of the
    invariance objective.

    Args:
        config: The encoder's configuration.
        facts: Whether there are crops and colours that views can share.
        equivariance_weight, transformation_weight: w_e and w_t.
        temperature: tau.
        contrast: l. "nt_xent", the paper's; or "info_nce", MoCo-v3's in both directions, as the SER paper's port has it
            (``contrast.contrast``).
        coder_sizes: Layer widths of T, the last one that of the codes.
        projector_sizes: Layer widths of E.
        code_projector_sizes: Layer widths of P.

    Logs:
        ``loss_equivariance``, ``loss_transformation``: weighted, they add up to the loss; ``accuracy``: share of
        features and predictions that find each other first; ``code_accuracy``: of the codes of a pair.

    Raises:
        ValueError: Views that do not differ by crop or colours, a negative weight, both 0, a temperature of 0 or less;
            in ``forward``, fewer than two global crops or an odd number of images.
    """

    batch_multiple: ClassVar[int] = 2
    purpose: ClassVar[str] = (
        "STL asks the features of an image to follow a transformation that is read off the two views of another image."
    )
    citation: ClassVar[str] = """@inproceedings{yu2024stl,
  title     = {Self-supervised Transformation Learning for Equivariant Representations},
  author    = {Yu, Jaemyung and Choi, Jaehyun and Lee, Dong-Jae and Hong, HyeongGwon and Kim, Junmo},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2501.08712}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        facts: ViewFacts,
        equivariance_weight: float = 1.0,
        transformation_weight: float = 0.1,
        temperature: float = 0.2,
        contrast: Literal["nt_xent", "info_nce"] = "nt_xent",
        coder_sizes: Sequence[int] = (128, 128),
        projector_sizes: Sequence[int] = (512, 128),
        code_projector_sizes: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__(config)
        weights = (equivariance_weight, transformation_weight)
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                f"STL's weights may not be negative, and one must be above 0: equivariance_weight and "
                f"transformation_weight are {weights}."
            )
        if temperature <= 0:
            raise ValueError(f"`temperature` is {temperature}, expected a value above 0.")
        if contrast not in CONTRASTS:
            raise ValueError(f"`contrast` of STL is {contrast!r}, expected one of {', '.join(CONTRASTS)}.")
        _check_views(facts)
        self.equivariance_weight, self.transformation_weight = weights
        self.temperature, self.form = temperature, contrast
        width = config.hidden_size
        self.coder = Projector(2 * width, coder_sizes, bias=False)
        # The projector's norm takes out by how much its predictions are larger.
        self.transform = HyperPredictor(self.coder.out_features, width, start="authors")
        self.projector = Projector(width, projector_sizes, bias=False)
        self.code_projector = Projector(self.coder.out_features, code_projector_sizes, bias=False)

    @property
    def needs(self) -> Needs:
        """Ask for global crops that pairs of images share."""
        return Needs(extra=(ExtraViews("pairs", PairedViews),))

    @property
    def trains(self) -> Reach:
        """Train everything but the stem."""
        return Reach(stem=False)

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse an odd number of images: one of them has no partner."""
        if images % self.batch_multiple:
            raise ValueError(
                f"STL pairs the images of each process's batch and needs an even number of them, got {images}. Change "
                "`per_device_train_batch_size` and drop the last batch."
            )

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of first and last global crop of ``student``; ``teacher`` and pixels are not used."""
        if len(student.tokens) < 2:
            raise ValueError(f"STL compares two global crops, got {len(student.tokens)}.")
        # Rows of images that join the usual ones are left out: they have no partner.
        h1, h2 = student.tokens[0, :, 0], student.tokens[-1, :, 0]  # (B, D)
        self.check_batch(len(h1), world_size())
        there, back = codes = self.read_codes(h1, h2)
        predicted = self.predict(h1, h2, codes)
        # One pass per view, so that batch normalisation sees one distribution at a time, as the authors do.
        z = torch.cat([self.projector(h1), self.projector(h2)])  # (2B, d)
        z_predicted = torch.cat([self.projector(h) for h in predicted])
        even, odd = (self.code_projector(torch.cat([there[first::2], back[first::2]])) for first in (0, 1))  # (B, d)
        with torch.autocast(z.device.type, enabled=False):  # logits go up to 1 / tau
            equivariance, accuracy = contrast(z.float(), z_predicted.float(), self.temperature, self.form)
            transformation, code_accuracy = contrast(even.float(), odd.float(), self.temperature, self.form)
            parts = {
                "loss_equivariance": self.equivariance_weight * equivariance,
                "loss_transformation": self.transformation_weight * transformation,
            }
            loss = parts["loss_equivariance"] + parts["loss_transformation"]
        logs = {name: part.detach() for name, part in parts.items()}
        return LossOutput(loss, {**logs, "accuracy": accuracy, "code_accuracy": code_accuracy})

    def read_codes(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
        """Read the transformations off two views (B, D): from view 1 to view 2, and back, (B, code) each."""
        return self.coder(torch.cat([h1, h2], dim=1)), self.coder(torch.cat([h2, h1], dim=1))

    def predict(self, h1: Tensor, h2: Tensor, codes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict both views from each other, by the codes of the images' partners: (B, D) each."""
        there, back = codes
        return self.transform(h2, swap(back)), self.transform(h1, swap(there))


def swap(codes: Tensor) -> Tensor:
    """Exchange rows 2i and 2i + 1 of (B, ...)."""
    return codes.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _check_views(facts: ViewFacts) -> None:
    """Refuse views that share nothing which could be read off them; warn where g is not shared."""
    shared = [deviation for name, deviation in facts.deviations.items() if name not in OWN_DRAWS]
    if facts.same_base or (shared and not any(shared)):  # flips and blur alone are each image's own
        raise ValueError(
            "STL reads off two views how they were cropped and coloured, and this view pipeline does neither. Choose "
            "one that does, for example views.pipeline: {name: vicreg}."
        )
    if facts.parameter_names:
        logger.warning_once(
            "STL moves an image's features by what its partner went through. Pairs share crops and colours, and g is "
            "drawn for each image on its own: as published, views.transformation: null."
        )
