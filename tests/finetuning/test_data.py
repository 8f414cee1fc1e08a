"""What is wrong with data, encoders or settings is said before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ConvNextConfig, ConvNextModel

from hf_equissl.data import TooManyBadImages
from hf_equissl.finetuning import FineTuningSettings, prepare, train
from hf_equissl.finetuning.run import build_trainer
from hf_equissl.finetuning.tasks.labelled_images import load_labelled_images
from tests.data.image_files import encode, picture

from .conftest import save


def loaded(data: Path | str, **changes: Any) -> Any:
    return load_labelled_images(FineTuningSettings(encoder="none", data=str(data), output_dir="none", **changes))


def table(folder: Path, split: str, labels: list[int | None]) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
        folder / f"{split}.parquet"
    )


def test_splits_and_subsets(flags: str, tmp_path: Path) -> None:
    images = loaded(flags)
    assert (len(images.train), len(images.test), images.test_split) == (24, 12, "test")
    assert images.classes == ("blue", "green", "red")
    small = loaded(flags, train_images=10, test_images=5)
    assert (len(small.train), len(small.test)) == (10, 5)
    assert small.train.source.dataset[:]["image"] == loaded(flags, train_images=10).train.source.dataset[:]["image"]

    held = loaded(Path(flags) / "train")
    assert (len(held.train), len(held.test)) == (22, 2)
    assert held.test_split == "train (held-out)"
    assert not set(held.train.source.dataset["image"]) & set(held.test.source.dataset["image"])
    with pytest.raises(ValueError, match="0 would be left to fit on"):
        loaded(Path(flags) / "train", test_images=24)


def test_integer_labels_count_from_zero(tmp_path: Path) -> None:
    table(tmp_path, "train", [0, 1, 2, 1])
    table(tmp_path, "test", [2, 0])
    assert loaded(tmp_path).classes == ("0", "1", "2")


def test_classes_may_be_texts(tmp_path: Path) -> None:
    """As in a table of file names and names of classes, of which the test split has one."""
    for split, names in (("train", ["dog", "cat", "dog", "cat"]), ("test", ["dog"])):
        images = [encode(picture(number)) for number in range(len(names))]
        datasets.Dataset.from_dict({"image": images, "label": names}).to_parquet(tmp_path / f"{split}.parquet")
    found = loaded(tmp_path)
    assert found.classes == ("cat", "dog")
    assert [found.train.read(index)["label"] for index in range(4)] == [1, 0, 1, 0]
    assert found.test.read(0)["label"] == 1


@pytest.mark.parametrize(
    ("train_labels", "test_labels", "message"),
    [
        ([0, 1], [0, 2], "there is a label 2"),
        ([0, -1], [0, 1], "1 of 2 images in .* are unlabelled"),
        ([0, 1], [None, 1], "1 of 2 images in .*test.* are unlabelled"),
        ([0, 0], [0, 0], "has 1 class; a classifier needs two"),
    ],
)
def test_labels_that_mean_nothing(tmp_path: Path, train_labels: Any, test_labels: Any, message: str) -> None:
    table(tmp_path, "train", train_labels)
    table(tmp_path, "test", test_labels)
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path)


def test_classes_that_differ_between_splits(flags: str, tmp_path: Path) -> None:
    data = shutil.copytree(flags, tmp_path / "data")
    (data / "test" / "red").rename(data / "test" / "rouge")
    with pytest.raises(ValueError, match=r"1 class that .*train.* does not have: 'rouge' \(4 images\)"):
        loaded(data)
    shutil.rmtree(data / "test" / "rouge")
    shutil.rmtree(data / "test" / "blue")
    images = loaded(data)
    assert images.classes == ("blue", "green", "red")
    assert {images.test.read(index)["label"] for index in range(len(images.test))} == {1}
    orders = {"train": ["a", "b"], "test": ["b", "a"]}
    splits = {}
    for split, names in orders.items():
        features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [str(data / "train" / "red" / "0.png")] * 2, "label": [0, 1]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    saved = loaded(tmp_path / "saved")
    assert saved.classes == ("a", "b")
    assert [[part.read(index)["label"] for index in range(2)] for part in (saved.train, saved.test)] == [[0, 1], [1, 0]]


def test_a_flat_folder_has_no_labels(photo_folder: Path) -> None:
    with pytest.raises(ValueError, match="has no labels, which fine-tuning needs"):
        loaded(photo_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lara"}, "--method lara: there is no such method. Did you mean 'lora'"),
        ({"pooling": "cls_patch"}, "--pooling cls_patch: .* Did you mean 'cls_patches'"),
        ({"keep": "first"}, "--keep first"),
        ({"epochs": 0}, "--epochs: expected more than 0"),
        ({"batch_size": 0}, "--batch_size: expected 1 or more"),
        ({"lora_rank": 0}, "--lora_rank: expected 1 or more"),
        ({"label_smoothing": 1.0}, "--label_smoothing: expected a share"),
        ({"layer_decay": 1.5}, "--layer_decay"),
        ({"crop_scale": (0.5, 0.2)}, "--crop_scale: expected two shares"),
        ({"keep": "best", "save_steps": 4, "eval_steps": 2}, "--eval_steps 2 is not a multiple of --save_steps 4"),
        ({"keep": "best", "save_steps": 4}, "give --eval_steps and --save_steps or none"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuningSettings(encoder="e", data="d", output_dir="o", **changes)


def test_encoders_and_batches_that_do_not_fit(settings: Any, tmp_path: Path) -> None:
    for changes, message in (
        ({"encoder": str(tmp_path)}, "encoder"),
        ({"encoder": "vit", "pooling": "patches"}, "has a fixed head"),
        ({"encoder": "vit", "drop_path": 0.1}, "--drop_path 0.1: .* is a vit model, which has no stochastic depth"),
        ({"image_size": 36}, "not a multiple of the 8-pixel patches"),
        ({"encoder": "vit", "image_size": 48}, "doesn't match model"),
        ({"batch_size": 25}, "= 25 is more than the 24 training images"),
        ({"batch_size": 8, "accumulation": 4}, "= 32 is more than the 24 training images"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(settings(**changes))
    assert not list(Path(settings().output_dir).glob("*"))


def test_layer_decay_needs_blocks_in_a_row(settings: Any, tmp_path: Path) -> None:
    """Stages that each count from 0 would give the deepest blocks more than the whole learning rate."""
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 3], image_size=32)
    encoder = save(ConvNextModel(config), tmp_path / "convnext")
    with pytest.raises(ValueError, match=r"--layer_decay 0.75: the blocks of ConvNext.* --layer_decay 1"):
        prepare(settings(encoder, method="full"))
    run = prepare(settings(encoder, method="full", layer_decay=1.0))
    assert {group["lr"] for group in build_trainer(run).create_optimizer().param_groups} == {3e-3}


def test_images_that_do_not_decode(settings: Any, flags: str, tmp_path: Path, caplog: Any) -> None:
    data = shutil.copytree(flags, tmp_path / "data")
    (data / "test" / "red" / "0.png").write_bytes(b"no image")
    changed = {**settings(method="linear", epochs=1).to_dict(), "data": str(data), "crop_scale": None}
    with pytest.raises(TooManyBadImages, match="1 of 12 test images did not decode"):
        train(prepare(FineTuningSettings(**changed)))
    trainer = build_trainer(prepare(FineTuningSettings(**{**changed, "max_bad_share": 0.2})))
    caplog.clear()
    metrics = trainer.evaluate()
    assert "0.png" in caplog.text
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    predicted = trainer.model.eval()(batch["pixel_values"]).logits.argmax(1).tolist()
    files = sorted((data / "test").rglob("*.png"))
    truth = [("blue", "green", "red").index(file.parent.name) for file in files]
    kept = [number for number, file in enumerate(files) if file.read_bytes() != b"no image"]
    assert metrics["eval_top1"] == pytest.approx(np.mean([predicted[n] == truth[n] for n in kept]))


def test_values_are_read_as_asked_and_what_is_left_out_is_said(flags: str, tmp_path: Path) -> None:
    data = Path(shutil.copytree(flags, tmp_path / "data"))
    for path in data.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path)
    (data / "train" / "red" / "a.dng").write_bytes(b"raw")
    dark, bright = loaded(data), loaded(data, value_range=[0, 4095], max_pixels=10_000)
    assert [line.partition(":")[0] for line in dark.remarks] == ["note", "warning", "warning"]  # one for each split
    assert bright.remarks == ("note: 1 file of other types (.dng) are left out",)
    first, second = (np.asarray(part.train.read(0)["image"]).astype(float) for part in (dark, bright))
    assert abs(second - 16 * first).max() < 17
    with pytest.raises(ValueError, match="max_pixels = 9"):
        loaded(data, max_pixels=9)
