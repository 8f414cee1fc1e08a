"""Every script answers ``--help`` and mistakes in words at once: without torch, called by its path from anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "training"
NO_SCRIPTS = {"__init__", "members", "pace", "photographs", "recipe_options", "side_by_side", "step_times", "suite"}
# Script -> words that its help must have beside "examples:".
WORDS = {
    "benchmark": ("--recipe", "--repeats"),
    "compare": ("--side_by_side", "--finished_only", "--step_repeats"),
    "convert": ("--output_dir", "--to", "--int8"),
    "evaluate_encoder": ("--suite", "--baseline", "quick"),
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
    "report": ("--baseline", "--output_dir"),
    "scaling": ("--processes", "--engines"),
    "sweep": ("--only", "--list"),
}


def test_all_scripts_are_asked() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - NO_SCRIPTS == set(WORDS)


HERE = ["--encoder", "x/y", "--data", "x/y", "--output_dir", "out"]
RUN = ["--recipe", "quickstart", "--output_dir", "out"]
SWEEP = ["--recipe", "vits16_ibot_sweep", "--output_dir", "out"]
NO_PATH = "/no/such/place"
# Script -> words with a mistake, and what is said of it.
MISTAKES: dict[str, list[tuple[list[str], str]]] = {
    "benchmark": [
        ([*RUN, "--no_such_option"], "--no_such_option"),
        (["--recipe", "quikstart"], "Did you mean 'quickstart'?"),
        ([*RUN, "--batch_size", "0"], "--batch_size 0: expected at least 1"),
        ([*RUN, "--data", NO_PATH], "no such file or folder"),
    ],
    "compare": [
        ([*SWEEP, "--no_such_option"], "--no_such_option"),
        ([*SWEEP, "--only", "lambda-0"], "no run of this name"),
        ([*SWEEP, "--data", NO_PATH], "no such file or folder"),
        ([*SWEEP, "--step_repeats", "-1"], "--step_repeats -1: expected at least 0"),
    ],
    "evaluate_encoder": [
        (["--suite", "quick", *HERE, "--no_such_option"], "--no_such_option"),
        (["--suite", "quik", *HERE], "Did you mean 'quick'?"),
        (["--suite", "quick", *HERE, "--data", NO_PATH], "no such file or folder"),
    ],
    "convert": [
        (["x/y", "--output_dir", "out", "--no_such_option"], "--no_such_option"),
        ([NO_PATH, "--output_dir", "out"], f"No encoder at '{NO_PATH}'"),
        (["nothing.pth", "--output_dir", "out"], "No file at 'nothing.pth'"),
        (["x/y", "--output_dir", "out", "--to", "onyx"], "invalid choice: 'onyx'"),
    ],
    "extract_features": [
        ([*HERE, "--no_such_option"], "--no_such_option"),
        ([*HERE, "--encoder", NO_PATH], f"No encoder at '{NO_PATH}'"),
        ([*HERE, "--data", "./*.tar"], "no file matches this pattern"),
        ([*HERE, "--features", "patch_token"], "Did you mean 'patch_tokens'?"),
        ([*HERE, "--dtype", "float61"], "Did you mean 'float16'?"),
        ([*HERE, "--private"], "--private belongs to --push_to_hub"),
    ],
    "finetune": [
        ([*HERE, "--no_such_option"], "--no_such_option"),
        ([*HERE, "--encoder", NO_PATH], f"No encoder at '{NO_PATH}'"),
        ([*HERE, "--data", NO_PATH], "no such file or folder"),
        ([*HERE, "--task", "semantic_segmentaton"], "Did you mean 'semantic_segmentation'?"),
        ([*HERE, "--method", "lara"], "Did you mean 'lora'?"),
        (["--compare", NO_PATH], "there is no results.json"),
    ],
    "plan": [
        ([*RUN[:2], "--no_such_option"], "--no_such_option"),
        (["--recipe", "quikstart"], "Did you mean 'quickstart'?"),
        (["--recipe", "quickstart", "--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["--recipe", "quickstart", "--engine", "ddq"], "Did you mean 'ddp'?"),
        (["--recipe", "quickstart", "--utilisation", "2"], "--utilisation 2: expected a share"),
    ],
    "pretrain": [
        (["--recipe", "quikstart"], "Did you mean 'quickstart'?"),
        (["--recipe", f"{NO_PATH}.yaml"], f"{NO_PATH}.yaml"),
        (RUN[:2], "--output_dir is missing"),
        ([*RUN, "--dry_rum"], "Did you mean --dry_run?"),
        ([*RUN, "--data", NO_PATH], "no such file or folder"),
        ([*RUN, "--init_from", NO_PATH], f"No encoder at '{NO_PATH}'"),
        ([*RUN, "--resume", NO_PATH], "there is no such folder"),
        ([*RUN, "--dry_run", "--num_processes", "0"], "--num_processes 0: expected 1 or more"),
        ([*RUN, "--dry_run", "--device_tflops", "-1"], "--device_tflops -1: expected a number above 0"),
    ],
    "probe": [
        ([*HERE, "--no_such_option"], "--no_such_option"),
        ([*HERE, "--encoder", NO_PATH], f"No encoder at '{NO_PATH}'"),
        ([*HERE, "--further_test", NO_PATH], "no such file or folder"),
        ([*HERE, "--tests", "rotatoin"], "Did you mean 'rotation'?"),
        ([*HERE, "--class_features", "clss"], "Did you mean 'cls'?"),
        ([*HERE, "--evaluators", "lineer"], "Did you mean 'linear'?"),
        ([*HERE, "--set", "kn.k=3"], "Did you mean 'knn'?"),
    ],
    "push_to_hub": [
        (["x", "--repo_id", "x/y", "--no_such_option"], "--no_such_option"),
        ([NO_PATH, "--repo_id", "x/y"], "is not a folder"),
        ([".", "--repo_id", "x/y", "--results", NO_PATH], "There are no results at"),
    ],
    "quickstart": [
        (["--no_such_option"], "--no_such_option"),
        (["--steps", "0"], "expected 1 or more"),
    ],
    "report": [
        (["x", "--output_dir", "out", "--no_such_option"], "--no_such_option"),
        ([NO_PATH, "--output_dir", "out"], "There are no results at"),
    ],
    "scaling": [
        ([*RUN, "--no_such_option"], "--no_such_option"),
        ([*RUN, "--processes", "0"], "--processes 0: expected at least 1"),
        ([*RUN, "--data", NO_PATH], "no such file or folder"),
    ],
    "sweep": [
        ([*RUN, "--no_such_option"], "--no_such_option"),
        (["--recipe", "vits16_ibot_sweep", "--only", "wieght-0"], "no run of this name"),
        (["--recipe", "vits16_ibot_sweep", "--data", NO_PATH], "no such file or folder"),
    ],
}
HEAVY = ("torch", "transformers", "datasets", "pyarrow")
# Runs a script with one list of words after another, and tells how each ended and what was imported by then.
ASK = """
import contextlib, io, json, runpy, sys
script, heavy, commands = json.loads(sys.argv[1])
for words in commands:
    sys.argv, out, err = [script, *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize("script", WORDS)
def test_help_and_mistakes_need_no_torch(script: str, tmp_path: Path) -> None:
    mistakes = MISTAKES[script]
    commands = [["--help"], *(words for words, _ in mistakes)]
    asked = json.dumps([str(FOLDER / f"{script}.py"), HEAVY, commands])
    done = subprocess.run([sys.executable, "-c", ASK, asked], cwd=tmp_path, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for words, (code, out, _, loaded) in zip(commands, answers, strict=False):
        assert not loaded, (words, loaded)
        assert code == (0 if words == ["--help"] else 2), (words, code)
        if words == ["--help"]:
            assert out.startswith("usage: ")
            assert not [word for word in WORDS[script] if word not in out]
            assert script == "quickstart" or "examples:" in out
    assert len(answers) == len(commands), (commands[len(answers)], done.stderr)  # it loaded torch and ended all
    for (words, message), (_, _, said, _) in zip(mistakes, answers[1:], strict=True):
        assert message in said, (words, said)
    assert not list(tmp_path.iterdir())
