"""EquiSSLTrainer with ``push_to_hub``: what is published when, and that training does not notice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from transformers import AutoModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_equissl import EquiSSLForPreTraining
from hf_equissl.checkpoints import newest_checkpoint
from hf_equissl.hub import PublishError, repository
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from tests.hub.loopback_hub import LoopbackHub
from tests.pretraining.test_trainer import assert_same, make_trainer, weights
from tests.processes import limit

pytest_plugins = ["tests.hub.fixtures"]
REPO = "maker/run"
PUSHING = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 4, "save_steps": 2, "hub_license": "apache-2.0"}


@pytest.fixture(autouse=True)
def unexecuted_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards without running their code, which takes seconds and is tested with the card."""
    monkeypatch.setattr(repository, "run_snippets", lambda chosen: None)


class WaitForUploads(TrainerCallback):
    """Training that is slow enough for each upload to end before the next save."""

    def __init__(self, trainer: EquiSSLTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


def titles(api: HfApi, revision: str | None = None) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(REPO, revision=revision)][::-1]


def test_every_save(
    hub_here: LoopbackHub,
    photo_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network failure at the first save is a warning; the second publishes; training goes as without; no token."""
    plain = make_trainer(photo_folder, tmp_path / "plain", max_steps=4, save_steps=2)
    plain.train()
    token = "hf_" + "SECRETsecret" * 3
    hub_here.token = token
    monkeypatch.delenv("HF_TOKEN")
    trainer = make_trainer(photo_folder, tmp_path / "run", **PUSHING, hub_strategy="every_save", hub_token=token)
    trainer.add_callback(WaitForUploads(trainer))
    api = HfApi(endpoint=hub_here.endpoint, token=token)
    assert api.list_repo_files(REPO) == [".gitattributes"]
    hub_here.refuse("POST .*/commit/", 503, "Service unavailable", count=1)
    with caplog.at_level(logging.DEBUG, logger="hf_equissl"):
        trainer.train()
    assert_same(weights(plain), weights(trainer))
    assert titles(api) == ["initial commit", "Training in progress, step 4"]
    assert "Step 2 was not published, training goes on" in caplog.text
    assert "status 503" in caplog.text

    # Another card: that of step 4 may differ in the seconds of training alone, or in nothing.
    trainer.push_to_hub(description="Trained to the end.")
    assert titles(api)[-1] == "End of training"
    monkeypatch.setenv("HF_TOKEN", token)
    model = AutoModel.from_pretrained(REPO)
    expected = EquiSSLForPreTraining.from_pretrained(str(newest_checkpoint(tmp_path / "run"))).export_encoder()
    assert_same(model.state_dict(), expected.state_dict())
    whole = EquiSSLForPreTraining.from_pretrained(REPO, subfolder="pretraining")
    assert_same(whole.state_dict(), weights(trainer))
    sent = list(hub_here.uploads)
    trainer.push_to_hub(description="Trained to the end.")
    assert hub_here.uploads == sent

    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoint-2", "checkpoint-4", "reconstructions.png", "run.json"}
    assert token not in caplog.text
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes(), path
    for blob in hub_here.repo(REPO).resolve("main")[1].files.values():
        assert token.encode() not in blob.data


def test_save_during_an_upload(hub_here: LoopbackHub, api: HfApi, photo_folder: Path, tmp_path: Path) -> None:
    """Uploads do not queue up; what was left out is published at the end of training."""
    trainer = make_trainer(photo_folder, tmp_path / "run", **PUSHING | {"save_steps": 1}, hub_strategy="every_save")
    hub_here.interrupt_uploads(first=1, count=1, kind="stall")

    class Heal(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            assert state.global_step == 1 or hub_here.interrupted.wait(30)
            if state.global_step == 4:
                assert hub_here.count("POST", "/preupload/") == 1
                hub_here.heal()

    trainer.add_callback(Heal())
    trainer.train()
    assert titles(api) == ["initial commit", "Training in progress, step 1", "Training in progress, step 4"]


def test_end(hub_here: LoopbackHub, api: HfApi, photo_folder: Path, tmp_path: Path) -> None:
    """Nothing before ``push_to_hub``, which writes the missing checkpoint; on a branch, private, with options."""
    arguments = PUSHING | {"max_steps": 2, "save_strategy": "no", "hub_private_repo": True, "hub_revision": "tryout"}
    trainer = make_trainer(photo_folder, tmp_path / "run", **arguments)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.push_to_hub()
    trainer.train()
    assert titles(api) == ["initial commit"]
    commit = trainer.push_to_hub(license="mit", parts=["encoder", "card"])
    assert api.model_info(REPO, revision="tryout").sha == commit.oid
    assert api.model_info(REPO).private
    assert titles(api) == ["initial commit"]
    files = api.list_repo_files(REPO, revision="tryout")
    assert "model.safetensors" in files
    assert not any(name.startswith(("native", "pretraining")) for name in files)
    card = Path(api.hf_hub_download(REPO, "README.md", revision="tryout")).read_text()
    assert "license: mit" in card
    future = trainer.push_to_hub("Once more", blocking=False, revision="main")
    assert future.result().oid == api.model_info(REPO).sha
    hub_here.refuse("POST .*/commit/", 503, "Service unavailable")
    with pytest.raises(PublishError, match="trouble of its own"):
        trainer.push_to_hub(license="bsd-3-clause")
    assert not list((tmp_path / "run").glob(".publishing*"))


def test_without_push_to_hub(hub_here: LoopbackHub, api: HfApi, photo_folder: Path, tmp_path: Path) -> None:
    """The method works on a Trainer that was not told before; the repository is called like the folder."""
    trainer = make_trainer(photo_folder, tmp_path / "my-run", max_steps=1)
    trainer.train()
    assert hub_here.repos == {}
    trainer.push_to_hub(parts=["encoder", "card"], license="mit")
    assert "model.safetensors" in api.list_repo_files("maker/my-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "hub_strategy is 'checkpoint', which would upload pickled optimizer states"),
        ({"hub_strategy": "all_checkpoints"}, "Use end or every_save"),
        ({"hub_strategy": "sometimes"}, "sometimes"),
        ({"hub_always_push": True}, "hub_always_push must stay false"),
        ({"hub_model_id": "stranger/run"}, "no right to write there"),
        ({"hub_model_id": "a b"}, "'a b' is not the name of a repository"),
        ({"hub_model_id": "lab/public", "hub_private_repo": True}, "lab/public exists and is public"),
        ({"hub_token": "hf_wrong"}, "token is missing, wrong or expired"),
    ],
)
def test_refused_at_the_start(
    hub_here: LoopbackHub, api: HfApi, photo_folder: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    api.create_repo("lab/public")
    with pytest.raises(ValueError, match=message):
        make_trainer(photo_folder, tmp_path / "run", **PUSHING | arguments)
    assert set(hub_here.repos) == {("model", "lab/public")}


TWO_PROCESSES = """
import sys
from pathlib import Path

from tests.pretraining.test_trainer import make_trainer

from hf_equissl.distributed.agreement import end_process
from hf_equissl.hub import PublishError, repository

repository.run_snippets = lambda chosen: None
arguments = {"push_to_hub": True, "hub_model_id": "maker/run", "hub_strategy": "every_save", "max_steps": 2}
arguments["hub_license"] = "apache-2.0"
photos, output = map(Path, sys.argv[1:])
trainer = make_trainer(photos, output, **arguments, save_steps=2, per_device_train_batch_size=4)
trainer.train()
commit = trainer.push_to_hub(license="mit")
try:
    trainer.push_to_hub(token="hf_wrong")
    error = None
except PublishError as caught:
    error = "token" in str(caught)
# In one write, or the lines of both may run into each other.
sys.stdout.write(f"process {trainer.args.process_index}: {commit and commit.oid} {error}\\n")
end_process(0)
"""


@pytest.mark.slow
def test_two_processes(hub: LoopbackHub, photo_folder: Path, tmp_path: Path) -> None:
    """Only the main process publishes, the other waits, also when publishing fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command += [str(tmp_path / "script.py"), str(photo_folder), str(tmp_path / "run")]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **hub.env(tmp_path / "home"), "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit(300.0), check=False)
    assert done.returncode == 0, done.stderr
    history = [(oid, commit.title) for oid, commit in hub.repo(REPO).history("main")][::-1]
    assert [title for _, title in history] == ["initial commit", "Training in progress, step 2", "End of training"]
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert said == [f"process 0: {history[-1][0]} True", "process 1: None None"]
