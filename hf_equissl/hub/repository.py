"""From a run's folder to the folder that is published."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import ENCODER_FOLDER
from ..encoders.export import save_encoder
from ..encoders.frozen import FrozenEncoder
from ..encoders.native import save_native
from ..evaluation.encoder_report import Comparison, find_encoder, join_encoders, list_differences
from ..evaluation.results import ResultRecord, load_records, merge_records, save_records
from ..modeling import EquiSSLModel
from ..pretraining.model import EquiSSLForPreTraining
from ..utils.files import move_into_place, write_text
from ..utils.load_errors import explain_load_errors
from ..utils.strict_yaml import dump_yaml
from .benchmarks import write_eval_results
from .card.figures import draw_figures
from .card.snippets import run_snippets, snippets
from .card.text import CardFacts, public_recipe, render_card
from .licences import LICENCE_FILE, choose_licence
from .places import RECIPE_FILE, RESULTS_FILE, find_results
from .pretraining_state import load_pretraining_state
from .privacy import is_hub_id, last_component, public_record, public_source
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

PARTS = ("encoder", "native", "pretraining", "figures", "card")
CARD_FILE = "README.md"
Results = Sequence[ResultRecord | str | Path]


def build_repository(
    run_dir: str | Path,
    directory: str | Path,
    *,
    repo_id: str,
    parts: Sequence[str] = PARTS,
    results: Results = (),
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    license_file: str | Path | None = None,
    description: str | None = None,
    dataset: str | None = None,
    baseline: str | None = None,
) -> Path:
    """Build the published form of a run: encoder, native export, pretraining state, figures, card.

    Everything is made beside ``directory`` and moved there when it is whole; the card's code is executed against the
    new files first. Local paths and tokens are left out everywhere.

    Args:
        run_dir: What ``training/pretrain.py`` or an ``EquiSSLTrainer`` left. The newest complete checkpoint counts.
        directory: Folder to build it in, new or empty.
        repo_id: Name of the repository on the Hub, "owner/name", as the card's code uses it.
        parts: Some of ``PARTS``; files go to the root, or to the sub-folder of the part's name.
        results: Records of this encoder, or ``results.json`` files, or folders that hold one.
        license: Identifier of the weights' licence, as the Hub lists them; "inherit": that of base weights and data,
            with its restrictions. Left out, it is inherited where it is known and free; otherwise the card says
            "unknown", and ``push_repository`` refuses it (``licences``).
        license_name: Name of the licence, where ``license`` is "other".
        license_link: Where that is written; default: in ``license_file``.
        license_file: A file with its text, to lie in the repository.
        description: The user's own words for the head of the card.
        dataset: Hub id of the training data, where the run knows it by another name.
        baseline: Another encoder among the results, by its name or an end of it: the card gets a picture of how much
            better or worse the published one is on every task.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``run_dir`` is not a run or has no complete checkpoint; parts are unknown; ``repo_id`` is not a name
            on the Hub; ``directory`` holds files; results are of another encoder; there are none of ``baseline`` that
            may be compared; the licence contradicts that of the base weights.
        LoadError: The checkpoint's weights are damaged.
        SnippetError: Code of the card does not run.
    """
    directory = Path(directory)
    _check_request(repo_id, parts, dataset)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{directory} holds files already, perhaps a card that you have edited. Name a new folder.")
    run = RunFolder.read(run_dir)
    licence = choose_licence(run.terms(dataset), license, name=license_name, link=license_link, copy=license_file)
    source = _load(run)
    names = _DataNames(run, dataset)
    found = read_results(results)
    records = _public_records(found, source, repo_id, names)
    compared = None if baseline is None else _compare(found, records, baseline, names)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".building-") as workplace:
        staging = Path(workplace, directory.name)
        staging.mkdir()
        built, reason = _write_weights(source, run, names, staging, parts)
        figures = draw_figures(run, records, staging / "figures", compared) if "figures" in parts else []
        built += ["figures"] if figures else []
        if records:
            save_records(records, staging / RESULTS_FILE)
            write_eval_results(records, repo_id, staging)
        if licence.copy is not None:
            shutil.copyfile(licence.copy, staging / LICENCE_FILE)
        if "card" in parts:
            config = source.encoder.config
            run_snippets(snippets(str(staging.resolve()), config, built))
            facts = CardFacts(
                repo_id=repo_id,
                licence=licence,
                run=run,
                encoder=config,
                encoder_steps=source.steps,
                num_parameters=source.num_parameters,
                parts=built,
                records=records,
                figures=figures,
                snippets=snippets(repo_id, config, built),
                dataset=names.training,
                native_reason=reason,
                description=description,
            )
            write_text(staging / CARD_FILE, str(render_card(facts)))
        move_into_place(staging, directory)
    return directory


def read_results(results: Results) -> list[ResultRecord]:
    """Collect records from records, ``results.json`` files and folders with one; equal measurements are merged.

    Raises:
        ValueError: A path holds no such file.
    """
    found: list[ResultRecord] = []
    for item in results:
        if isinstance(item, ResultRecord):
            found.append(item)
            continue
        found += load_records(find_results(Path(item)))
    return merge_records(found)


@dataclass(frozen=True)
class _Source:
    """The weights that are published: where they come from, the whole state, the encoder with its input settings."""

    name: str
    state: EquiSSLForPreTraining
    encoder: EquiSSLModel
    steps: int
    image_mean: list[float]
    image_std: list[float]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the encoder, without its decoder."""
        return sum(p.numel() for name, p in self.encoder.named_parameters() if not name.startswith("decoder."))

    def digest(self) -> str:
        """Compute the digest that result records of this encoder carry."""
        return FrozenEncoder(self.encoder, image_mean=self.image_mean, image_std=self.image_std).digest()


