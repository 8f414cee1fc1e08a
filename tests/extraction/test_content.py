"""What stands in the shards is what the encoder gives, for each picture, under its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_equissl.data import load_images
from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import image_set

from .conftest import BROKEN, CLASSES, GOOD

STEM = ("invariant", "equivariant", "invariant_cls", "equivariant_patches")


def loaded(folder: Path, tmp_path: Path, split: str = "train") -> datasets.Dataset:
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache")).with_format("numpy")


def direct(encoder: Path, pictures: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Features straight from ``AutoModel`` and ``AutoImageProcessor``."""
    model, processor = AutoModel.from_pretrained(encoder).eval(), AutoImageProcessor.from_pretrained(encoder)
    images = [Image.open(pictures / name).convert("RGB") for name in names]
    with torch.no_grad():
        output = model(**processor(images, return_tensors="pt"))
    tokens = output.last_hidden_state
    made = {"cls": tokens[:, 0], "patches": tokens[:, 1:].mean(1), "patch_tokens": tokens[:, 1:]}
    made["backbone"] = torch.cat([made["cls"], made["patches"]], 1)
    for part in ("invariant", "equivariant"):
        if (rows := getattr(output, f"{part}_features", None)) is not None:
            made[f"{part}_cls"], made[f"{part}_patches"] = rows[:, 0], rows[:, 1:].mean(1)
            made[part] = torch.cat([rows[:, 0], rows[:, 1:].mean(1)], 1)
    return {name: value.float().numpy() for name, value in made.items()}


