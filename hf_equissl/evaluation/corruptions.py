"""The fifteen corruptions of ImageNet-C made from any images: a linear probe fitted on clean ones, judged on these."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..encoders.frozen import FrozenEncoder
from ..utils.options import Option
from .data import EvaluationData
from .images import ImageSet
from .linear import LinearEvaluator, LinearProbe
from .results import ResultRecord

SEVERITIES = (1, 2, 3, 4, 5)
# What the library refuses to corrupt, in pixels.
SMALLEST_SIDE = 32


def load_library() -> Any:
    """Import the library that corrupts images; ``ValueError`` with the remedy where it is absent."""
    try:
        import imagecorruptions
    except ImportError as error:
        raise ValueError("Corruptions need imagecorruptions: pip install 'hf-equissl[corruptions]'.") from error
    return imagecorruptions


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which the library draws from, and give it back as it was."""
    state = np.random.get_state()  # noqa: NPY002  # the library knows no other
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def corrupt(images: Tensor, rows: Sequence[int], name: str, severity: int) -> Tensor:
    """Corrupt images (B, 3, S, S) uint8 as ImageNet-C does; what happens to image i depends on ``rows[i]`` alone.

    Args:
        images: At least 32 pixels large.
        rows: Which images of their set they are.
        name: One of the library's fifteen, such as "gaussian_noise".
        severity: 1 to 5.
    """
    library = load_library()
    seeded = "seed" in inspect.signature(library.corruption_dict[name]).parameters
    made = []
    for image, row in zip(images, rows, strict=True):
        seed = (int(row) * 7919 + severity) % (1 << 31)
        with _numpy_seed(seed):
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            keywords = {"seed": seed} if seeded else {}
            made.append(library.corrupt(pixels, severity=severity, corruption_name=name, **keywords))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


class CorruptionsEvaluator(LinearEvaluator):
    """Accuracy of the linear probe on corrupted test images, averaged over 15 corruptions x 5 severities.

    The corruptions of ImageNet-C (https://arxiv.org/abs/1903.12261; noise, blur, weather, digital) as the library
    imagecorruptions makes them, on the base images, that is after resizing and cropping. The probe is that of
    ``LinearEvaluator``, fitted on clean images and unchanged. ``details`` hold each corruption's mean over severities.

    Their strengths are made for 224 pixels: on 32-pixel images they destroy far more than CIFAR-10-C does, whose
    strengths differ. Compare encoders on images of one size, and with published figures only at 224.
    """

    name: ClassVar[str] = "corruptions"
    unmeasured: ClassVar[str] = "robustness to noise, blur, weather and compression"
    options: ClassVar[tuple[Option, ...]] = ()

    def __init__(
        self,
        data: EvaluationData,
        *,
        corruptions: Sequence[str] = (),
        severities: Sequence[int] = SEVERITIES,
        features: Sequence[str] = ("cls",),
        seeds: int | Sequence[int] = 1,
        solver: Literal["adamw", "sgd", "lbfgs"] = "adamw",
        epochs: int = 100,
        batch_size: int = 1024,
        candidates: Sequence[float] | None = None,
        held_out: float = 0.1,
        standardize: bool = False,
        progress: bool = True,
    ) -> None:
        """Check the settings.

        Args:
            data: Labelled train and test images.
            corruptions: Names of the library; none: the fifteen of ImageNet-C.
            severities: Among 1 to 5.
            features: Kinds of features, each with a classifier of its own; the first is the primary one.
            seeds, solver, epochs, batch_size, candidates, held_out, standardize: As in ``LinearEvaluator``.
            progress: Whether to show a bar.
        """
        super().__init__(
            data,
            features=features,
            seeds=seeds,
            solver=solver,
            epochs=epochs,
            batch_size=batch_size,
            candidates=candidates,
            held_out=held_out,
            standardize=standardize,
        )
        known = load_library().get_corruption_names("common")
        self.corruptions = tuple(corruptions) or tuple(known)
        self.severities, self.progress = tuple(severities), progress
        unknown = [name for name in self.corruptions if name not in load_library().corruption_dict]
        if unknown or not self.severities or not set(self.severities) <= set(SEVERITIES):
            raise ValueError(
                f"corruptions {unknown or list(self.corruptions)}, severities {list(self.severities)}: expected names "
                f"among {', '.join(known)}, and severities among 1 to 5."
            )

    @classmethod
    def applies_to(cls, data: EvaluationData) -> bool:
        """Return ``False``: 75 passes over the test images are made only when asked for."""
        return False

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` for images that are too small."""
        super().check(encoder)
        if encoder.image_size < SMALLEST_SIDE:
            raise ValueError(
                f"Corruptions are made of images of at least {SMALLEST_SIDE} pixels; {encoder.name} sees "
                f"{encoder.image_size}. Give a larger --image_size."
            )

    def settings(self, task: str) -> dict[str, Any]:
        """Return the settings of the probe, and what it is judged on."""
        made = {"corruptions": list(self.corruptions), "severities": list(self.severities)}
        return super().settings(task) | made | {"corrupted_by": "imagecorruptions"}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Fit the probes once, and judge them on every test set under every corruption."""
        fitted = self.fit(encoder, self.features_of(encoder), seeds)
        records = []
        for part in self.data.tests:
            found = self._judge_corrupted(encoder, part, fitted)
            for name in self.features_of(encoder):
                metrics = {
                    metric.name: [
                        fmean(
                            value[metric.name]
                            for corruption in self.corruptions
                            for value in found[name, seed, corruption]
                        )
                        for seed in seeds
                    ]
                    for metric in self.recorded
                }
                details = {
                    corruption: [fmean(value["top1"] for value in found[name, seed, corruption]) for seed in seeds]
                    for corruption in self.corruptions
                }
                records += self.records(encoder, task, name, metrics, seeds, details, part)
        return records

    def _judge_corrupted(
        self,
        encoder: FrozenEncoder,
        part: ImageSet,
        fitted: Mapping[tuple[str, int], LinearProbe],
    ) -> dict[tuple[str, int, str], list[dict[str, float]]]:
        """Judge every probe: (features, seed, corruption) -> accuracies at each severity."""
        found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
        work = [(name, severity) for name in self.corruptions for severity in self.severities]
        for corruption, severity in tqdm(work, desc="corruptions", leave=False, disable=not self.progress):

            def change(pixels: Tensor, rows: Tensor, name: str = corruption, level: int = severity) -> Tensor:
                eight_bits = (pixels.cpu() * 255).round().to(torch.uint8)
                return corrupt(eight_bits, rows.tolist(), name, level).to(pixels.device).float() / 255

            rows, features = part.encode(encoder, self.features_of(encoder), change)
            labels = part.require_labels(type(self).__name__)[rows]
            for (kind, seed), probe in fitted.items():
                accuracies = self.accuracies(probe.logits(features[kind]), labels)
                found.setdefault((kind, seed, corruption), []).append(accuracies)
        return found
