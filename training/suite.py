"""Suites of tasks as files: read and checked, and turned into words of probe.py and finetune.py. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from hf_equissl.evaluation import cli as probe_cli
from hf_equissl.finetuning import cli as finetune_cli
from hf_equissl.recipes.overrides import as_mapping, read_mapping
from hf_equissl.training.recipe_options import find_file
from hf_equissl.utils.coercion import check_arguments
from hf_equissl.utils.suggestions import RecipeError, check_keys

SUITES = Path(__file__).resolve().parent / "suites"
PROBE, FINETUNE = "probe", "finetune"
_PARSERS = {PROBE: probe_cli.build_parser, FINETUNE: finetune_cli.build_parser}
# Options that the suite or its command says in another place, or that mean nothing in a suite.
_TAKEN = {
    *("--help", "--encoder", "--data", "--output_dir", "--import", "--overwrite", "--skip_unfit", "--resume"),
    *("--compare", "--merge", "--push_to_hub", "--repo_id", "--private", "--base_id", "--seed", "--predictor"),
    *("--license", "--license_name", "--license_link", "--license_file"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite.

    Attributes:
        name: Its folder.
        probe: Options of probe.py, if that runs it.
        finetune: Options of finetune.py, if that does.
        data: Source of its images; ``None``: that of the command.
        seeds: Of a fine-tuning, which is run with each.
        words: Its options as words of its command.
    """

    name: str
    probe: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    data: str | None = None
    seeds: tuple[int, ...] = (0,)
    words: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Which command runs it."""
        return FINETUNE if self.probe is None else PROBE


@dataclass(frozen=True)
class Suite:
    """What a file says beside its tasks.

    Attributes:
        tasks: As they stand there.
        description: One line.
        data: Source of images of the tasks that name none, where the command names none either.
        references: What probes are run on beside the encoders.
    """

    tasks: tuple[dict[str, Any], ...]
    description: str = ""
    data: str | None = None
    references: tuple[Literal["raw_pixels", "untrained"], ...] = ()


def read_suite(name: str) -> tuple[Suite, list[SuiteTask]]:
    """Read the suite of ``--suite NAME|PATH``, and its tasks.

    Raises:
        RecipeError: There is none, or it holds what means nothing, with the nearest key that does.
    """
    path = find_file(name, SUITES, "--suite", "suite")
    where = str(path)
    suite = Suite(**check_arguments(read_mapping(path, "suite"), Suite, where))
    tasks: list[SuiteTask] = []
    for number, entry in enumerate(suite.tasks):
        place = f"{where}: tasks.{number}"
        task = SuiteTask(**check_arguments(entry, SuiteTask, place, skip=("words",)))
        if not _NAME.fullmatch(task.name) or task.name in [other.name for other in tasks]:
            raise RecipeError(f"{place}.name: expected a name of its own, such as linear, got {task.name!r}.")
        if (task.probe is None) == (task.finetune is None):
            raise RecipeError(f"{place} ({task.name}): expected one of {PROBE} and {FINETUNE}, with its options.")
        if task.kind == PROBE and "seeds" in entry:
            raise RecipeError(f"{place}.seeds: those of a probe are its option: {PROBE}: {{seeds: 3}}.")
        words = _words(task.probe or task.finetune or {}, task.kind, f"{place}.{task.kind}")
        tasks.append(replace(task, words=tuple(words)))
    if not tasks:
        raise RecipeError(f"{where}: there are no tasks in it.")
    return suite, tasks


def _words(options: Mapping[str, Any], kind: str, where: str) -> list[str]:
    """Write options of a file as words of a command line."""
    actions = {word: action for action in _PARSERS[kind]()._actions for word in action.option_strings}
    known = {word.removeprefix("--"): action for word, action in actions.items() if word not in {"-h", *_TAKEN}}
    check_keys(options, known, where)
    words: list[str] = []
    for name, value in options.items():
        if name == "set" and kind == PROBE:
            for evaluator, values in as_mapping(value, f"{where}.set").items():
                settings = as_mapping(values, f"{where}.set.{evaluator}")
                words += [w for key, one in settings.items() for w in ("--set", f"{evaluator}.{key}={json.dumps(one)}")]
        elif name == "set":
            words += ["--set", *(f"{key}={json.dumps(one)}" for key, one in as_mapping(value, f"{where}.set").items())]
        elif isinstance(value, bool):
            if known[name].nargs != 0:
                raise RecipeError(f"{where}.{name}: expected a value, got {json.dumps(value)}.")
            words += [f"--{name}"] if value else []
        else:  # lists of lists are options that are given several times
            for each in value if isinstance(value, list) and isinstance((value or [0])[0], list) else [value]:
                several = each if isinstance(each, list) else [each]
                words += [f"--{name}", *(one if isinstance(one, str) else json.dumps(one) for one in several)]
    return words


def check_words(kind: str, words: Sequence[str], where: str) -> Any:
    """Refuse words that the command would refuse, as far as that needs neither torch nor a look at the images.

    Returns:
        The ``FineTuningSettings`` of a fine-tuning.

    Raises:
        RecipeError: It says ``where`` and what is wrong.
    """
    parser = _PARSERS[kind]()

    def refuse(message: str) -> NoReturn:
        raise RecipeError(message)

    parser.error = refuse  # type: ignore[method-assign]
    try:
        arguments = parser.parse_args(list(words))
        return probe_cli.check_words(arguments) if kind == PROBE else finetune_cli.read_settings(arguments)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
