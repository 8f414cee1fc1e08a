"""What a published encoder can be used for and what is not known about it, each sentence from a fact of its run."""

from __future__ import annotations

from collections.abc import Sequence

from ...evaluation import EVALUATORS
from ...evaluation.results import FINE_TUNING, ResultRecord
from ...modeling import EquiSSLConfig
from ...utils.markdown import code
from ..run_folder import RunFolder
from .metadata import learns_classes

# Task types of the Hub whose answer is one for the whole image.
_OF_WHOLE_IMAGES = {"image-classification", "image-feature-extraction"}
SHORT_TRAINING = 100  # passes over the images: what the shortest published runs of these methods take


def limits(
    run: RunFolder, encoder: EquiSSLConfig, steps: int, dataset: str | None, records: Sequence[ResultRecord]
) -> list[str]:
    """Write the sentences of the card's section on use and limits.

    Args:
        run: What was trained.
        encoder: Config of the published encoder.
        steps: Optimizer steps behind its weights.
        dataset: Name of the training data for readers.
        records: What was measured.
    """
    objectives = run.objectives()
    names = [entry["name"] for entry in (objectives["invariance"], *objectives["equivariance"])]
    kind = "supervised" if learns_classes(names) else "self-supervised"
    found = [
        f"For: frozen image features, probing what {kind} features keep, and as a start for fine-tuning.",
        _resolution(encoder),
        _data(run, dataset),
    ]
    if steps < run.planned_steps:
        found.append(f"The run is unfinished: {steps:,} of {run.planned_steps:,} planned steps.")
    passes = run.passes(steps)
    if passes is not None and passes < SHORT_TRAINING:
        found.append(
            f"Short training: each image was seen about {passes:.2g} times, in published runs of such methods "
            "hundreds of times. Numbers of this encoder say nothing about what those reach."
        )
    found += [_transformation(run), "One training run with one seed: how much another seed would change is not known."]
    if run.record.hardware.get("device") == run.record.hardware.get("cpu"):
        found.append("Trained on a CPU, without a GPU.")
    found.append(_describe_measured(records))
    return [sentence for sentence in found if sentence]


def _resolution(encoder: EquiSSLConfig) -> str:
    patch = encoder.patch_side
    height, width = (count * patch for count in encoder.grid_size)
    return (
        f"Trained at {height} x {width} pixels. Other sizes in multiples of {patch} run with interpolated position "
        "embeddings; how good they are was not measured."
    )


def _data(run: RunFolder, dataset: str | None) -> str:
    count = f" ({run.record.num_images:,} images)" if run.record.num_images else ""
    name = f"{code(dataset)}{count}" if dataset else "one data set"
    seen = "All it has seen is" if run.base_model is None else "Beside its starting point's data it has seen"
    return (
        f"{seen} {name}, as it is: neither filtered nor balanced here. What these images leave out or show "
        "one-sidedly, the features do, too. Not for decisions about people."
    )


def _transformation(run: RunFolder) -> str:
    names = _list_names([entry["name"] for entry in run.objectives()["equivariance"]])
    if run.transformation is None or not names:
        return ""
    return f"Trained with {names} on one family of transformations, `{run.transformation}`."


def _describe_measured(records: Sequence[ResultRecord]) -> str:
    """Say by what the encoder was measured, and what of the known measurements nobody made."""
    if not records:
        return "Nothing was measured: judge it on your own task before you rely on it."
    measured = list(dict.fromkeys(record.evaluator for record in records))
    sets = list(dict.fromkeys(record.dataset for record in records))
    unknown = [evaluator.unmeasured for name, evaluator in EVALUATORS.items() if name not in measured]
    if FINE_TUNING not in measured:
        unknown.append("fine-tuning")
    if {record.hub_task for record in records} <= _OF_WHOLE_IMAGES:
        unknown.append("dense tasks such as segmentation and detection")
    if len(sets) == 1:
        unknown.append("robustness to images unlike these")
    rest = ", ".join(filter(None, unknown))
    return f"Measured by {_list_names(measured)} on {_list_names(sets)} only." + (
        f" Not measured: {rest}." if rest else ""
    )


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(map(code, names))
