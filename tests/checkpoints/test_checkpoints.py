"""Which checkpoints are complete, which run and launch they continue, and how their weights are read."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_equissl.checkpoints import (
    MANIFEST,
    MODEL_SHARDS,
    CheckpointError,
    IncompleteCheckpointError,
    Manifest,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint_weights,
)
from hf_equissl.checkpoints.integrity import checksums
from hf_equissl.checkpoints.sharded_files import read_whole, write_shards
from hf_equissl.distributed.engines import Engine
from hf_equissl.hub.pretraining_state import load_pretraining_state
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running import output_folder
from hf_equissl.running.output_folder import check_shared_folder
from hf_equissl.running.resume import Launch, describe_resume, find_checkpoint
from hf_equissl.utils.files import readable_size
from hf_equissl.utils.suggestions import RecipeError
from tests.distributed import launching
from tests.pretraining.test_trainer import make_trainer

ROOT = Path(__file__).resolve().parents[2]


def fake(folder: Path, engine: str = "single", world_size: int = 1, batch: int = 32, kind: str = "full") -> Path:
    """A checkpoint as far as its manifest goes."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "shards").mkdir()
    (folder / "shards" / "0.distcp").write_bytes(b"")
    files = {"model.safetensors": 7, "shards/0.distcp": 0}
    step, sums = int(folder.name[11:]), checksums(folder, list(files))
    Manifest(Engine(engine), world_size, batch, step, kind, files, sums).write(folder)
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "has no checkpoint.json, which is written last"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "checkpoint.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"engine": "fsdp1"}'), "checkpoint.json cannot be read"),
        (lambda folder: (folder / "shards" / "0.distcp").unlink(), "0.distcp is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"wei"), "has 3 bytes, and 7 were written"),
    ],
)
def test_what_is_not_complete_is_passed_over(
    harm: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake(tmp_path / "checkpoint-3")
    fake(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    harm(tmp_path / "checkpoint-20")
    with caplog.at_level(logging.WARNING):
        assert [newest_checkpoint(tmp_path) for _ in range(3)] == [str(tmp_path / "checkpoint-3")] * 3
    assert len(caplog.records) == 1
    assert said in caplog.text
    assert "checkpoint-20 is not complete and is passed over" in caplog.text
    with pytest.raises(IncompleteCheckpointError, match=said):
        Manifest.read(tmp_path / "checkpoint-20")
    with pytest.raises(RecipeError, match=rf"--resume .*checkpoint-20: no complete checkpoint: .*{said}"):
        find_checkpoint(recipe(), tmp_path, str(tmp_path / "checkpoint-20"), Launch(32, 1, 1, Engine.SINGLE))


def recipe(**training: Any) -> Recipe:
    overrides = {f"training.{key}": value for key, value in training.items()}
    folder = ROOT / "training" / "recipes"
    return Recipe.load(folder / "cifar10_vicreg_rot.yaml", overrides, search=[folder])


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("launched", ["single", "ddp", "fsdp2"])
def test_what_goes_by_names_goes_on_under_any_engine(engine: str, kind: str, launched: str, tmp_path: Path) -> None:
    checkpoint = fake(tmp_path / "checkpoint-3", engine, 2, 32, kind)
    for launch in (Launch(32, 1, 1, Engine(launched)), Launch(4, 4, 2, Engine(launched))):
        assert find_checkpoint(recipe(), tmp_path, "auto", launch) == str(checkpoint)
        assert "drop path" in describe_resume(str(checkpoint), launch)[1]
    same = Launch(16, 2, 1, Engine(engine))
    assert describe_resume(str(checkpoint), same) == ()


@pytest.mark.parametrize(
    ("saved", "processes", "launched", "said"),
    [
        ("zero2", 2, "zero1", "zero2 on 2 processes, and this launch is zero1 on 2 processes"),
        ("zero3", 4, "zero3", "zero3 on 4 processes, and this launch is zero3 on 2 processes"),
        ("zero1", 2, "ddp", "Start it on 2 processes under zero1 as before, or start anew"),
        ("ddp", 2, "zero2", "Start it under ddp as before .or another engine that is not DeepSpeed., or start anew"),
    ],
)
def test_deepspeed_goes_on_only_as_before(saved: str, processes: int, launched: str, said: str, tmp_path: Path) -> None:
    kind = "deepspeed" if saved.startswith("zero") else "full"
    checkpoint = fake(tmp_path / "checkpoint-3", saved, processes, 32, kind)
    with pytest.raises(RecipeError, match=said) as error:
        find_checkpoint(recipe(), tmp_path, "auto", Launch(16, 2, 1, Engine(launched)))
    assert f"--init_from {checkpoint}" in str(error.value)
    as_before = Launch(32 // processes, processes, 1, Engine(saved))
    assert find_checkpoint(recipe(), tmp_path, "auto", as_before) == str(checkpoint)
    assert find_checkpoint(recipe(), tmp_path, "auto", Launch(32, 1, 1)) == str(checkpoint)  # a dry run knows no engine


def test_weights_alone_are_not_continued(tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint-3", kind="weights")
    with pytest.raises(RecipeError, match="save_only_model"):
        find_checkpoint(recipe(), tmp_path, "auto", Launch(32, 1, 1, Engine.SINGLE))


def test_the_global_batch_counts_not_how_it_is_split(tmp_path: Path) -> None:
    asked = recipe()
    asked.save(tmp_path)
    fake(tmp_path / "checkpoint-3", "ddp", 2, 64)
    for launch in (Launch(64, 1, 1, Engine.SINGLE), Launch(16, 2, 2, Engine.DDP), Launch(1, 64, 1, Engine.DDP)):
        assert find_checkpoint(recipe(per_device_train_batch_size=8), tmp_path, "auto", launch) is not None
    with pytest.raises(
        RecipeError, match=r"batch of 64 images.* 24 per device x 2 processes x 1 accumulated = 48\. "
    ) as error:
        find_checkpoint(asked, tmp_path, "auto", Launch(24, 2, 1, Engine.DDP))
    assert "--training.per_device_train_batch_size 8 --training.gradient_accumulation_steps 4" in str(error.value)
    with pytest.raises(RecipeError, match="a number of processes that divides 64"):
        find_checkpoint(asked, tmp_path, "auto", Launch(21, 3, 1, Engine.DDP))
    with pytest.raises(RecipeError, match=r"--resume never: .* holds checkpoint-3 already"):
        find_checkpoint(asked, tmp_path, "never", Launch(64, 1, 1, Engine.SINGLE))
    with pytest.raises(RecipeError, match=r"training\.seed = "):
        find_checkpoint(recipe(seed=5), tmp_path, "auto", Launch(64, 1, 1, Engine.SINGLE))


def test_a_run_goes_on_past_what_is_half_written_and_keeps_it(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(photo_folder, tmp_path, save_steps=2)
    trainer.train()
    whole = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    manifest = Manifest.read(tmp_path / "checkpoint-6")
    assert (manifest.engine, manifest.world_size, manifest.global_batch, manifest.step) == ("single", 1, 8, 6)
    assert manifest.files.keys() == {p.name for p in (tmp_path / "checkpoint-6").iterdir()} - {MANIFEST}
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "checkpoint-6" / MANIFEST).unlink()
    again = make_trainer(photo_folder, tmp_path, save_steps=2, save_total_limit=1)
    with pytest.raises(IncompleteCheckpointError, match=r"optimizer.pt has 4 bytes"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["checkpoint-6", "incomplete-checkpoint-4-1", "incomplete-checkpoint-6-1"]
    assert (tmp_path / "incomplete-checkpoint-4-1" / "optimizer.pt").read_bytes() == b"half"
    for name, value in load_file(tmp_path / "checkpoint-6" / "model.safetensors").items():
        assert torch.equal(value, whole[name]), name
    with pytest.raises(ValueError, match="no complete checkpoint to go on from"):
        make_trainer(photo_folder, tmp_path / "empty").train(resume_from_checkpoint=True)


def test_what_was_just_saved_is_never_the_one_to_delete(photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path, save_steps=2).train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")  # a manifest, and not what it lists
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = make_trainer(photo_folder, tmp_path, save_steps=2, save_total_limit=1, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_more_is_saved_by_a_hook_and_listed(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, save_steps=2, max_steps=2)
    trainer._save_more = lambda folder: (folder / "more.txt").write_text("12345")  # type: ignore[method-assign]
    trainer.train()
    assert Manifest.read(tmp_path / "checkpoint-2").files["more.txt"] == 5


def test_an_optimizer_with_other_groups_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path, save_steps=2, max_steps=2).train()
    other = make_trainer(photo_folder, tmp_path, layer_decay=0.5)
    with pytest.raises(ValueError, match="checkpoint-2 was saved with other optimizer groups"):
        other.train(resume_from_checkpoint=True)
    deeper = make_trainer(photo_folder, tmp_path / "dino", base="dino")
    with pytest.raises(ValueError, match=r"are of another model: .*names differ"):
        deeper.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_weights_are_read_from_every_format(photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path, save_steps=2, max_steps=2).train()
    full = tmp_path / "checkpoint-2"
    weights = load_file(full / "model.safetensors")
    sharded, indexed = tmp_path / "sharded", tmp_path / "indexed"
    for folder in (sharded, indexed):
        folder.mkdir()
        shutil.copy(full / "config.json", folder)
    write_shards(sharded / MODEL_SHARDS, weights)
    names = sorted(weights)
    files = {name: f"model-{position % 2}.safetensors" for position, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, indexed / file)
    (indexed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for folder in (full, sharded, indexed):
        read = read_checkpoint_weights(folder)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[name], weights[name]) for name in names)
    state = load_pretraining_state(sharded, dtype=torch.float32)
    assert all(torch.equal(value, weights[name]) for name, value in state.state_dict().items())
    assert not any(p.requires_grad for _, teacher in state.ema_pairs() for p in teacher.parameters())
    with pytest.raises(OSError, match=r"nothing/model\.safetensors"):
        read_checkpoint_weights(tmp_path / "nothing")
    next((sharded / MODEL_SHARDS).glob("*.distcp")).write_bytes(b"damaged")
    with pytest.raises(OSError, match=r"the weights in .* cannot be read"):
        read_checkpoint_weights(sharded)


def test_the_index_of_shards_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    write_shards(tmp_path / MODEL_SHARDS, {"x": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)})
    assert read_whole(tmp_path / MODEL_SHARDS)["x"].dtype == torch.bfloat16
    (tmp_path / MODEL_SHARDS / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(OSError, match=r"index names posix.mkdir"):
        read_checkpoint_weights(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_every_process_must_see_the_same_folder(tmp_path: Path) -> None:
    """Two processes, each with a folder of its own, as on two machines that share none; then with one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from hf_equissl.running import output_folder\n"
        "from hf_equissl.utils.suggestions import RecipeError\n"
        "dist.init_process_group('gloo')\n"
        "output_folder._PATIENCE = 0.2\n"
        f"base, rank = Path({str(tmp_path)!r}), os.environ['RANK']\n"
        "for name in (rank, 'shared', 'file'):\n"
        "    try:\n"
        "        output_folder.check_shared_folder(base / name)\n"
        "        said = 'fine'\n"
        "    except RecipeError as error:\n"
        "        said = str(error)\n"
        "    (base / f'said-{rank}-{name[0]}').write_text(said)\n"
        "dist.destroy_process_group()\n"
    )
    (tmp_path / "1").mkdir()
    (tmp_path / "file").write_text("a file")
    left = tmp_path / "shared" / ".saving" / "checkpoint-3"
    left.mkdir(parents=True)
    ended = launching.run("ddp", script=script)
    assert ended.returncode == 0, ended.stderr
    for rank in "01":
        assert "is not seen on" in (tmp_path / f"said-{rank}-{rank}").read_text()
        assert (tmp_path / f"said-{rank}-s").read_text() == "fine"
        assert "is a file. Name a folder" in (tmp_path / f"said-{rank}-f").read_text()
    left = [path.name for path in (tmp_path / "shared").iterdir()]
    assert left == [output_folder.LOCK_FILE]  # what a killed run was saving is gone, and the token too
    check_shared_folder(tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_sizes_are_readable() -> None:
    assert [readable_size(n) for n in (12, 2048, 5 * 2**20, 3 * 2**30)] == [
        "12 bytes",
        "2.0 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]


def test_an_error_of_writing_outside_of_a_checkpoint_is_raised(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        trainer.save_model(str(tmp_path / "file"))
    trainer._save_more = lambda folder: (folder / "no" / "folder").touch()  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"step 3 cannot be written in .*: No such file or directory.*no earlier"):
        trainer.train()
    assert list_checkpoints(tmp_path) == []
    assert not (tmp_path / ".saving").exists()
