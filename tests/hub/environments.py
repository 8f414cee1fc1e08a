"""Environments of their own for processes that load what was published: one without the package, one with its wheel.

Each is a real virtual environment. Its libraries are links to those of the running one, entry by entry and without
ours, so that it makes no difference whether we are installed there as a wheel, as an editable checkout, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("hf_equissl", "modeling", "model_cards", "training", "pyproject.toml", "README.md", "LICENSE")
OURS = ("hf_equissl", "hf-equissl", "__editable__")


def make_environment(folder: Path, *, with_package: bool) -> Path:
    """A virtual environment in ``folder``; returns its interpreter."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    for entry in (entry for place in site.getsitepackages() for entry in Path(place).glob("*")):
        target = packages / entry.name
        # A nested .pth would be read: an editable install of ours is one.
        if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not target.exists():
            target.symlink_to(entry)
    if with_package:
        install_wheel(packages, folder / "build")
    return folder / "bin" / "python"


def install_wheel(packages: Path, workspace: Path) -> None:
    """Build the wheel from a copy of the checkout, where pip leaves its ``build``, and install it."""
    workspace.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, workspace / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, workspace)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(packages), str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(workspace)


def run_there(python: Path, script: Path, job: Any, environment: Mapping[str, str], folder: Path) -> Any:
    """Run a script in a fresh process of an environment: the job is its standard input, its last line the answer."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [str(python), "-I", str(script)],  # -I: neither the current folder nor the script's is on its import path
        input=json.dumps(job),
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
