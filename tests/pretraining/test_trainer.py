"""EquiSSLTrainer: exact resume, guards, logs, checkpoints that are whole or absent."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from hf_equissl.checkpoints import CheckpointError, newest_checkpoint
from hf_equissl.data import ImageViewDataset, SkippedImages, TooManyBadImages, load_images
from hf_equissl.modeling import EquiSSLConfig
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.loss_history import NonFiniteLossError
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from hf_equissl.running.publishing import Publisher
from hf_equissl.views import build_transformation
from hf_equissl.views.pipelines import build_pipeline

HEAD = {"num_prototypes": 16, "head_hidden_size": 32, "bottleneck_size": 8}
LOCAL = {"count": 2, "size": 16, "crop_scale": (0.1, 0.35)}
# Objective, and what its pipeline needs at 32 px.
BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vicreg": ({"expander_sizes": [32, 32]}, {}),
    "dino": (HEAD, {"local": LOCAL}),
    "ibot": (HEAD, {"local": LOCAL, "masks": {"min_patches": 1}}),
    "dinov2": (HEAD, {"local": LOCAL, "masks": {"min_patches": 1}}),
}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "feature_size": 32,
    "equivariant_size": 16,
    "drop_path_rate": 0.1,  # draws from the global generator, which a resume must restore
}


def make_trainer(
    photos: Path, output: Path, max_bad_share: float = 0.5, base: str = "vicreg", **arguments: Any
) -> EquiSSLTrainer:
    set_seed(0)
    objective, views = BASES[base]
    config = EquiSSLPreTrainingConfig(
        encoder=EquiSSLConfig(**ENCODER),
        invariance={"name": base, **objective},
        equivariance=[{"name": "reconstruction", "weight": 5.0, "decoder_widths": [16, 16, 16]}],
    )
    model = EquiSSLForPreTraining(config)
    pipeline = build_pipeline(
        base,
        image_size=32,
        patch_size=8,
        transformation=build_transformation("rotation"),
        needs=model.needs,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        **views,
    )
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        "seed": 0,
    }
    args = EquiSSLTrainingArguments(**{**defaults, **arguments})
    dataset = ImageViewDataset(load_images(str(photos)), pipeline, seed=args.seed)
    return EquiSSLTrainer(
        model=model,
        args=args,
        pipeline=pipeline,
        train_dataset=dataset,
        skipped_images=SkippedImages(max_bad_share),
        publisher=Publisher(output),
    )


def weights(trainer: EquiSSLTrainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.fixture(scope="module")
def unbroken(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EquiSSLTrainer:
    trainer = make_trainer(photo_folder, tmp_path_factory.mktemp("unbroken"))
    trainer.train()
    return trainer


def test_resume_is_bit_for_bit(photo_folder: Path, unbroken: EquiSSLTrainer) -> None:
    resumed = make_trainer(photo_folder, Path(unbroken.args.output_dir))
    resumed.train(resume_from_checkpoint=str(Path(unbroken.args.output_dir) / "checkpoint-3"))
    assert_same(weights(unbroken), weights(resumed))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (unbroken, resumed)]
    assert losses[0] == losses[1]


def test_resume_within_a_later_epoch(photo_folder: Path, tmp_path: Path) -> None:
    """32 images in batches of 8: step 5 is the first of epoch 1."""
    options = {"max_steps": 7, "save_steps": 5}
    whole = make_trainer(photo_folder, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(photo_folder, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(photo_folder: Path, unbroken: EquiSSLTrainer, tmp_path: Path, workers: int) -> None:
    trainer = make_trainer(photo_folder, tmp_path, dataloader_num_workers=workers, save_strategy="no")
    before = multiprocessing.active_children()
    trainer.train()
    assert_same(weights(unbroken), weights(trainer))
    for worker in set(multiprocessing.active_children()) - set(before):
        worker.join(60)  # told to end with the training, which takes a moment on a busy machine
    assert set(multiprocessing.active_children()) <= set(before)


def test_logs_name_the_parts_and_the_monitors(unbroken: EquiSSLTrainer) -> None:
    log = next(entry for entry in unbroken.state.log_history if "loss" in entry)
    parts = log["loss_ssl"] + log["loss_reconstruction"]
    assert log["loss"] == pytest.approx(parts, rel=1e-5)
    assert {"feature_std", "effective_rank", "images_skipped"} <= set(log)
    assert {"vicreg/loss_variance", "reconstruction/mse_1"} <= set(log)
    assert log["effective_rank"] > 1


def test_loss_falls_and_only_the_mask_token_stays(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, max_steps=24, save_strategy="no", learning_rate=2e-3)
    before = weights(trainer)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    parameters = {name for name, _ in trainer.model.named_parameters()}
    unchanged = {key for key in parameters if torch.equal(before[key], trainer.model.state_dict()[key])}
    assert unchanged == {"student.embeddings.mask_token"}


def test_accumulation_averages_micro_batches(photo_folder: Path, tmp_path: Path) -> None:
    """Gradient of 2 x 8 accumulated = mean of the two batches' gradients (BatchNorm sees each alone)."""
    gradients: dict[str, torch.Tensor] = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = make_trainer(
        photo_folder, tmp_path, max_steps=1, gradient_accumulation_steps=2, save_strategy="no", monitor_features=False
    )
    trainer.model.config.encoder.drop_path_rate = 0.0
    for layer in trainer.model.student.encoder.layer:
        layer.drop_path.rate = 0.0
    trainer.add_callback(Catch())
    batches = list(trainer.get_train_dataloader())[:2]
    reference: dict[str, torch.Tensor] = {}
    model = trainer.model.train()
    for batch in batches:
        model.zero_grad()
        model(trainer.pipeline(batch)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                reference[name] = reference.get(name, 0) + parameter.grad / 2
    model.zero_grad()
    trainer.train()
    for name, value in reference.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6)


