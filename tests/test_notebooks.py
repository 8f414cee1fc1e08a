"""Notebooks are their scripts, ran from top to bottom without an error, and use public names alone.

``make notebooks`` runs them, and CI does.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
LARGEST = 400_000  # bytes of a stored notebook


def cells(path: Path) -> list[Any]:
    return list(jupytext.read(path).cells)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(script: Path) -> None:
    written, stored = (
        [(cell.cell_type, cell.source) for cell in cells(script.with_suffix(s))] for s in (".py", ".ipynb")
    )
    assert written == stored, f"run: make notebooks NOTEBOOKS={script.relative_to(ROOT)}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_stored_is_one_whole_run(script: Path) -> None:
    notebook = script.with_suffix(".ipynb")
    code = [cell for cell in cells(notebook) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any(output.output_type != "error" for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert notebook.stat().st_size < LARGEST
    assert str(ROOT) not in notebook.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_picture_says_what_to_see(script: Path) -> None:
    stored = cells(script.with_suffix(".ipynb"))
    for cell, following in pairwise([*stored, None]):
        pictures = [kind for output in cell.get("outputs", []) for kind in output.get("data", {}) if "image/" in kind]
        if pictures:
            assert following is not None
            assert "What to see:" in following.source, f"below the picture of:\n{cell.source}"
    assert not [cell.source for cell in stored if "TODO" in cell.source]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_commands_did_what_the_text_says(script: Path) -> None:
    """A command that fails does not stop a notebook: what it prints is what shows it."""
    for cell in cells(script.with_suffix(".ipynb")):
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        assert not re.search(r"Traceback|command not found|No such file|invalid choice", printed), cell.source


def test_the_documentation_lists_all_of_them() -> None:
    listed = re.findall(r"\(\.\./(notebooks/\w+\.ipynb)\)", (ROOT / "docs/index.md").read_text())
    assert listed == [f"notebooks/{script.stem}.ipynb" for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_uses_public_names(script: Path) -> None:
    text = script.read_text()
    assert not re.search(r"hf_equissl[\w.]*\._|import _", text)
    assert "%pip install" in text, "a cell that installs the package where it is missing"
