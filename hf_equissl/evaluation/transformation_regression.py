"""How much of a transformation can be read off frozen features: regression of g's parameters from a pair of images."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..encoders.frozen import FrozenEncoder
from ..utils.devices import choose_precision
from ..utils.options import Option
from ..views import TRANSFORMATIONS, build_transformation
from ..views.base import TransformationFamily
from .base import Evaluator, Plot
from .circular_mask import DiskFamily
from .data import EvaluationData
from .images import ImageSet
from .metrics import R2, R2_FEW_SHOT, R2_LINEAR, R2_SCALAR, Metric, r2_mean, r2_per_parameter, r2_scalar
from .options import CIRCLE, DEFAULT_FAMILIES, REGRESSION_OPTIONS
from .probes import RegressionProbe, feature_statistics, seeded_permutation
from .r2_plot import describe_r2, fill_of, plot_r2
from .results import ResultRecord
from .ridge import PENALTIES, fit_ridge

# Draws for the test images are one fixed set, whatever the seeds of the heads.
_TEST_DRAW = -1


class TransformationRegressionEvaluator(Evaluator):
    r"""R2 of g's parameters, regressed from frozen features of I and g(I).

    Task of "Self-Supervised Learning based on Transformed Image Reconstruction for Equivariance-Coherent Feature
    Representation" (https://arxiv.org/abs/2503.18753), one family at a time; the head is SIE's
    (https://github.com/facebookresearch/SIE). For features f:

        theta_hat = MLP([f(I) ; f(g_theta(I))]),    R2 = 1 - sum (theta - theta_hat)^2 / sum (theta - mean theta)^2

    - I is the base image: shorter side 256/224 S (below S = 96: S), centre crop S, no augmentation (``base_image``).
    - theta is drawn per image from the family's own range; targets are theta over its range. Test draws are fixed.
    - The probe sees ``num_draws`` different theta per training image, epoch e draw e mod ``num_draws``. ``None`` means
      a new one each epoch, the full protocol: the encoder then runs over the training images in every epoch. Fewer
      draws are stored and reused: draws x images x width x 4 bytes of memory.
    - MLP with hidden layers 1024, 1024 and ReLU, MSE, Adam with cosine decay; the last epoch counts, never the best.
    - ``standardize`` shifts and scales every feature dimension by the mean and standard deviation of the training
      images I. Encoders and slices of their stem differ in scale, and Adam's step does not.

    Records: ``r2``, the mean over parameters of R2 (primary; each parameter's in ``details``), ``r2_scalar``, with one
    mean over all entries as in SIE's code, and two of probes with little capacity: ``r2_linear``, ridge regression of
    theta on the pair, and ``r2_few_shot``, the same on few pairs, which the seed draws. An MLP on many images reads
    much off raw pixels, too: an R2 says something about an encoder beside that of ``raw_pixels`` and of the untrained
    encoder (``open_frozen``), and the less a probe can learn by itself, the more.

    The encoder runs once over I for all families and once over g(I) per family and draw, for all kinds of features
    and all seeds together.
    """

    name: ClassVar[str] = "transformation_regression"
    metrics: ClassVar[tuple[Metric, ...]] = (R2, R2_SCALAR, R2_LINEAR, R2_FEW_SHOT)
    unmeasured: ClassVar[str] = "what the features keep of transformations"
    reading: ClassVar[str] = (
        "R2: 1 is perfect, 0 knows nothing; r2_linear is of a linear probe, r2_few_shot of few images."
    )
    has_related_tasks: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = REGRESSION_OPTIONS
    # 32-pixel images on one CPU core (CIFAR-10, 50,000 images): two theta per image, shared by eight epochs. More
    # draws and epochs raise every encoder's R2 a little and cost minutes; the order of encoders stays.
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {"epochs": 8, "num_draws": 2, "precision": "auto"},
    }
    plots: ClassVar[tuple[Plot, ...]] = (Plot("r2.png", "R2 of transformation parameters", plot_r2, describe_r2),)

    def __init__(
        self,
        data: EvaluationData,
        families: Sequence[str] | Mapping[str, TransformationFamily] = DEFAULT_FAMILIES,
        *,
        features: Sequence[str] = ("backbone",),
        seeds: int | Sequence[int] = 3,
        train_images: int | None = 100_000,
        epochs: int = 50,
        num_draws: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        hidden_width: int = 1024,
        standardize: bool = True,
        linear_images: int = 5000,
        few_shot_images: int = 100,
        precision: Literal["auto", "fp32", "bf16"] = "fp32",
        fill: str | None = None,
        family_options: Mapping[str, Mapping[str, Any]] | None = None,
        draw_seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Prepare the families.

        Args:
            data: Train and test images; labels are not used.
            families: Registry names, or families by name.
            features: Kinds of features (``FrozenEncoder``), each with a probe of its own; the first is the primary one.
            seeds: Seeds of the probe's weights and batches; a number n means 0 ... n - 1.
            train_images: Fit on a fixed random part of the training images of this size; ``None``: on all.
            epochs: Passes of the probe over the training images.
            num_draws: Different theta per training image; ``None``: one per epoch.
            batch_size: Pairs per step.
            learning_rate: Adam's, at the start.
            hidden_width: Width of both hidden layers.
            standardize: Whether features are standardised.
            linear_images: The most pairs that the linear probe is fitted on, one draw of each image.
            few_shot_images: Pairs that the linear probe of few images is fitted on.
            precision: "bf16" fits the probe under bfloat16 autocast, "auto" where the encoder's device has units for
                it; the probe predicts in float32.
            fill: "zeros", "reflect" or "border" outside the image, for the families that have it; "circle" shows both
                images through the disk that such a family never leaves empty (``DiskFamily``). Black corners and edges
                tell how far an image was turned or shifted: "reflect" and "circle" are the controls. ``None``: the
                family's default.
            family_options: Further keyword arguments by family name.
            draw_seed: Seed of all theta.
            progress: Whether to show a bar.
        """
        super().__init__(data, features=features, seeds=seeds)
        if isinstance(families, str):
            families = (families,)
        if epochs < 1 or batch_size < 1 or (num_draws is not None and num_draws < 1):
            raise ValueError(
                f"epochs, batch_size and num_draws must be at least 1, got {epochs}, {batch_size}, {num_draws}."
            )
        if linear_images < 1 or few_shot_images < 1:
            raise ValueError(
                f"linear_images and few_shot_images must be at least 1, got {linear_images} and {few_shot_images}."
            )
        if isinstance(families, Mapping):
            self.families = dict(families)
        else:
            options = family_options or {}
            self.families = {name: _build_family(name, fill, options.get(name, {})) for name in families}
        if not self.families:
            raise ValueError(f"Name at least one family: {', '.join(TRANSFORMATIONS)}.")
        self.tasks = tuple(self.families)
        self.train = data.train.subset(train_images)
        self.epochs, self.num_draws = epochs, min(num_draws or epochs, epochs)
        self.batch_size, self.learning_rate, self.hidden_width = batch_size, learning_rate, hidden_width
        self.standardize, self.precision, self.draw_seed, self.progress = standardize, precision, draw_seed, progress
        self.linear_images = min(linear_images, len(self.train))
        self.few_shot_images = min(few_shot_images, len(self.train))

    @classmethod
    def variant(cls, record: ResultRecord) -> str:
        """Return what fills the image, where a family leaves a part of it empty."""
        return fill_of(record)

    def settings(self, task: str) -> dict[str, Any]:
        """Return the settings of the probe and of the family."""
        return {
            "family": describe_family(self.families[task]),
            "probe_train_images": len(self.train),
            "epochs": self.epochs,
            "num_draws": self.num_draws,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "schedule": "cosine",
            "optimizer": "adam",
            "hidden_width": self.hidden_width,
            "standardize": self.standardize,
            "linear_images": self.linear_images,
            "few_shot_images": self.few_shot_images,
            "ridge_penalties": list(PENALTIES),
            "probe_precision": self.precision,
            "draw_seed": self.draw_seed,
        }

    def protocol(self, encoder: FrozenEncoder, task: str, test: ImageSet | None = None) -> dict[str, Any]:
        """Return ``settings`` and what depends on the encoder: the precision that "auto" means on its device."""
        precision = choose_precision(self.precision, encoder.device)
        return {**super().protocol(encoder, task, test), "probe_precision": precision}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Fit the probes of one family, and judge them on every test set."""
        encoder.check_features(self.features_of(encoder))
        family = self.families[task]
        for part in self.data.tests:
            all_targets = family.targets(self.parameters(task, len(part), _TEST_DRAW))
            r2_per_parameter(all_targets, all_targets)  # raises now if R2 will be undefined
        tests = [self._test_pairs(encoder, part, task) for part in self.data.tests]
        train_rows, train_first = self._base(encoder, self.train, task)
        scalings = {name: feature_statistics(value) for name, value in train_first.items()}

        def scaled(name: str, value: Tensor) -> Tensor:
            mean, std = scalings[name]
            return (value - mean) / std if self.standardize else value

        first = {name: scaled(name, value) for name, value in train_first.items()}
        probes = {
            (name, seed): self._probe(encoder, 2 * first[name].shape[1], family, seed)
            for name in self.features_of(encoder)
            for seed in seeds
        }
        linear: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}
        for draw, features in self._epochs(encoder, task, scaled):
            targets = family.targets(self.parameters(task, len(self.train), draw)[train_rows])
            for name in self.features_of(encoder) if not linear else ():
                linear[name] = self._linear(torch.cat([first[name], features[name]], 1), targets, seeds)
            for (name, _), probe in probes.items():
                probe.fit_epoch(first[name], features[name], targets)
        records = []
        for part, (test_first, test_second, test_targets) in zip(self.data.tests, tests, strict=True):
            for name in self.features_of(encoder):
                pair = scaled(name, test_first[name]), scaled(name, test_second[name])
                predictions = [probes[name, seed].predict(*pair) for seed in seeds]
                per_parameter = [r2_per_parameter(predicted, test_targets) for predicted in predictions]
                values = {
                    R2.name: [value.mean().item() for value in per_parameter],
                    R2_SCALAR.name: [r2_scalar(predicted, test_targets) for predicted in predictions],
                }
                for metric, fits in zip((R2_LINEAR, R2_FEW_SHOT), linear[name], strict=True):
                    values[metric.name] = [r2_mean(F.linear(torch.cat(pair, 1), *fit), test_targets) for fit in fits]
                details = {
                    f"{R2.name}_{parameter}": [value[column].item() for value in per_parameter]
                    for column, parameter in enumerate(family.parameter_names)
                }
                records += self.records(encoder, task, name, values, seeds, details, part)
        return records

    def _test_pairs(
        self, encoder: FrozenEncoder, images: ImageSet, task: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Compute features of I and of g(I), and the targets, for the images of a test set that decode."""
        rows, first = self._base(encoder, images, task)
        _, second = self._transform(encoder, images, task, _TEST_DRAW)
        return first, second, self.families[task].targets(self.parameters(task, len(images), _TEST_DRAW))[rows]

    def _base(self, encoder: FrozenEncoder, images: ImageSet, task: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute features of I, through the disk where g(I) is seen through one: rows (m,), name -> (m, .)."""
        family = self.families[task]
        if isinstance(family, DiskFamily):
            return images.encode(encoder, self.features_of(encoder), lambda pixels, _: family.mask(pixels))
        return images.features(encoder, self.features_of(encoder))

    def _linear(self, pairs: Tensor, targets: Tensor, seeds: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
        """Fit the linear probe, the same for each seed, and that of few images: two lists of weights and biases."""
        count = len(targets)
        chosen = seeded_permutation(count, 0)[: self.linear_images]
        few = [seeded_permutation(count, 1, seed)[: self.few_shot_images] for seed in seeds]
        return [
            [fit_ridge(pairs[chosen], targets[chosen])] * len(few),
            [fit_ridge(pairs[rows], targets[rows]) for rows in few],
        ]

    def parameters(self, task: str, count: int, draw: int) -> Tensor:
        """Draw parameters for all images of a set, (count, p): a function of (draw_seed, family, draw)."""
        family = self.families[task]
        key = zlib.crc32(f"{self.draw_seed}/{task}/{draw}".encode())
        uniform = torch.rand(count, family.num_draws, generator=torch.Generator().manual_seed(key))
        return family.sample(uniform)

    def _probe(self, encoder: FrozenEncoder, width: int, family: TransformationFamily, seed: int) -> RegressionProbe:
        return RegressionProbe(
            width,
            family.num_parameters,
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            hidden_width=self.hidden_width,
            precision=choose_precision(self.precision, encoder.device),
            device=encoder.device,
        )

    def _transform(
        self, encoder: FrozenEncoder, images: ImageSet, task: str, draw: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute features of g(I) for one draw of theta per image."""
        family, parameters = self.families[task], self.parameters(task, len(images), draw)

        def change(pixels: Tensor, rows: Tensor) -> Tensor:
            return family.apply(pixels, parameters[rows].to(pixels.device))

        return images.encode(encoder, self.features_of(encoder), change)

    def _epochs(self, encoder: FrozenEncoder, task: str, scaled: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the draw and scaled training features of g(I) of each epoch; draws that come again are kept."""
        kept: dict[int, dict[str, Tensor]] = {}
        for epoch in tqdm(range(self.epochs), desc=task, unit="epoch", leave=False, disable=not self.progress):
            draw = epoch % self.num_draws
            features = kept.get(draw)
            if features is None:
                _, made = self._transform(encoder, self.train, task, draw)
                features = {name: scaled(name, value) for name, value in made.items()}
                if self.num_draws < self.epochs:
                    kept[draw] = features
            yield draw, features


def _build_family(name: str, fill: str | None, options: Mapping[str, Any]) -> TransformationFamily:
    """Build a family of the registry, with ``fill`` where it has one."""
    family = TRANSFORMATIONS.get(name)
    if fill is None or family is None or "fill" not in inspect.signature(family).parameters:
        return build_transformation(name, **options)
    if fill == CIRCLE:
        return DiskFamily(build_transformation(name, **{**options, "fill": "zeros"}))
    return build_transformation(name, **{"fill": fill, **options})


def describe_family(family: TransformationFamily) -> dict[str, Any]:
    """Describe a family by its class and settings, as plain types."""
    if isinstance(family, DiskFamily):
        return {**describe_family(family.family), "fill": CIRCLE}
    names = [item.name for item in fields(family)] if is_dataclass(family) else list(vars(family))
    plain: dict[str, Any] = {"class": type(family).__name__}
    for name in names:
        value = getattr(family, name)
        plain[name] = value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
    return plain
