"""What README and documentation say can be done: Python runs, options and recipes exist, links lead to files."""

from __future__ import annotations

import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from docs import draw
from hf_equissl.evaluation import EVALUATORS
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES
from hf_equissl.recipes.overrides import SECTIONS, apply_overrides, read_recipe
from hf_equissl.training.suite import read_suite
from hf_equissl.views import TRANSFORMATIONS
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)")
RECIPES = ROOT / "training/recipes"
# Python that loads an encoder which the reader has made first: its own tests load encoders this way (tests/hub).
NEEDS_AN_ENCODER = "from_pretrained"
SHIPPED = "model_cards/"


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(match[2], id=f"{page.name}-{number}")
        for page in PAGES
        for number, match in enumerate(BLOCK.finditer(page.read_text()))
        if match[1] == language
    ]


@pytest.mark.parametrize(
    "code",
    [case for case in blocks("python") if NEEDS_AN_ENCODER not in case.values[0] and SHIPPED not in case.values[0]],
)
def test_python_runs_and_registers(code: str) -> None:
    before = [(registry, set(registry)) for registry in (EQUIVARIANCE_OBJECTIVES, EVALUATORS, TRANSFORMATIONS)]
    try:
        exec(compile(code, "page", "exec"), {"__name__": "page"})
        assert any(set(registry) - names for registry, names in before)
    finally:
        for registry, names in before:
            for name in set(registry) - names:
                del registry[name]


@pytest.mark.parametrize("code", [case for case in blocks("python") if SHIPPED in case.values[0]])
def test_python_that_loads_what_ships_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "page", "exec"), {"__name__": "page"})


@cache
def options_of(script: str) -> set[str]:
    done = processes.run([sys.executable, str(ROOT / "training" / script), "--help"])
    return set(re.findall(r"--[\w.]+", done.stdout))


def commands(block: str) -> list[list[str]]:
    """Split a block into commands of this package, as words behind the script's name."""
    joined = block.replace("\\\n", " ")
    lines = [re.split(r"\s#\s", line)[0].replace("; done", "").replace("; do", "") for line in joined.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "<<" not in line and line.count("'") % 2 == 0]
    starts = [(line, i) for line in words for i, word in enumerate(line) if re.fullmatch(r"training/\w+\.py", word)]
    return [line[start:] for line, start in starts]


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_have_these_options(block: str) -> None:
    """They are not run here: they need data, encoders or GPUs of the reader, and hours."""
    for script, *words in commands(block):
        assert (ROOT / "training" / Path(script).name).is_file()
        recipe, dotted = None, {}
        for word, following in zip(words, [*words[1:], ""], strict=True):
            option = word.split("=")[0]
            if word == "--":
                break
            if option.startswith("--") and option[2:].split(".")[0] in SECTIONS and "." in option:
                dotted[option[2:]] = following
            elif option.startswith("--"):
                assert option in options_of(Path(script).name), f"{script} has no {option}"
            if word == "--recipe" and "$" not in following:
                recipe = RECIPES / f"{following}.yaml"
                assert recipe.is_file(), following
        if recipe is not None and "\nsweep:" not in recipe.read_text():
            apply_overrides(read_recipe(recipe, [RECIPES]), dotted)  # raises for keys that do not exist


@pytest.mark.parametrize("block", [block for block in blocks("yaml") if "\ntasks:" in block.values[0]])
def test_suites_are_read(block: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(block)
    assert read_suite(str(tmp_path / "suite.yaml"))[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """Sphinx checks those between pages; GitHub shows the same files without it."""
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken


def test_the_table_of_recipes_is_that_of_the_files() -> None:
    assert (ROOT / "docs/recipes.md").read_text() == draw.list_recipes(), "run: python docs/draw.py"


def test_tables_of_results_are_those_of_the_records() -> None:
    page = (ROOT / "docs/results.md").read_text()
    assert "<!-- table: pair -->" in page
    assert draw.fill_tables(page) == page, "run: python docs/draw.py"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
