"""One launcher on each of two machines, both of them this one: they find each other and train as one run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import limit

from .launching import ENGINES, free_port, kill, launch_really, needs_deepspeed, run
from .test_engines import VICREG, words_of


def test_two_launchers_train_one_run(photo_folder: Path, tmp_path: Path) -> None:
    """What all files of accelerate_configs say of several machines: the same command on each but for its rank."""
    engine = "zero2"  # DeepSpeed's own way to start would make a run of each machine
    needs_deepspeed()
    port = free_port()
    folder = tmp_path / "run"
    words = ["--data", str(photo_folder), "--output_dir", str(folder), *words_of("cifar10_vicreg_rot", VICREG)]
    words += ["--training.per_device_train_batch_size", "8"]
    there = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank")
    second = launch_really(engine, *words, log=tmp_path / "second.log", launcher=(*there, "1"))
    try:
        first = run(engine, *words, launcher=(*there, "0"), variables={"EQUISSL_FACTS": str(folder)}, really=True)
        assert first.returncode == 0, first.stderr[-3000:]
        assert second.wait(limit(60.0)) == 0, (tmp_path / "second.log").read_text()[-3000:]
    finally:
        kill(second)
    manifest = json.loads(next(folder.glob("checkpoint-*/checkpoint.json")).read_text())
    assert (manifest["engine"], manifest["world_size"], manifest["global_batch"]) == (engine, 2, 16)
    assert f"wrapped: {ENGINES[engine][1]} " in first.stdout
    assert "batch 8 x 2 x 1 = 16" in first.stdout
    assert (folder / "encoder" / "model.safetensors").is_file()
