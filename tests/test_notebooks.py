"""Notebooks are their scripts, ran from top to bottom without an error, and use public names alone.

``make notebooks`` runs them, and CI does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
LARGEST = 300_000  # bytes of a stored notebook


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
def test_it_uses_public_names(script: Path) -> None:
    text = script.read_text()
    assert not re.search(r"hf_equissl[\w.]*\._|import _", text)
    assert "%pip install" in text, "a cell that installs the package where it is missing"
