"""A run that was stopped reaches the weights of one that was not, bit for bit, for ours and for stock encoders."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_equissl.distributed.signals import MARKER_FILE, Preempted
from hf_equissl.finetuning import prepare, train
from hf_equissl.finetuning.run import build_trainer


def trained_weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


class _StopError(Exception):
    pass


def stop_after(trainer: Any, step: int) -> None:
    """Train and break off in the middle of an epoch, after the checkpoint of ``step``."""
    real = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if args[0].training and trainer.state.global_step == step:
            raise _StopError
        return real(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(_StopError):
        trainer.train()


@pytest.mark.parametrize(
    ("encoder", "method", "every"),
    # An epoch has three steps: with every third, the checkpoint is saved between its last step and its evaluation.
    [("equissl", "full", 2), ("equissl", "dora", 2), ("dinov2", "full", 3), ("vit", "full", 2)],
)
def test_a_resumed_run_ends_with_the_same_weights(settings: Any, encoder: str, method: str, every: int) -> None:
    depth = {} if encoder == "vit" else {"drop_path": 0.2}
    chosen = settings(encoder, method=method, save_steps=every, lora_dropout=0.2, **depth)
    unbroken = prepare(chosen)
    build_trainer(unbroken).train()
    expected = trained_weights(unbroken)
    shutil.rmtree(chosen.output_dir)

    stop_after(build_trainer(prepare(chosen)), step=5)  # of 6, in the second epoch
    run = prepare(chosen)
    assert run.checkpoint is not None
    assert Path(run.checkpoint).name == f"checkpoint-{5 // every * every}"
    trainer = build_trainer(run)
    fresh = trained_weights(run)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    found = trained_weights(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(fresh[name], expected[name]) for name in expected)


def test_a_signal_stops_a_run_that_goes_on(settings: Any, tmp_path: Path) -> None:
    chosen = settings(method="full", epochs=300, save_steps=10_000)

    def send() -> None:
        end = time.monotonic() + 120
        while not (Path(chosen.output_dir) / "run.json").is_file() and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Preempted, match="SIGUSR1: stopped at step"):
        train(prepare(chosen))
    sender.join()
    saved = [folder.name for folder in Path(chosen.output_dir).glob("checkpoint-*")]
    assert len(saved) == 1
    assert (Path(chosen.output_dir) / MARKER_FILE).read_text().startswith("SIGUSR1: stopped at step")
    run = prepare(chosen)
    assert run.checkpoint is not None
    assert Path(run.checkpoint).name == saved[0]
    assert not (Path(chosen.output_dir) / MARKER_FILE).exists()


def test_a_finished_run_is_not_trained_again(settings: Any) -> None:
    chosen = settings(method="lora")
    first = train(prepare(chosen))
    weights = Path(chosen.output_dir) / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(Path(chosen.output_dir) / "adapter")
    run = prepare(chosen)
    assert run.finished
    again = train(run)
    assert weights.read_bytes() == before
    assert [record.values for record in again] == [record.values for record in first]


def test_another_run_s_folder_is_refused(settings: Any, tmp_path: Path) -> None:
    chosen = settings(method="linear", epochs=1)
    train(prepare(chosen))
    with pytest.raises(ValueError, match="holds a run with --method linear, and this one says full"):
        prepare(settings(method="full", epochs=1))
    with pytest.raises(ValueError, match="holds a run with --keep last, and this one says best"):
        prepare(settings(method="linear", epochs=1, keep="best"))  # that checkpoint may be gone
    with pytest.raises(ValueError, match=r"holds a run with --learning_rate 0.003, and this one says 0.0017"):
        prepare(settings(method="linear", epochs=1, learning_rate=None))
    with pytest.raises(ValueError, match="holds a run with --seed 0, and this one says 1"):
        prepare(settings(method="linear", epochs=1, seed=1))
    with pytest.raises(ValueError, match=r"--resume never: .* holds checkpoint-3 already"):
        prepare(chosen, resume="never")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        prepare(chosen, resume=os.fspath(tmp_path))
    # Where the work is divided, and how often it is looked at, may change.
    assert prepare(settings(method="linear", epochs=1, eval_steps=2, max_bad_share=0.5)).checkpoint is not None
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another run"):
        prepare(settings(output_dir=str(tmp_path / "pretraining")))
