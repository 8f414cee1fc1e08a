"""The command that publishes: from a run to a repository on a Hub that others load from."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoImageProcessor, AutoModel

from hf_equissl import EquiSSLForPreTraining
from hf_equissl.hub import PARTS, repository
from hf_equissl.training import push_to_hub
from hf_equissl.utils.files import readable_size
from tests.hub.loopback_hub import LoopbackHub
from tests.pretraining.test_trainer import assert_same, make_trainer
from tests.processes import environment, limit, start

pytest_plugins = ["tests.hub.fixtures"]
REPO = "maker/tiny"
LICENCE = ["--license", "apache-2.0"]  # nothing says that of pictures in a folder
SCRIPT = Path(__file__).resolve().parents[2] / "training" / "push_to_hub.py"


@pytest.fixture(scope="module")
def run(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a teacher: that is what is exported."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    make_trainer(photo_folder, folder, base="ibot", max_steps=2, teacher_momentum=0.5).train()
    return folder


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its repository."""
    folder = tmp_path_factory.mktemp("built") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        _leave_out_execution(patch)
        assert push_to_hub.main([str(run), "--repo_id", REPO, "--output_dir", str(folder), *LICENCE]) == 0
    return folder


@pytest.fixture
def unexecuted_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    _leave_out_execution(monkeypatch)


def _leave_out_execution(patch: pytest.MonkeyPatch) -> None:
    """Cards without running their code, which takes seconds and is tested with the card."""
    patch.setattr(repository, "run_snippets", lambda chosen: None)


