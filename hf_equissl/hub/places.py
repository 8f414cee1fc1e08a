"""Whether what is to be published is where it is said to be. Needs no torch."""

from __future__ import annotations

from pathlib import Path

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.yaml"
# What a fine-tuned model says of itself, and the settings beside it in the folder of its run.
FINETUNED_FILE, FINETUNING_FILE = "finetuning.json", "finetune.json"


def check_run_folder(path: Path) -> None:
    """Refuse what is no folder.

    Raises:
        ValueError: It says what to give.
    """
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder. Give the folder of a run: what --output_dir of training/pretrain.py named."
        )


def find_results(path: Path) -> Path:
    """Find the file with an encoder's results; ``path`` is a folder with one, or that file.

    Raises:
        ValueError: There is none.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"There are no results at {path}: expected {RESULTS_FILE} as training/probe.py writes it.")
    return file
