"""The app as a Space: a folder that holds all it needs, to be uploaded as it is."""

from __future__ import annotations

import shutil
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from ..utils.files import move_into_place, staging_folder, write_text
from .shipped import CHECKPOINTS, model_cards, shipped_checkpoint

GRADIO = "6.31.0"  # where none is installed
APP = '''\
"""What turning an image does to its features: the demo of hf-equissl, as a Space."""

from hf_equissl.demo import launch_app

launch_app()
'''
README = """\
# What turning an image does to its features

Two small encoders, trained on CIFAR-10 by [EquiSSL](https://arxiv.org/abs/2503.18753): one base (VICReg), one that also
reconstructs the images between two views. Drop an image, turn it, and see what each of them makes of it.

The folder was written by `hf-equissl demo --space` and holds the package, the encoders with their cards
(`hf_equissl/model_cards`) and eight photographs (`hf_equissl/demo/photographs/SOURCES.md` says whose). `app.py` starts
it anywhere: `pip install -r requirements.txt gradio && python app.py`.
"""
# Parts of the package that lie elsewhere in a checkout.
_MAPPED = ("modeling", "training", "model_cards")


def write_space(directory: str | Path) -> Path:
    """Write the app as a Space: app.py, requirements.txt, README.md with its settings, and the package with encoders.

    The package travels along, so that the Space does not depend on what a package index has.

    Args:
        directory: A new folder, or an empty one.

    Returns:
        ``directory``.

    Raises:
        ValueError: There are files in it.
        LoadError: The encoders that ship are not there.
    """
    folder = Path(directory)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--space {folder} holds files already. Name a new folder.")
    cards = [shipped_checkpoint(name) / "README.md" for name in CHECKPOINTS]
    with staging_folder(folder) as staging:
        _copy_package(staging / "hf_equissl")
        write_text(staging / "app.py", APP)
        write_text(staging / "requirements.txt", "\n".join(_requirements()) + "\n")
        settings = yaml.safe_dump(_settings(cards), sort_keys=False, allow_unicode=True)
        write_text(staging / "README.md", f"---\n{settings}---\n\n{README}")
        move_into_place(staging, folder)
    return folder


def _copy_package(target: Path) -> None:
    """Copy what a wheel holds: the package with its data, without encoders' code that is in the package anyway."""
    root = Path(__file__).resolve().parents[1]
    leave = shutil.ignore_patterns("__pycache__", "*.pyc", *_MAPPED)
    shutil.copytree(root, target, ignore=leave)
    for part in _MAPPED[:2]:
        source = Path(str(files(f"hf_equissl.{part}")))
        shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (target / "model_cards").mkdir()
    shutil.copyfile(model_cards() / "__init__.py", target / "model_cards" / "__init__.py")
    for name, folder in CHECKPOINTS.items():
        (target / "model_cards" / folder).mkdir()
        for path in sorted(shipped_checkpoint(name).iterdir()):
            if path.is_file() and path.suffix in (".json", ".safetensors", ".md", ".py"):
                shutil.copyfile(path, target / "model_cards" / folder / path.name)


def _requirements() -> list[str]:
    """List what the package needs at the versions that are installed; torch for CPUs. Gradio comes with the Space."""
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    for line in metadata.requires("hf-equissl") or ():
        if "extra ==" not in line:
            name = Requirement(line).name
            lines.append(f"{name}=={metadata.version(name).partition('+')[0]}")
    return lines


def _settings(cards: list[Path]) -> dict[str, Any]:
    """Make the front matter: the licence is that of the encoders, as their cards say it."""
    return {
        "title": "What turning an image does to its features",
        "emoji": "🔄",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": _gradio_version(),
        "python_version": "3.11",
        "app_file": "app.py",
        **_licence(cards),
        "short_description": "Invariant and equivariant features, side by side",
    }


def _gradio_version() -> str:
    try:
        return metadata.version("gradio")
    except metadata.PackageNotFoundError:
        return GRADIO


def _licence(cards: list[Path]) -> dict[str, str]:
    """Read the licence of cards; "unknown" where they say none, or not the same."""
    found = []
    for card in cards:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found.append({key: front[key] for key in ("license", "license_name", "license_link") if key in front})
    return found[0] if found[0].get("license") and all(other == found[0] for other in found) else {"license": "unknown"}
