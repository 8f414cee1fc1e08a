"""The angle between two images, read off frozen features by a stored linear probe."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from ..evaluation.data import EvaluationData
from ..evaluation.images import ImageSet
from ..evaluation.metrics import r2_mean
from ..evaluation.ridge import fit_ridge
from ..utils.files import replacing
from ..utils.load_errors import LoadError
from .change import LIMITS, joint_family

PROBE_FILE = "angle_probe.safetensors"
FEATURES = "patch_tokens"
# So many principal components of an image's patch tokens are compared, found on so many images.
COMPONENTS = 64
_BASIS_IMAGES = 1500
_TENSORS = ("mean", "projection", "weight", "bias")


@dataclass(frozen=True)
class AngleProbe:
    r"""Ridge regression of an angle from the patch tokens of an image and of the turned one.

    .. math::
        \hat\theta = \sum_{i<j} w_{ij} (a_i b_j - a_j b_i) + c

    a and b are the whitened principal components of all patch tokens of the first and of the second image, side by
    side, at one length. Edges are mirrored, so that neither image alone tells an angle, and no sum of both does: it
    lies in how they relate. Where turning by theta acts on features as exp(theta A) with A^T = -A, theta to first order
    is such a form, and its sign changes when the images change places.

    Attributes:
        mean: (N D,), of the tokens of the training images.
        projection: (N D, r), from tokens less their mean to components of variance 1.
        weight: (1, r (r - 1) / 2).
        bias: (1,).
        facts: What it was fitted on and how well it reads angles, as JSON values: "encoder_digest", "dataset",
            "train_pairs", "test_pairs", "r2" and "mean_error_degrees" of images that were turned only, "r2_changed"
            and "mean_error_degrees_changed" of those that were shifted, recoloured and blurred, too.
    """

    mean: Tensor
    projection: Tensor
    weight: Tensor
    bias: Tensor
    facts: dict[str, Any]

    def predict(self, first: Tensor, second: Tensor) -> Tensor:
        """Predict by how many degrees the second image was turned: patch tokens (B, N, D), twice -> (B,)."""
        parts = ((tokens.flatten(1) - self.mean) @ self.projection for tokens in (first, second))
        return F.linear(compare_components(*parts), self.weight, self.bias)[:, 0] * LIMITS["angle"][1]

    def save(self, path: Path) -> None:
        """Write the probe, as a safetensors file with ``facts`` among its metadata."""
        with replacing(path) as staging:
            tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
            save_file(tensors, staging, metadata={"facts": json.dumps(self.facts, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, encoder: FrozenEncoder) -> Self:
        """Read the probe of an encoder.

        Raises:
            LoadError: The file is damaged, or the probe was fitted on another encoder: its angles would mean nothing.
        """
        again = "Fit it again: hf-equissl demo --fit_probe --data ..."
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                probe = cls(facts=facts, **{name: file.get_tensor(name) for name in _TENSORS})
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise LoadError(f"{path} is no probe of angles, or damaged ({error}). {again}") from error
        if facts.get("encoder_digest") != encoder.digest():
            raise LoadError(
                f"{path} was fitted on other weights (digest {facts.get('encoder_digest')}) than {encoder.name} has "
                f"({encoder.digest()}). {again}"
            )
        return probe


def fit_angle_probe(encoder: FrozenEncoder, data: EvaluationData, seed: int = 0) -> AngleProbe:
    """Fit the probe on pairs of real images, and measure it on others.

    Each training image is turned, shifted, recoloured and blurred at once (``joint_family``), so that the probe does
    not take other changes for turns. The penalty is chosen by cross-validation (``fit_ridge``).

    Args:
        encoder: The encoder.
        data: Images to fit on, and those to judge by. Labels are not used.
        seed: Of what is drawn.
    """
    first, second, targets = _pairs(encoder, data.train, seed)
    mean, projection = principal_components(first.flatten(1)[:_BASIS_IMAGES], COMPONENTS)
    parts = ((tokens.flatten(1) - mean) @ projection for tokens in (first, second))
    weight, bias = fit_ridge(compare_components(*parts), targets[:, None] / LIMITS["angle"][1])
    probe = AngleProbe(mean, projection, weight, bias, {})
    facts: dict[str, Any] = {
        "encoder_digest": encoder.digest(),
        "features": FEATURES,
        "dataset": Path(data.train.dataset).name,
        "train_pairs": len(first),
        "changes": "turned, shifted, recoloured and blurred at once; edges mirrored",
        "max_degrees": LIMITS["angle"][1],
        "seed": seed,
    }
    for suffix, only_turned in (("", True), ("_changed", False)):
        first, second, targets = _pairs(encoder, data.test, seed + 1, only_turned=only_turned)
        predicted = probe.predict(first, second)
        facts["test_pairs"] = len(first)
        facts[f"r2{suffix}"] = round(r2_mean(predicted, targets), 4)
        facts[f"mean_error_degrees{suffix}"] = round((predicted - targets).abs().mean().item(), 2)
    return replace(probe, facts=facts)


def compare_components(first: Tensor, second: Tensor) -> Tensor:
    """Compute a_i b_j - a_j b_i for all i < j of components at one length: (B, r), twice -> (B, r (r - 1) / 2)."""
    i, j = torch.triu_indices(first.shape[1], first.shape[1], offset=1)
    # At one length, of which the root is that of unit variance: pictures of little contrast are turned as far.
    first, second = (F.normalize(part, dim=1) * part.shape[1] ** 0.5 for part in (first, second))
    return first[:, i] * second[:, j] - first[:, j] * second[:, i]


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the mean (D,) of rows (n, D), and the map (D, r) from what differs from it to r = min(count, n - 1) whitened
    components, those of the most variance.
    """
    mean = rows.mean(0)
    centred = (rows - mean).double()
    values, vectors = torch.linalg.eigh(centred @ centred.T / len(rows))  # of the samples: D may be much larger
    kept = min(count, int((values > values[-1] * 1e-9).sum()))
    values, vectors = values[-kept:], vectors[:, -kept:]
    return mean, (centred.T @ vectors / (values * len(rows) ** 0.5)).float()


def _pairs(
    encoder: FrozenEncoder, images: ImageSet, seed: int, *, only_turned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Change each image once; return the tokens of both (n, N, D) and the angles (n,) in degrees."""
    family = joint_family()
    draws = torch.rand(len(images), family.num_draws, generator=torch.Generator().manual_seed(seed))
    parameters = family.sample(draws)
    if only_turned:
        parameters[:, 1:] = torch.tensor(family.identity_parameters[1:])

    first, second, kept = [], [], []
    for rows, pixels in images.batches(encoder.image_size):
        base = pixels.float() / 255
        changed = family.apply(base, parameters[rows])
        first.append(encoder.encode(base, [FEATURES])[FEATURES])
        second.append(encoder.encode(changed, [FEATURES])[FEATURES])
        kept.append(rows)
    return torch.cat(first), torch.cat(second), parameters[torch.cat(kept), 0]
