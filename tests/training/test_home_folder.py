"""A ``~`` in any path is the home folder from the first moment on, whether or not a shell has expanded it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hf_equissl.evaluation import cli as probe
from hf_equissl.extraction import cli as extract
from hf_equissl.extraction.settings import ExtractionSettings
from hf_equissl.finetuning import cli as finetune
from hf_equissl.finetuning.settings import FineTuningSettings
from hf_equissl.recipes.overrides import PATH_KEYS
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.recipes.sweep import read_sweep
from hf_equissl.training import benchmark, convert, plan, pretrain, push_to_hub, quickstart, report, scaling, sweep
from tests.training.test_pretrain_cli import TINY

PARSERS = {
    "benchmark": benchmark._parser,
    "convert": convert._parser,
    "extract_features": extract.build_parser,
    "finetune": finetune.build_parser,
    "plan": plan._parser,
    "pretrain": pretrain._parser,
    "probe": probe.build_parser,
    "push_to_hub": push_to_hub.build_parser,
    "quickstart": quickstart._parser,
    "report": report.build_parser,
    "scaling": scaling._parser,
    "sweep": sweep._parser,
}
# What stands for a value in the help of an option that takes a path, or a name of the Hub instead.
PLACEHOLDERS = ("DIR", "PATH", "SOURCE", "ENCODER")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the working directory is another one."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def takes_path(action: argparse.Action) -> bool:
    metavar = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    return any(word in str(each) for each in metavar for word in PLACEHOLDERS)


@pytest.mark.parametrize("script", PARSERS)
def test_every_option_that_takes_a_path(script: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = PARSERS[script]()
    actions = [action for action in parser._actions if takes_path(action)]
    assert "output_dir" in [action.dest for action in actions] or script == "plan"
    for action in actions:
        action.required, others = False, [each for each in parser._actions if each is not action]
        for other in others:
            other.required = False
            other.nargs = "?" if not other.option_strings else other.nargs
        words = [*action.option_strings[:1], "~/x y"]
        value = getattr(parser.parse_args(words), action.dest)
        while isinstance(value, list):
            (value,) = value
        assert value == str(home / "x y"), action.dest
        with pytest.raises(SystemExit):
            parser.parse_args([*action.option_strings[:1], "~nobody-of-this-name/x"])
        assert "no home folder ~nobody-of-this-name" in capsys.readouterr().err


def test_settings_made_in_python(home: Path) -> None:
    for kind in (FineTuningSettings, ExtractionSettings):
        settings = kind("~/encoder", "~/photos", "~/out")
        wanted = [str(home / name) for name in ("encoder", "photos", "out")]
        assert [settings.encoder, settings.data, settings.output_dir] == wanted
    before = {**FineTuningSettings("e", "~/photos", "o").to_dict(), "data": "~/photos"}  # as runs stored it once
    assert not FineTuningSettings("e", "~/photos", "o").differences(before)


def test_paths_in_recipes(home: Path) -> None:
    (home / "base.yaml").write_text(TINY)
    path = Path("mine.yaml")
    rest = "data: {source: ~/photos, cache_dir: ~/cache}\nmonitor: {every_steps: 9, source: ~/others}\n"
    path.write_text(f"extends: ~/base.yaml\n{rest}")
    recipe = Recipe.load(path, {"model.init_from": "~/encoder", "training.deepspeed": "~/zero.json"})
    sections = {"model": recipe.model, "data": recipe.data, "training": recipe.training, "monitor": recipe.monitor}
    paths = [value for name, keys in PATH_KEYS.items() for key in keys if (value := sections[name].get(key))]
    assert paths == [str(home / name) for name in ("encoder", "photos", "cache", "zero.json", "others")]
    grid = "{name: 'n-{seed}', extends: ~/base.yaml, cross: {training.seed: [1]}}"
    Path("sweep.yaml").write_text(f"sweep: [{grid}]")
    assert [member.recipe for member in read_sweep("sweep.yaml")] == [home / "base.yaml"]


def test_a_run_below_the_home_folder_goes_on(
    photo_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``shared/cases/tilde_output_dir.sh``: bash leaves the ``~`` of ``--output_dir=~/r`` as it is."""
    (home / "tiny.yaml").write_text(TINY)
    (home / "photos").symlink_to(photo_folder)
    words = ["--recipe=~/tiny.yaml", "--data=~/photos", "--output_dir=~/r", "--training.warmup_steps", "1"]
    assert pretrain.main(words) == 0
    assert f"starting in {home / 'r'}" in capsys.readouterr().out
    assert pretrain.main([*words, "--training.max_steps", "4"]) == 0
    assert f"resuming from {home / 'r' / 'checkpoint-2'}" in capsys.readouterr().out
    assert pretrain.main([*words, "--training.max_steps", "5", "--resume=~/r/checkpoint-4"]) == 0
    assert not list(Path().iterdir())
    assert (home / "r" / "checkpoint-5").is_dir()
    assert not (home / "r" / ".lock").exists()