@pytest.mark.parametrize("encoder", ["ours", "vit"])
def test_features_are_those_of_the_model_and_its_processor(
    encoder: str, encoders: Path, pictures: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    names = ("cls", "patches", "backbone", "patch_tokens", *(STEM if encoder == "ours" else ()))
    folder = extract(tmp_path / "out", "--features", *names, encoder=encoder)
    rows = loaded(folder, tmp_path)
    assert len(rows) == GOOD
    wanted = direct(encoders / encoder, pictures, list(rows["name"]))
    assert set(rows.column_names) == {"index", "name", "label", *names}
    for name in names:
        assert rows[:][name].dtype == np.float32
        np.testing.assert_allclose(rows[:][name], wanted[name], rtol=0, atol=1e-5)
        assert np.std(rows[:][name]) > 1e-3
    assert rows.features["cls"] == datasets.List(datasets.Value("float32"), length=16)
    assert rows.features["patch_tokens"] == datasets.Array2D((16, 16), "float32")
    assert rows.features["label"].names == list(CLASSES)
    assert [CLASSES[label] for label in rows["label"]] == [name.split("/")[0] for name in rows["name"]]


def test_bf16_is_the_plain_model_under_autocast(
    encoders: Path, pictures: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    rows = loaded(extract(tmp_path / "out", "--precision", "bf16", encoder="vit"), tmp_path)
    exact = direct(encoders / "vit", pictures, list(rows["name"]))
    with torch.autocast("cpu", torch.bfloat16):
        rough = direct(encoders / "vit", pictures, list(rows["name"]))
    for name in ("cls", "patches"):
        stored = rows[:][name]
        assert stored.dtype == np.float32
        error, rounding = np.abs(stored - rough[name]).max(), np.abs(rough[name] - exact[name]).max()
        assert rounding > 1e-4
        assert error <= rounding  # matrix products of other batches may round the other way
        assert np.abs(stored - exact[name]).max() > 1e-4


def test_rows_keep_their_order_and_the_record_names_what_is_left_out(
    whole: Path, pictures: Path, tmp_path: Path
) -> None:
    rows = loaded(whole, tmp_path)
    listed = sorted(str(path.relative_to(pictures)) for path in pictures.glob("*/*.png"))
    broken = listed.index(BROKEN)
    assert rows["index"][:].tolist() == [index for index in range(GOOD + 1) if index != broken]
    assert list(rows["name"]) == [name for name in listed if name != BROKEN]
    record = json.loads((whole / "extraction.json").read_text())
    split = record["splits"]["train"]
    assert [(item["index"], item["name"]) for item in split["skipped"]] == [(broken, BROKEN)]
    assert split["rows"] == GOOD
    assert split["complete"]
    assert split["selection"]["shards"] == 4
    assert split["runs"][0]["images_per_second"] > 0
    card = DatasetCard.load(whole / "README.md")
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert BROKEN.split("/")[1] in card.text
    assert str(pictures) not in str(card)


def test_features_are_those_of_the_probes(whole: Path, encoders: Path, pictures: Path, tmp_path: Path) -> None:
    images = image_set(load_images(pictures), "pictures", "train", max_bad_share=0.05, progress=False)
    index, wanted = images.features(FrozenEncoder(encoders / "ours"), ("cls", "patches"))
    rows = loaded(whole, tmp_path)
    assert rows["index"][:].tolist() == index.tolist()
    for name, value in wanted.items():
        np.testing.assert_allclose(rows[:][name], value.numpy(), rtol=0, atol=1e-5)


def test_safetensors_and_half_precision_hold_the_same(
    whole: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    folder = extract(tmp_path / "out", "--format", "safetensors", "--dtype", "float16")
    rows = loaded(whole, tmp_path)
    index = json.loads((folder / "data" / "train.safetensors.index.json").read_text())
    shards = [load_file(folder / "data" / shard["file"]) for shard in index["shards"]]
    assert [(shard["start"], shard["stop"], shard["rows"]) for shard in index["shards"]] == [
        (start, min(start + 12, 41), len(shard["index"])) for start, shard in zip(range(0, 41, 12), shards, strict=True)
    ]
    assert index["classes"] == list(CLASSES)
    for name in ("index", "label", "cls", "patches"):
        values = np.concatenate([shard[name] for shard in shards])
        wanted = rows[:][name]
        np.testing.assert_array_equal(values, wanted.astype(np.float16) if values.dtype == np.float16 else wanted)
        assert values.dtype == (np.float16 if name in ("cls", "patches") else np.int64)
    assert not hasattr(DatasetCard.load(folder / "README.md").data, "configs")


def test_streams_give_every_image_once(
    tars: Path, pictures: Path, encoders: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    """Two workers, each with shards of its own that are written side by side."""
    streamed = ("--streaming", "--num_workers", "2", "--batch_size", "3")
    folder = extract(tmp_path / "out", *streamed, data=tars)
    rows = loaded(folder, tmp_path)
    files = sorted((folder / "data").iterdir())
    assert [file.name for file in files] == [f"train-{shard:05d}-of-00005.parquet" for shard in range(5)]
    assert rows["index"][:].tolist() == [*range(8)] * 5
    names = [Path(name).name for name in rows["name"]]
    paths = sorted(path.relative_to(pictures) for path in pictures.glob("*/[0-9]*.png"))
    assert names == [path.name for path in paths]
    wanted = direct(encoders / "ours", pictures, list(map(str, paths)))
    np.testing.assert_allclose(rows[:]["cls"], wanted["cls"], rtol=0, atol=1e-5)

    files[3].unlink()
    kept = {file.name: file.read_bytes() for file in files if file.exists()}
    extract(folder, *streamed, data=tars)
    assert loaded(folder, tmp_path / "again")[:]["cls"].tolist() == rows[:]["cls"].tolist()
    assert {name: (folder / "data" / name).read_bytes() for name in kept} == kept

    limited = extract(tmp_path / "limited", "--streaming", "--limit", "11", data=tars)
    assert loaded(limited, tmp_path / "limit")["index"][:].tolist() == [*range(11)]


def test_splits_share_a_folder(copy: Path, tmp_path: Path, extract: Callable[..., Path]) -> None:
    before = {file.name: file.read_bytes() for file in (copy / "data").iterdir()}
    extract(copy, "--split", "train[:10]")
    assert len(loaded(copy, tmp_path, "train_10")) == 10
    assert {file.name: file.read_bytes() for file in (copy / "data").iterdir() if file.name in before} == before
    data_files: list[dict[str, Any]] = DatasetCard.load(copy / "README.md").data.configs[0]["data_files"]
    assert [item["split"] for item in data_files] == ["train", "train_10"]


def test_a_size_of_ones_own_is_that_of_the_probes(
    encoders: Path, pictures: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    """The ViT's processor squashes pictures; with --image_size they are resized and cropped as for the probes."""
    folder = extract(tmp_path / "out", "--image_size", "24", encoder="vit")
    images = image_set(load_images(pictures), "pictures", "train", max_bad_share=0.05, progress=False)
    _, wanted = images.features(FrozenEncoder(encoders / "vit", image_size=24), ("cls",))
    np.testing.assert_allclose(loaded(folder, tmp_path)[:]["cls"], wanted["cls"].numpy(), rtol=0, atol=1e-5)
