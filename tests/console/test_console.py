"""``hf-equissl``: one command for all scripts, from the installed package as from a checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from hf_equissl.console.main import COMMANDS, main
from hf_equissl.recipes.overrides import resolve_recipe
from hf_equissl.training.recipe_options import RECIPES
from hf_equissl.utils import commands

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "pyarrow")
# Asks for the help of every command in one process, and tells what each said and what was imported by then.
ASK = """
import contextlib, io, json, sys
from hf_equissl.console.main import COMMANDS, main
for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    print(json.dumps([words, code, out.getvalue(), [name for name in %r if name in sys.modules]]))
"""


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests alone: others start scripts."""
    monkeypatch.setattr(commands, "_NAMES", {})


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_help_of_every_command_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", ASK % (HEAVY,)], capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words[:-1] for words, *_ in answers] == [[], *([name] for name in COMMANDS)]
    for words, code, said, loaded in answers:
        assert (code, loaded) == (0, []), words
        assert said.startswith(" ".join(["usage: hf-equissl", *words[:-1]]))
        # Whoever has no checkout has no script to start: nothing names one, but for those that have no command.
        assert "python training/" not in said
        for name, command in COMMANDS.items():
            script = f"{command.module.rpartition('.')[2]}.py"
            assert name in ("recipes", "env") or script not in said, (words, script)
    assert "accelerate launch --num_machines 2 --num_processes 16 -m hf_equissl.training.pretrain" in answers[1][2]


def test_the_package_runs_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["hf_equissl", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("hf_equissl", run_name="__main__")
    assert capsys.readouterr().out.startswith("hf-equissl 0.")
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry == {"hf-equissl": "hf_equissl.console.main:main"}


def test_mistakes_name_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, said = run(capsys, "pretrian")
    assert code == 2
    assert "Did you mean 'pretrain'?" in said
    code, _, said = run(
        capsys, "probe", "--encoder", "x/y", "--data", "/no/such", "--output_dir", str(tmp_path / "out")
    )
    assert code == 2
    assert said.startswith("hf-equissl probe: error: /no/such: no such file or folder")
    assert commands.restate_command("probe.py", ["--data", "x"]) == "hf-equissl probe --data x"
    assert run(capsys, "recipes", "--model.image_size", "3")[0] == 2


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == {path.stem for path in RECIPES.glob("*.yaml")}
    code, out, _ = run(capsys, "recipes", "vits16_vicreg_rot", "--model.image_size", "96")
    assert code == 0
    path = RECIPES / "vits16_vicreg_rot.yaml"
    assert yaml.safe_load(out) == resolve_recipe(path, {"model.image_size": 96}, [RECIPES])
    for word, value, message in (
        ("image_siz", "96", "Did you mean 'image_size'"),
        ("image_size", "97", "patch_size=16"),
    ):
        code, out, said = run(capsys, "recipes", "vits16_vicreg_rot", f"--model.{word}", value)
        assert (code, out) == (2, "")
        assert message in said
    code, out, _ = run(capsys, "recipes", "vits16_ibot_sweep")
    assert code == 0
    assert yaml.safe_load(out) == yaml.safe_load((RECIPES / "vits16_ibot_sweep.yaml").read_text())


def test_env_says_nothing_of_whose_machine_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import platform
    import socket

    monkeypatch.setenv("HF_TOKEN", "hf_" + "a1B2" * 9)
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("NCCL_DEBUG", "/home/somebody/nccl.log")
    code, out, _ = run(capsys, "env")
    assert code == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["python"].split()[0] == platform.python_version()
    assert lines["NCCL_DEBUG"].strip() == "set"
    assert {"torch", "transformers", "CPU", "cores", "memory", "accelerators", "bf16 on the CPU"} <= lines.keys()
    for secret in ("hf_a1", "somebody", str(Path.cwd()), sys.prefix, socket.gethostname()):
        assert secret not in out