class Poison(TrainerCallback):
    """Makes one weight not a number before a given step."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_step_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.get_parameter(self.name).view(-1)[0] = float("nan")


def test_a_loss_that_is_not_finite_stops_the_run(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, max_steps=8, save_steps=2)
    decoder = next(name for name, _ in trainer.model.named_parameters() if name.startswith("equivariance.0.decoder"))
    trainer.add_callback(Poison(5, decoder))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "step 5" in message
    assert "loss_reconstruction = nan" in message
    assert "loss_ssl" not in message
    assert "checkpoint-4" in message
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_weights_that_are_not_finite_are_not_saved(photo_folder: Path, tmp_path: Path) -> None:
    class PoisonAfter(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step + 1 == 4:
                with torch.no_grad():
                    model.get_parameter("student.layernorm.weight")[0] = float("inf")

    trainer = make_trainer(photo_folder, tmp_path, max_steps=8, save_steps=2)
    trainer.add_callback(PoisonAfter())
    with pytest.raises(NonFiniteLossError, match=r"student\.layernorm\.weight.*checkpoint-2"):
        trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("images", [20, 32])
def test_an_epoch_ends_with_a_whole_step(images: int, photo_folder: Path, tmp_path: Path) -> None:
    """20 images are two steps of 8, and 5 micro-batches of 4: the fifth is left out."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(photo_folder.iterdir())[:images]:
        (photos / path.name).symlink_to(path)
    runs = []
    for split in ((8, 1), (4, 2)):
        trainer = make_trainer(
            photos, tmp_path / str(split), per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
            max_steps=-1, num_train_epochs=2, save_strategy="no", monitor_features=False,
        )  # fmt: skip
        seen: list[list[int]] = []
        prepare = trainer._prepare_inputs

        def note(inputs: dict[str, Any], prepare: Any = prepare, seen: list[list[int]] = seen) -> dict[str, Any]:
            seen.append([int(index) for index in inputs["index"]])
            return prepare(inputs)

        trainer._prepare_inputs = note  # type: ignore[method-assign]
        trainer.train()
        runs.append((trainer.state.global_step, [index for batch in seen for index in batch]))
    assert runs[0] == runs[1]
    assert runs[0][0] == 2 * (images // 8)


def test_unlogged_losses_are_forgotten_once_they_were_checked(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, logging_strategy="no", save_strategy="no")
    trainer.train()
    assert not trainer.history._records


def test_run_json_that_cannot_be_written_does_not_end_a_run(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "run.json" / "in the way").mkdir(parents=True)
    trainer = make_trainer(photo_folder, tmp_path, max_steps=3)
    trainer.train()
    assert (tmp_path / "checkpoint-3").is_dir()
    assert "run.json cannot be written" in caplog.text


def test_an_interrupted_save_leaves_the_old_checkpoint(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, save_steps=2, save_total_limit=1)
    original = trainer._save_rng_state

    def disk_full(output_dir: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        original(output_dir)

    trainer._save_rng_state = disk_full  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"step 4 .*No space left.*checkpoint-2"):
        trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    make_trainer(photo_folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoints_rotate_and_hold_no_pickled_arguments(photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path, save_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / ".saving").exists()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "training_args.bin" not in names
    assert json.loads((tmp_path / "checkpoint-6" / "training_args.json").read_text())["max_steps"] == 6


def test_bad_images_stop_the_run_above_the_share(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, path in enumerate(sorted(photo_folder.iterdir())):
        content = path.read_bytes()
        (folder / path.name).write_bytes(content if index % 2 else content[:60])
    with pytest.raises(TooManyBadImages, match=r"0\.png"):
        make_trainer(folder, tmp_path / "out", max_bad_share=0.1, max_steps=40, save_strategy="no").train()
    trainer = make_trainer(folder, tmp_path / "out2", max_bad_share=0.9, max_steps=8, save_strategy="no")
    trainer.train()
    assert trainer.state.log_history[-2]["images_skipped"] > 0


def test_nothing_scheduled_nothing_logged(unbroken: EquiSSLTrainer) -> None:
    log = next(entry for entry in unbroken.state.log_history if "loss" in entry)
    assert not {"teacher_momentum", "weight_decay"} & set(log)


def test_weight_decay_spares_one_dimensional_parameters(unbroken: EquiSSLTrainer) -> None:
    decayed, spared = unbroken.optimizer.param_groups
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim <= 1 for parameter in spared["params"])


@pytest.mark.parametrize(
    ("rule", "expected"), [("linear", 1e-3 * 32 / 256), ("sqrt", 1e-3 * (32 / 256) ** 0.5), ("none", 1e-3)]
)
def test_learning_rate_follows_the_global_batch(tmp_path: Path, rule: str, expected: float) -> None:
    args = EquiSSLTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        base_learning_rate=1e-3,
        learning_rate_scaling=rule,
    )
    assert args.global_batch_size == 32
    assert args.learning_rate == pytest.approx(expected)


def test_unknown_scaling_rule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="linear, sqrt, got 'cubic'"):
        EquiSSLTrainingArguments(output_dir=str(tmp_path), learning_rate_scaling="cubic")
