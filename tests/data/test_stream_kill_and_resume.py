"""Pretraining on a stream, by two processes with two workers each, killed without warning and started again."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file

from hf_equissl.data.throughput import LOG_KEYS
from tests.distributed import launching
from tests.distributed.test_resume import kill_9

STEPS = 6
OPTIONS = [
    "--recipe", "cifar10_vicreg_rot", "--data.streaming", "true", "--data.shuffle_buffer", "20",
    "--training.per_device_train_batch_size", "8", "--training.max_steps", str(STEPS), "--training.save_steps", "4",
    "--training.logging_steps", "2", "--training.warmup_steps", "2", "--training.dataloader_num_workers", "2",
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.drop_path_rate", "0.2",
]  # fmt: skip


def write_shards(photo_folder: Path, folder: Path) -> Path:
    """Three shards for four readers."""
    folder.mkdir()
    photos = sorted(photo_folder.iterdir())
    rows = datasets.Dataset.from_list([{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in photos])
    for number in range(3):
        rows.cast_column("image", datasets.Image()).shard(3, number).to_parquet(folder / f"{number}.parquet")
    return folder


def test_kill_9_and_resume_on_a_stream(photo_folder: Path, tmp_path: Path) -> None:
    data = write_shards(photo_folder, tmp_path / "shards")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    options = [*OPTIONS, "--data", str(data), "--output_dir"]
    log = tmp_path / "killed.log"
    kill_9(launching.start("ddp", *options, str(broken), log=log), broken / "checkpoint-4", log)
    assert not (broken / "encoder").exists()
    runs = json.dumps([[*options, str(broken)], [*options, str(unbroken)]])
    result = launching.run("ddp", runs, script=launching.ROOT / "tests" / "distributed" / "several.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"resuming from {broken / 'checkpoint-4'}" in result.stdout
    assert json.loads((broken / "facts.json").read_text())["wrapped"] == "DistributedDataParallel"
    for file in (f"checkpoint-{STEPS}/model.safetensors", "encoder/model.safetensors"):
        left, right = load_file(unbroken / file), load_file(broken / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(value, right[key]) for key, value in left.items()), file
    # The images were the same, not only as many: positions of both ranks, and every logged number but the clock's.
    for rank in range(2):
        left, right = (json.loads((run / f"checkpoint-{STEPS}/data_position-{rank}.json").read_text()) for run in
                       (unbroken, broken))  # fmt: skip
        assert left == right
        assert {worker["worker"] for worker in left["workers"]} == {0, 1}
        assert max(worker["epoch"] for worker in left["workers"]) > 0
    logs = [read_log(run) for run in (unbroken, broken)]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == list(range(2, STEPS + 1, 2))


def read_log(run: Path) -> list[dict[str, float]]:
    history = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    assert all(entry["images_per_second"] > 0 and 0 <= entry["data_wait"] <= 1 for entry in losses)
    return [{key: value for key, value in entry.items() if key not in LOG_KEYS} for entry in losses]
