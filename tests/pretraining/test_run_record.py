"""What a run leaves of itself beside its checkpoints."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hf_equissl.pretraining.run_record import RECORD_FILE, RunRecord
from tests.pretraining.test_trainer import make_trainer


@pytest.fixture(scope="module")
def folder(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps."""
    output = tmp_path_factory.mktemp("run")
    make_trainer(photo_folder, output).train()
    return output


def test_the_record_says_what_was_run(folder: Path, photo_folder: Path) -> None:
    record = RunRecord.load(folder)
    assert record.data == f"{photo_folder} (train)"
    assert (record.num_images, record.image_size, record.steps, record.starts) == (32, 32, 6, 1)
    assert record.batch == {"per_device": 8, "processes": 1, "accumulation": 1}
    assert record.global_batch == 8
    assert (record.image_mean, record.image_std) == ((0.5,) * 3, (0.25,) * 3)
    assert (record.precision, record.seed) == ("fp32", 0)
    assert record.hardware["device"]
    assert record.versions.keys() >= {"python", "torch", "transformers", "hf-equissl", "accelerate"}
    assert 0 < record.seconds < 600
    assert record.started <= str(record.finished)
    assert shlex.split(record.command)[0] == "python"


def test_a_resumed_run_counts_its_starts_and_keeps_its_beginning(folder: Path, photo_folder: Path) -> None:
    before = RunRecord.load(folder)
    resumed = make_trainer(photo_folder, folder, max_steps=9)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    after = RunRecord.load(folder)
    assert (after.starts, after.steps, after.started) == (2, 9, before.started)
    assert after.seconds > before.seconds
    assert after.finished is not None


def test_a_run_that_stops_on_the_way_is_not_finished(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    step = trainer.training_step

    def stop(*args: object, **kwargs: object) -> object:
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    trainer.training_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    record = RunRecord.load(tmp_path)
    assert (record.steps, record.finished) == (3, None)  # as far as the last checkpoint


def test_reading_back_gives_the_same_record(folder: Path, tmp_path: Path) -> None:
    record = replace(RunRecord.load(folder), num_images=None)
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record


def test_files_that_are_no_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunRecord.load(tmp_path)
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        RunRecord.load(tmp_path)
    (tmp_path / RECORD_FILE).write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="not a run record of format 1"):
        RunRecord.load(tmp_path)


def test_null_is_a_value_only_where_it_says_something(folder: Path, tmp_path: Path) -> None:
    RunRecord.load(folder).save(tmp_path)
    whole = json.loads((tmp_path / RECORD_FILE).read_text())
    for name in whole.keys() - {"format"}:
        (tmp_path / RECORD_FILE).write_text(json.dumps({**whole, name: None}))
        if name in ("num_images", "finished", "preempted"):
            assert RunRecord.load(tmp_path)
        else:
            with pytest.raises(ValueError, match=r"run\.json is damaged .* written anew when the run is continued"):
                RunRecord.load(tmp_path)
