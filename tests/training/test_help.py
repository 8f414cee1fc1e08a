"""Every script answers ``--help``, called by its path from anywhere, with what a user looks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes

FOLDER = Path(__file__).resolve().parents[2] / "training"
NO_SCRIPTS = {"__init__", "members", "pace", "photographs", "recipe_options", "side_by_side"}
# Script -> words that its help must have beside "examples:".
WORDS = {
    "benchmark": ("--recipe", "--repeats"),
    "compare": ("--side_by_side", "--finished_only", "--step_repeats"),
    "convert": ("--output_dir", "--native"),
    "extract_features": ("--encoder", "--shard_size"),
    "finetune": ("DoRA", "--lora_rank", "layer decay 0.75"),
    "plan": ("--check_memory", "--gpus_per_node", "--json", "--section.key"),
    "pretrain": (
        *("--dry_run", "--init_from ENCODER", "accelerate launch", "--training.", "vits16_vicreg_rot"),
        "--init_from facebook/dinov2-small --data ./photos \\\n",
    ),
    "probe": ("color_jitter", "transformation_regression", "--fill"),
    "push_to_hub": ("--repo_id", "--dry_run"),
    "quickstart": ("--output_dir", "--steps"),
    "scaling": ("--processes", "--engines"),
    "sweep": ("--only", "--list"),
}


def test_all_scripts_are_asked() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - NO_SCRIPTS == set(WORDS)


@pytest.mark.parametrize("script", WORDS)
def test_help(script: str, tmp_path: Path) -> None:
    done = processes.run([sys.executable, str(FOLDER / f"{script}.py"), "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert not [word for word in WORDS[script] if word not in done.stdout]
    assert script == "quickstart" or "examples:" in done.stdout
    assert not list(tmp_path.iterdir())