class _DataNames:
    """Names of data sets for readers: the Hub id where there is one, otherwise the last component of a path."""

    def __init__(self, run: RunFolder, dataset: str | None) -> None:
        self.given = dataset
        self.known = self._short(run.data)
        self.training = dataset or self(run.data)

    def __call__(self, source: str) -> str:
        """Return the public name of ``source``; the user's ``dataset`` where it is called like the training data."""
        return self.given if self.given and self._short(source) == self.known else public_source(source)

    @staticmethod
    def _short(source: str) -> str:
        return last_component(source).lower()


def _check_request(repo_id: str, parts: Sequence[str], dataset: str | None) -> None:
    for name, value in (("repo_id", repo_id), ("dataset", dataset or repo_id)):
        if not is_hub_id(value):
            raise ValueError(f"{name} is {value!r}, expected a name on the Hub of the form owner/name.")
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts or isinstance(parts, str):
        raise ValueError(f"parts is {parts!r}: choose among {', '.join(PARTS)}.")


def _load(run: RunFolder) -> _Source:
    """Load the newest checkpoint and its encoder; of a finished run without its last checkpoint, its export."""
    with explain_load_errors(run.checkpoint, "checkpoint"):
        state = load_pretraining_state(run.checkpoint, dtype=torch.float32)
    mean, std = list(run.record.image_mean), list(run.record.image_std)
    name, encoder, steps = str(run.checkpoint), state.export_encoder(), run.steps
    folder = run.path / ENCODER_FOLDER
    if (folder / "config.json").is_file():
        with explain_load_errors(folder):
            exported = EquiSSLModel.from_pretrained(folder).eval()
        if not _are_equal(exported, encoder):
            if run.record.finished and run.record.steps > run.steps:
                name, encoder, steps = str(folder), exported, run.record.steps
            else:
                logger.warning(
                    "%s is not the encoder of %s: the run went on since. The checkpoint's is taken.",
                    folder,
                    run.checkpoint.name,
                )
    return _Source(name, state, encoder, steps, mean, std)


def _are_equal(left: EquiSSLModel, right: EquiSSLModel) -> bool:
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _public_records(
    records: Sequence[ResultRecord], source: _Source, repo_id: str, names: _DataNames
) -> list[ResultRecord]:
    """Rename the records of this encoder, and leave those of others out.

    Raises:
        ValueError: All of them are of other encoders.
    """
    if not records:
        return []
    digest = source.digest()
    ours = [record for record in records if record.encoder_digest == digest]
    others = {record.encoder: record.encoder_digest for record in records if record.encoder_digest != digest}
    if not ours:
        measured = ", ".join(f"{encoder} (digest {other})" for encoder, other in others.items())
        raise ValueError(
            f"Results of another encoder: they were measured on {measured}, and {repo_id} is built from {source.name} "
            f"(digest {digest}). Measure that one with training/probe.py --encoder, or leave these results out."
        )
    if others:
        logger.warning("Left out of the card: results of other encoders, %s.", ", ".join(others))
    return merge_records(public_record(record, repo_id, names(record.dataset)) for record in ours)


def _compare(
    found: Sequence[ResultRecord], records: Sequence[ResultRecord], baseline: str, names: _DataNames
) -> Comparison:
    """Compare the published records with those of another encoder among all that were found.

    Raises:
        ValueError: There is no such encoder, or nothing of it may be compared.
    """
    named = join_encoders(found)
    name = find_encoder(baseline, named)
    public = public_source(name)
    theirs = [public_record(record, public, names(record.dataset)) for record in named if record.encoder == name]
    return Comparison(public, list_differences([*records, *theirs], public))


def _write_weights(
    source: _Source, run: RunFolder, names: _DataNames, folder: Path, parts: Sequence[str]
) -> tuple[list[str], str | None]:
    """Write the parts with weights; returns those written, and why there is no native export if it was asked for."""
    settings = (source.image_mean, source.image_std)
    built: list[str] = []
    reason = None
    if "encoder" in parts:
        save_encoder(source.encoder, folder, *settings)
        built.append("encoder")
    if "native" in parts:
        try:
            save_native(source.encoder, folder / "native", *settings)
            built.append("native")
        except ValueError as error:
            reason = str(error)
            logger.info("No native export: %s", reason)
    if "pretraining" in parts:
        source.state.save_pretrained(folder / "pretraining")
        if run.recipe is not None:
            write_text(folder / "pretraining" / RECIPE_FILE, dump_yaml(_recipe_to_go_on(run, names.training)))
        built.append("pretraining")
    return built, reason


def _recipe_to_go_on(run: RunFolder, dataset: str | None) -> dict[str, Any]:
    """Make the recipe for others, who start from the published state with images and a repository of their own."""
    recipe = public_recipe(run, dataset)
    recipe.pop("monitor", None)  # others may not have its images
    for section, theirs in (("model", ("init_",)), ("training", ("push_to_hub", "hub_"))):
        if section in recipe:
            recipe[section] = {key: value for key, value in recipe[section].items() if not key.startswith(theirs)}
    return recipe
