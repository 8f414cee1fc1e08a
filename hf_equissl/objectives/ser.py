"""SER: the token map of an intermediate block moves as the image was resized, mirrored and turned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..views.augmentation import VIEW_DRAWS, augment
from ..views.makers import ViewMaker, ViewSettings
from ..views.needs import ExtraViews, Needs
from .base import Features, LossOutput, Objective, Reach
from .contrast import token_contrast

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Item, Views

__all__ = ["Geometry", "SERObjective", "TransformedPairs", "act", "transform"]

NAME = "ser"
FORMS = ("teacher", "student", "symmetric")


class Geometry(NamedTuple):
    """How all images of a batch lie in one view: ``rows`` x ``columns`` tokens, then so many quarter ``turns``."""

    rows: int
    columns: int
    turns: int


class TransformedPairs(ViewMaker):
    """Pairs of views of the last images of a batch, which one map takes into each other for all of these images.

    The crop u of a pair is coloured twice. Each view v is then

        x_v = Rot90^{k_v} o Resize_{h_v x w_v} o HFlip^{f_v} o Rot180^{d_v} (u_v)

    with h_v, w_v (tokens) and k_v drawn for the batch, d_0 and f_0 for each image; d_1 = 1 - d_0 and f_1 = 1 - f_0, so
    that the mirror image between the two views is the same for every image. As in the released code u is a random crop,
    the first global one, and every other local one; notes on the paper have the whole image. Its own flip is part of f.

    Args:
        settings: The pipeline's.
        share: Share of a batch's images that is set apart, rounded to whole images.
        local_pairs: Pairs that are made of local crops.
        grid_scale: Tokens of a view over those of a square one, uniform in this range.
        grid_ratio: Columns over rows, log-uniform in this range.
    """

    reads_global_crops = True

    def __init__(
        self,
        settings: ViewSettings,
        share: float,
        local_pairs: int,
        grid_scale: tuple[float, float],
        grid_ratio: tuple[float, float],
    ) -> None:
        super().__init__(settings)
        if settings.patch_size is None:
            raise ValueError("SER draws grids of patches, and this view pipeline was not told the patch size.")
        if local_pairs and settings.spec.local is None:
            raise ValueError(
                "SER makes pairs of local crops (num_local_crops), and this view pipeline has none. Add them, for "
                "example views.pipeline.local: {count: 4, size: 96}."
            )
        self.share, self.local_pairs = share, local_pairs
        self.patch_size, self.grid_scale, self.grid_ratio = settings.patch_size, grid_scale, grid_ratio
        self.sizes = [settings.image_size, *[settings.spec.local.size if settings.spec.local else 0] * local_pairs]
        first, second = settings.spec.views[0], settings.spec.views[-1]
        if local_pairs and settings.spec.local:
            first = second = settings.spec.local.view
        self.specs = [replace(spec, flip_probability=0.0) for spec in (first, second)]

    def takes_from_batch(self, images: int) -> int:
        """Count the images of the share that is set apart."""
        return sub_batch(images, self.share)

    def crop(self, item: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Draw what belongs to one image: ``draws`` (pairs, 2, n), colours; ``mirrored`` (pairs, 2) bool, f_0, d_0."""
        pairs = len(self.sizes)
        draws = rng.random((pairs, 2, len(VIEW_DRAWS)), dtype=np.float32)
        return {"draws": torch.from_numpy(draws), "mirrored": torch.from_numpy(rng.random((pairs, 2)) < 0.5)}

    def collate(
        self, own: Sequence[dict[str, Any]], samples: Sequence[Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Take the crops of these images, which may be none, and draw the geometry of all views."""
        pairs = len(self.sizes)
        chosen = [[sample["global_crops"][0] for sample in samples]]
        chosen += [[sample["local_crops"][2 * pair] for sample in samples] for pair in range(self.local_pairs)]
        sides = zip(chosen, self.sizes, strict=True)
        return {
            "crops": [_stack(crops, (3, size, size), torch.uint8) for crops, size in sides],
            "draws": _stack([each["draws"] for each in own], (pairs, 2, len(VIEW_DRAWS)), torch.float32),
            "mirrored": _stack([each["mirrored"] for each in own], (pairs, 2), torch.bool),
            "geometries": [list(self.draw(size, rng)) for size in self.sizes for _ in range(2)],
            "most_tokens": [self.most_tokens(size) for size in self.sizes],
        }

    def draw(self, size: int, rng: np.random.Generator) -> Geometry:
        """Draw how the images of one view lie; ``size`` is the side of the crops in pixels."""
        for_area, for_ratio = rng.random(2).tolist()
        low, high = self.grid_scale
        area = (low + (high - low) * for_area) * (size / self.patch_size) ** 2
        low, high = map(math.log, self.grid_ratio)
        ratio = math.exp(low + (high - low) * for_ratio)
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        return Geometry(max(1, rows), max(1, columns), int(rng.integers(4)))

    def most_tokens(self, size: int) -> int:
        """Return a number of tokens that no view exceeds: sides are rounded up by half a token at most."""
        area = self.grid_scale[1] * (size / self.patch_size) ** 2
        around = max(math.sqrt(ratio) + 1 / math.sqrt(ratio) for ratio in self.grid_ratio)
        return max(1, int(area + math.sqrt(area) * around / 2 + 0.25))

    def __call__(self, batch: dict[str, Any]) -> tuple[Sequence[Tensor], Any]:
        """Colour and transform: two views of each pair, (n, 3, h, w)."""
        views = []
        for number, values in enumerate(batch["geometries"]):
            pair, view = divmod(number, 2)
            images, _ = augment(batch["crops"][pair], batch["draws"][:, pair, view], self.specs[view])
            flip, half_turn = (batch["mirrored"][:, pair] ^ bool(view)).unbind(dim=1)
            views.append(transform(images, flip, half_turn, Geometry(*values), self.patch_size))
        return views, {key: batch[key] for key in ("geometries", "most_tokens")}


class SERObjective(Objective):
    r"""Soft equivariance: each token of a transformed image finds the token that the transformation takes it to.

    .. math::
        L = -\frac{1}{T} \sum_{b=1}^{T} \log \frac{e^{q_b^\top k_b / \tau}}
            {e^{q_b^\top k_b / \tau} + \sum_{a :\, i(a) \ne i(b)} e^{q_b^\top k_a / \tau}}, \quad
        \rho_{0 \to 1} = \mathrm{Rot90}^{k_1} \circ \mathrm{Resize}_{h_1 \times w_1} \circ \mathrm{HFlip} \circ
            \mathrm{Rot90}^{2 - k_0}

    "Soft Equivariance Regularization for Invariant Self-Supervised Learning" (https://arxiv.org/abs/2603.06693). A
    share of a batch's images is set apart (``TransformedPairs``). Both views of these are encoded, and their CLS rows
    join those of the other images in the invariance loss. The patch tokens (n, N, D) after block ``layer`` go through a
    LayerNorm of this objective's own and a projector: 1 x 1 convolutions without bias, which are linear layers of
    tokens. rho, which is known, moves one view's map onto the other's grid; q and k are unit tokens of one place of
    both, i their images. Other tokens of an image are neither its positives nor its negatives. Keys, and the number T
    of tokens, are those of all processes, whose grids differ. Three forms:

    - "teacher", released for MoCo-v3 and DINO: q are the student's, k = rho(teacher's) behind the student's projector,
      without gradient; the mean of both directions, 0 to 1 and 1 to 0;
    - "student", released for Barlow Twins: one network, from view 0 to view 1, gradient on both sides;
    - "symmetric", the paper's, and released for 2 + 4 views: NT-Xent on the grid of view 0 over the tokens of both
      views. Negatives are other images' tokens of both views; the other two forms leave those of q's own view out.

    Pairs add up. If all tokens are equal, N images of P tokens give log(1 + (N - 1) P), and log(1 + 2 (N - 1) P) with
    the symmetric form.

    **The released code has no gradient**: it gathers both sides without one, and only logs the loss. Here queries keep
    theirs, and so do keys unless they are a teacher's. Which code is behind the published numbers is not known.

    Sources disagree on lambda / tau for MoCo-v3, DINO and Barlow Twins: the training script has 1.0 / 0.5, 0.3 / 0.4,
    1.0 / 0.4; its defaults 1.0 / 0.2, 0.3 / 0.4, 1.0 / 0.4; names of checkpoints 0.5 / 0.4 and, for Barlow Twins, 0.5
    or 1.0 / 0.4; notes on the paper tau 0.3, 0.5, 0.3. All agree on layer 3 and a share of 0.01.

    The published encoder inserts CLS behind the layer (``model.cls_insertion_layer``), where the gradient then ends;
    any place works. Behind the last block CLS could attend to nothing: to regularise that block insert CLS before it.
    The map is then read behind the encoder's final norm, without one of its own.

    The control of a run, with the same views and CLS rows and without this loss: ``weight: 0`` and ``views: keep``.

    Args:
        config: The encoder's configuration.
        form: "teacher", "student" or "symmetric".
        layer: Block behind which the map is read.
        temperature: tau.
        share: Share of the images of a process's batch that is transformed, rounded.
        num_local_crops: Local crops of the pipeline, an even number, which the invariance objective must read, too: 4
            make the 2 + 4 views. Every other one makes a pair, beside that of the global crop, all coloured as local
            crops. These have no teacher.
        hidden_size, projection_size: Widths of the projector.
        grid_scale: Tokens of a view over those of the square crop, uniform in this range.
        grid_ratio: Columns over rows, log-uniform in this range.

    Logs:
        ``loss_tokens``: the loss; ``cosine``: mean cosine of q_b and k_b; ``accuracy``: share of queries that find
        their key first.

    Raises:
        ValueError: For values out of range, and pairs that the pipeline cannot give; in ``forward``, without a teacher
            that the form needs.
    """

    purpose: ClassVar[str] = (
        "SER asks the token map of one block to be resized, mirrored and turned as the image was, and knows how it was."
    )
    citation: ClassVar[str] = """@inproceedings{lee2026soft,
  title     = {Soft Equivariance Regularization for Invariant Self-Supervised Learning},
  author    = {Lee, Joohyung and Kim, Changhun and Kim, Hyunsu and Lee, Kwanhyung and Lee, Juho},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  url       = {https://arxiv.org/abs/2603.06693}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        form: Literal["teacher", "student", "symmetric"] = "teacher",
        layer: int = 3,
        temperature: float = 0.4,
        share: float = 0.01,
        num_local_crops: int = 0,
        hidden_size: int = 512,
        projection_size: int = 512,
        grid_scale: Sequence[float] = (0.7, 1.3),
        grid_ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__(config)
        _check(form, temperature, share, num_local_crops)
        self.form, self.layer, self.temperature, self.share = form, layer, temperature, share
        self.pairs = 1 + num_local_crops // 2
        self.options = {
            "share": share,
            "local_pairs": num_local_crops // 2,
            "grid_scale": _range("grid_scale", grid_scale),
            "grid_ratio": _range("grid_ratio", grid_ratio),
        }
        width = config.hidden_size
        self.is_last = layer == config.num_hidden_layers
        self.norm = nn.Identity() if self.is_last else nn.LayerNorm(width, config.layer_norm_eps)
        self.teacher_norm = deepcopy(self.norm).requires_grad_(False) if form == "teacher" else None
        self.projector = nn.Sequential(
            nn.Linear(width, hidden_size, bias=False), nn.GELU(), nn.Linear(hidden_size, projection_size, bias=False)
        )

    @property
    def needs(self) -> Needs:
        """Ask for the transformed pairs, which join the usual crops, and for the tokens of the layer."""
        views = ExtraViews(
            NAME,
            TransformedPairs,
            self.options,
            teacher=(0, 1) if self.form == "teacher" else (),
            hidden_layers=() if self.is_last else (self.layer,),
            joins=tuple(range(2 * self.pairs)),
            patches=self.is_last,
            sizes_are_drawn=True,
        )
        return Needs(teacher=self.form == "teacher", extra=(views,))

    @property
    def trains(self) -> Reach:
        """Train the blocks up to the layer, and the final norm where the layer is the last one."""
        return Reach(blocks=self.layer, norm=self.is_last, stem=False)

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield the norm and its copy; the projector has none, and serves both networks."""
        if self.teacher_norm is not None:
            yield self.norm, self.teacher_norm

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a share of no image on a process, of a single one on all of them, and of all images."""
        own = sub_batch(images, self.share)
        if own < 1 or own * processes < 2 or own >= images:
            raise ValueError(
                f"SER tells the tokens of different images apart and needs at least 2 transformed images, 1 on each "
                f"process, beside others; a share of {self.share:g} of {images} images is {own} on each of {processes} "
                "processes. Set objectives.equivariance.*.share, or `per_device_train_batch_size` (gradient "
                "accumulation does not help), and drop the last batch."
            )

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of the transformed pairs; the usual crops are not used."""
        facts = views.facts.get(NAME)
        if facts is None:
            raise ValueError(
                "The views hold no transformed images for SER. Build the view pipeline with this objective's `needs`."
            )
        if self.form == "teacher" and teacher is None:
            raise ValueError('SER of the form "teacher" compares with a teacher, and there is none.')
        results = []
        for pair in range(self.pairs):
            numbers = (2 * pair, 2 * pair + 1)
            seen = [Geometry(*facts["geometries"][number]) for number in numbers]
            maps = [self._map(student.extra[NAME][number], self.norm) for number in numbers]
            taught = maps
            if self.form == "teacher":
                with torch.no_grad():
                    source = cast(Features, teacher).extra[NAME]
                    taught = [self._map(source[number], cast(nn.Module, self.teacher_norm)) for number in numbers]
            with torch.autocast(maps[0].device.type, enabled=False):
                results.append(self._compare(maps, taught, seen, facts["most_tokens"][pair]))
        parts = [torch.stack(values) for values in zip(*results, strict=True)]  # (pairs,) each
        loss = parts[0].sum()
        return LossOutput(
            loss,
            {"loss_tokens": loss.detach(), "cosine": parts[1].detach().mean(), "accuracy": parts[2].detach().mean()},
        )

    def _map(self, features: Features, norm: nn.Module) -> Tensor:
        """Project the tokens of one view: (n, E, rows, columns), fp32."""
        tokens = features if self.is_last else features.hidden[self.layer]
        projected = self.projector(norm(tokens.patches)).float()  # (n, N, E)
        return projected.transpose(1, 2).unflatten(2, tokens.grid)

    def _compare(
        self, maps: Sequence[Tensor], taught: Sequence[Tensor], seen: Sequence[Geometry], most_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, cosine and accuracy of one pair, scalars.

        Args:
            maps: The student's token maps of both views.
            taught: The maps that keys are made of: the teacher's, or the student's again.
            seen: Geometry of both views.
            most_tokens: A number of tokens that no process exceeds.
        """
        if self.form == "symmetric":
            both = torch.stack([_rows(maps[0]), _rows(act(maps[1], seen[1], seen[0]))], dim=2)  # (P, n, 2, E)
            return token_contrast(both, both.flip(2), self.temperature, most_tokens)
        directions = [(0, 1), (1, 0)] if self.form == "teacher" else [(0, 1)]
        found = []
        for source, target in directions:
            keys = _rows(act(taught[source], seen[source], seen[target]))[:, :, None]  # (P, n, 1, E)
            queries = _rows(maps[target])[:, :, None]
            found.append(token_contrast(queries, keys, self.temperature, most_tokens))
        loss, cosine, accuracy = (torch.stack(values).mean() for values in zip(*found, strict=True))
        return loss, cosine, accuracy


def sub_batch(images: int, share: float) -> int:
    """Return how many of a batch's ``images`` are transformed."""
    return round(share * images)


def transform(images: Tensor, flip: Tensor, half_turn: Tensor, geometry: Geometry, patch_size: int) -> Tensor:
    """Make the images of one view.

    Args:
        images: (n, C, S, S).
        flip, half_turn: (n,) bool, of each image.
        geometry: What they share.
        patch_size: Pixels of a token's side.

    Returns:
        (n, C, h, w). Bicubic, and not clipped to the range of ``images``.
    """
    turned = torch.where(half_turn[:, None, None, None], images.flip((-2, -1)), images)
    mirrored = torch.where(flip[:, None, None, None], turned.flip(-1), turned)
    resized = _resize(mirrored, (geometry.rows * patch_size, geometry.columns * patch_size))
    return resized.rot90(geometry.turns, dims=(-2, -1))


def act(maps: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """Move token maps of one view to where they are in the other view of the pair: rho from source to target.

    Args:
        maps: (n, E, a, b), of images that lie as ``source`` says.
        source, target: Geometry of the two views.

    Returns:
        (n, E, c, d), the grid of ``target``.
    """
    upright = maps.rot90(2 - source.turns, dims=(-2, -1)).flip(-1)
    return _resize(upright, (target.rows, target.columns)).rot90(target.turns, dims=(-2, -1))


def _stack(tensors: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Stack tensors of ``shape``, of which there may be none."""
    return torch.stack(list(tensors)) if tensors else torch.zeros(0, *shape, dtype=dtype)


def _rows(maps: Tensor) -> Tensor:
    """Return maps (n, E, a, b) as (a b, n, E): places first, which differ in number between processes."""
    return maps.flatten(2).permute(2, 0, 1)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (n, C, a, b) to ``size`` without antialiasing, images and token maps by the same kernel."""
    if not len(maps):
        return maps.new_zeros(*maps.shape[:2], *size)  # PyTorch resizes no batch without images
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bicubic", align_corners=False)


def _range(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Check a range of positive numbers, lower first."""
    if len(values) != 2 or not 0 < values[0] <= values[1] < math.inf:
        raise ValueError(f"`{name}` of SER is {list(values)}, expected two numbers above 0, lower first.")
    return float(values[0]), float(values[1])


def _check(form: str, temperature: float, share: float, num_local_crops: int) -> None:
    """Refuse values that mean nothing."""
    if form not in FORMS:
        raise ValueError(f"`form` of SER is {form!r}, expected one of {', '.join(map(repr, FORMS))}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` is {temperature}, expected a value above 0.")
    if not 0 < share < 1:
        raise ValueError(f"`share` of SER is {share}, expected a value between 0 and 1, both excluded.")
    if num_local_crops < 0 or num_local_crops % 2:
        raise ValueError(
            f"`num_local_crops` of SER is {num_local_crops}, expected an even number of 0 or more: every other local "
            "crop makes a pair."
        )
    if num_local_crops and form == "teacher":
        raise ValueError(
            'SER of the form "teacher" compares with a teacher, which encodes no local crops. With num_local_crops '
            'choose form: "symmetric", as published, or "student".'
        )