def test_publish_a_built_repository(
    hub_here: LoopbackHub, api: HfApi, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part loads from the endpoint by the repository's name; a second call changes nothing."""
    assert push_to_hub.main([str(built), "--repo_id", REPO, "--commit_message", "Hello"]) == 0
    said = capsys.readouterr().out
    commit = api.list_repo_commits(REPO)[0]
    assert said.splitlines() == [
        "logged in as maker",
        f"published: {hub_here.endpoint}/{REPO}/commit/{commit.commit_id}",
    ]
    assert commit.title == "Hello"
    assert len(api.list_repo_commits(REPO)) == 2
    encoder = AutoModel.from_pretrained(REPO)
    whole = EquiSSLForPreTraining.from_pretrained(REPO, subfolder="pretraining")
    native = AutoModel.from_pretrained(REPO, subfolder="native")
    assert native.config.model_type == "dinov2"
    assert_same(whole.export_encoder().state_dict(), encoder.state_dict())
    teacher, student = (network.state_dict() for network in (whole.teacher, whole.student))
    for name, value in native.state_dict().items():
        if not name.endswith("lambda1"):  # LayerScale, which only the stock model has
            assert torch.equal(value, teacher[name]), name
    assert not all(torch.equal(value, student[name]) for name, value in teacher.items())
    assert list(AutoImageProcessor.from_pretrained(REPO, subfolder="native").image_mean) == [0.5] * 3
    card = ModelCard.load(REPO)
    assert f'AutoModel.from_pretrained("{REPO}")' in card.text
    assert card.data.license == "apache-2.0"
    assert push_to_hub.main([str(built), "--repo_id", REPO]) == 0
    assert len(api.list_repo_commits(REPO)) == 2


@pytest.mark.usefixtures("unexecuted_cards")
def test_publish_a_run(hub_here: LoopbackHub, api: HfApi, run: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    command = [str(run), "--repo_id", "lab/tiny", "--private", "--revision", "first", "--parts", "native", "card"]
    assert push_to_hub.main([*command, "--license", "mit"]) == 0
    assert api.model_info("lab/tiny").private
    assert api.list_repo_files("lab/tiny") == [".gitattributes"]
    files = api.list_repo_files("lab/tiny", revision="first")
    assert {name for name in files if name.endswith(".safetensors")} == {"native/model.safetensors"}
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.usefixtures("unexecuted_cards")
def test_dry_run(hub_here: LoopbackHub, run: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, sizes and card, of a run and of a repository; nothing is sent, and nobody needs to be logged in."""
    for source, words in ((run, LICENCE), (built, [])):
        assert push_to_hub.main([str(source), "--repo_id", REPO, "--dry_run", *words]) == 0
        said = capsys.readouterr().out
        size = (built / "model.safetensors").stat().st_size
        assert f"{readable_size(size)}  model.safetensors" in said
        assert "pretraining/model.safetensors" in said
        assert (built / "README.md").read_text() in said
        assert "Nothing was sent" in said
    assert hub_here.requests == []
    assert hub_here.repos == {}


def test_interrupted_by_the_user(hub_here: LoopbackHub, api: HfApi, built: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the second object; the same command sends the others, and only those."""
    hub_here.interrupt_uploads(first=2, kind="stall")
    command = [sys.executable, str(SCRIPT), str(built), "--repo_id", REPO]
    out, err = tmp_path / "out", tmp_path / "err"
    process = start(command, env=environment(**hub_here.env(tmp_path / "home")), stdout=out, stderr=err)
    assert hub_here.interrupted.wait(limit(120.0))
    process.send_signal(signal.SIGINT)
    hub_here.heal()
    assert process.wait(limit(60.0)) == 130, err.read_text()
    assert "interrupted: nothing is half-published" in err.read_text()
    assert out.read_text() == "logged in as maker\n"
    arrived = list(hub_here.uploads)
    assert api.list_repo_files(REPO) == [".gitattributes"]
    assert push_to_hub.main(command[2:]) == 0
    assert hub_here.uploads[: len(arrived)] == arrived
    assert len(set(hub_here.uploads)) == len(hub_here.uploads)
    assert "model.safetensors" in api.list_repo_files(REPO)


def test_what_can_be_mended(
    hub_here: LoopbackHub,
    run: Path,
    built: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2 and one line that says what to do; nothing is created."""
    spoiled = Path(shutil.copytree(built, tmp_path / "spoiled"))
    (spoiled / "README.md").write_text((built / "README.md").read_text() + "\nTODO\n")
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "none", "--repo_id", REPO], "none is not a folder"),
        (
            [tmp_path / "empty", "--repo_id", REPO],
            "Nor recipe.yaml or run.json: is it the folder that --output_dir",
        ),
        ([spoiled, "--repo_id", REPO], "a note to do something: 'TODO'"),
        ([spoiled, "--repo_id", REPO, "--dry_run"], "a note to do something: 'TODO'"),
        ([built, "--repo_id", REPO, "--parts", "card"], "--parts belongs to building one"),
        ([built, "--repo_id", "a b"], "'a b' is not the name of a repository"),
        ([run, "--repo_id", "tiny", *LICENCE], "owner/name"),
        ([run, "--repo_id", REPO], "The licence is yours to say"),
        ([built, "--repo_id", REPO, *LICENCE], "--license belongs to building one"),
        ([built, "--repo_id", "stranger/tiny"], "no right to write there"),
        ([run, "--repo_id", REPO, "--results", tmp_path / "empty"], "There are no results"),
    ]
    for arguments, message in cases:
        assert push_to_hub.main([str(word) for word in arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert "error: " in said
        assert message in said.partition("error: ")[2], said
    monkeypatch.delenv("HF_TOKEN")
    assert push_to_hub.main([str(built), "--repo_id", REPO]) == 2
    assert f"error: {REPO} cannot be published: you are not logged in." in capsys.readouterr().err
    assert hub_here.repos == {}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hub_home") == ["empty", "spoiled"]


def test_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert push_to_hub.PARTS == PARTS
    with pytest.raises(SystemExit) as caught:
        push_to_hub.main(["run", "--repo_id", REPO, "--parts", "everything"])
    assert caught.value.code == 2
    assert "invalid choice: 'everything'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        push_to_hub.main(["run"])
    assert caught.value.code == 2
