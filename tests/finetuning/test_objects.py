"""Detection and instance segmentation: boxes and masks move with images, formats are read or refused, heads learn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForObjectDetection, AutoModelForUniversalSegmentation, pipeline

from hf_equissl.data import ImageDecodeError
from hf_equissl.finetuning import FineTuningSettings, load_finetuned, prepare, train
from hf_equissl.finetuning.run import build_trainer
from hf_equissl.finetuning.tasks import make_task
from hf_equissl.finetuning.tasks.base import EncoderInput
from hf_equissl.finetuning.tasks.instance_masks import pack_codes, read_code, unpack_codes

from .conftest import equissl, save

pycocotools = pytest.importorskip("pycocotools")
pytest.importorskip("scipy")

DETECTION = {"hidden_size": 32, "queries": 20, "decoder_layers": 2}
MASKS = {"hidden_size": 32, "queries": 8, "decoder_layers": 2, "points": 128}
COLOURS = {"red": (230, 40, 40), "blue": (40, 40, 230)}


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of 48 x 40 pixels with none, one or two coloured blocks, as COCO has them; ids begin anywhere."""
    root = tmp_path_factory.mktemp("blocks")
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for index in range(count):
            picture = rng.integers(90, 120, (40, 48, 3)).astype(np.uint8)
            name = f"{split}{index}.png"
            images.append({"id": 70 + index, "file_name": name, "width": 48, "height": 40})
            for number in range((index + 1) % 3):
                x, y = int(rng.integers(0, 8)) + 24 * number, int(rng.integers(0, 16))
                w, h = int(rng.integers(8, 16)), int(rng.integers(10, 22))
                colour = int(rng.integers(2))
                picture[y : y + h, x : x + w] = list(COLOURS.values())[colour]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 70 + index,
                        "category_id": (9, 4)[colour],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "segmentation": polygon(x, y, w, h),
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(picture).save(root / f"{split}2017" / name)
        categories = [{"id": 9, "name": "red"}, {"id": 4, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps({**content, "categories": []}))
    return root


def change(root: Path, edit: Callable[[dict[str, Any]], Any], split: str = "train") -> None:
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where relative output folders lie: a run that is prepared takes its own, which is no part of a checkout."""
    monkeypatch.chdir(tmp_path)


def settings(data: Path, task: str = "detection", **changes: Any) -> FineTuningSettings:
    return FineTuningSettings(**{"encoder": "e", "data": str(data), "output_dir": "o", "task": task, **changes})


def bound(task: str = "instance_segmentation", size: int = 64, **changes: Any) -> Any:
    made = make_task(task, {})
    made.patch_size = 4
    made.bind(settings(Path("d"), **changes), EncoderInput(size, (0.5,) * 3, (0.25,) * 3))
    return made


def test_boxes_and_masks_move_with_the_image() -> None:
    """Where the image is bright there is the mask, and around both the box; to a fraction of a pixel of the square."""
    picture = np.zeros((60, 90, 3), np.uint8)
    picture[15:40, 30:70] = 255
    objects = [
        {"label": 3, "bbox": [30.0, 15.0, 40.0, 25.0], "area": 1000.0, "segmentation": polygon(30, 15, 40, 25)},
        {"label": 1, "bbox": [0.0, 0.0, 90.0, 60.0], "area": 1.0, "segmentation": polygon(0, 0, 90, 60), "crowd": True},
    ]
    sample = {"image": Image.fromarray(picture), "objects": objects}
    mirrored = cut = 0
    for seed in range(30):
        made = bound(crop_scale=(0.4, 0.9)).transform(sample, np.random.default_rng(seed))
        bright = made["pixels"][0].float() / 255
        assert made["labels"].tolist() == [3]
        cx, cy, w, h = (64 * made["boxes"][0]).tolist()
        # The sum of a blurred edge is where the edge is.
        width, height = bright.amax(0).sum().item(), bright.amax(1).sum().item()
        assert (w, h) == pytest.approx((width, height), abs=0.6), seed
        middle = (bright.sum(0) * (torch.arange(64) + 0.5)).sum() / bright.sum()
        assert cx == pytest.approx(middle.item(), abs=0.3), seed
        assert (made["masks"][0] - bright).abs().mean() < 0.02
        again = bound(crop_scale=(0.4, 0.9), flip=False).transform(sample, np.random.default_rng(seed))
        mirrored += abs(again["boxes"][0, 0].item() + made["boxes"][0, 0].item() - 1) < 1e-6
        cut += min(cx - w / 2, cy - h / 2, 64 - cx - w / 2, 64 - cy - h / 2) < 1e-6
    assert 5 < mirrored < 25
    assert 0 < cut < 30
    judged = bound().transform(sample, None)
    assert judged["truth"].tolist() == [[3, 30, 15, 40, 25, 0, 1000], [1, 0, 0, 90, 60, 1, 1]]
    assert judged["boxes"].tolist() == [pytest.approx([50 / 90, 27.5 / 60, 40 / 90, 25 / 60])]
    assert judged["size"].tolist() == [90, 60]
    empty = bound().transform({"image": sample["image"], "objects": []}, np.random.default_rng(0))
    assert (tuple(empty["boxes"].shape), tuple(empty["masks"].shape)) == ((0, 4), (0, 64, 64))


def test_what_was_to_be_found_is_found_in_both_tasks(blocks: Path) -> None:
    """The right boxes and masks, said by a model that knows, are judged 1; those of other images 0."""
    for name in ("detection", "instance_segmentation"):
        task = bound(name)
        splits = task.load(settings(blocks, name))
        assert splits.classes == ("blue", "red")  # in the order of their ids
        batch = task.collate([task.transform(splits.test.read(index), None) for index in range(4)])
        queries = 3
        logits = torch.full((4, queries, 2 + (name != "detection")), -20.0)
        boxes = torch.full((4, queries, 4), 0.01)
        masks = torch.full((4, queries, 64, 64), -20.0)
        for image, (labels, known) in enumerate(zip(batch["labels"], batch["boxes"], strict=True)):
            for query, (label, box) in enumerate(zip(labels, known, strict=True)):
                logits[image, query, label], boxes[image, query] = 20, box
                if name != "detection":
                    masks[image, query][batch["masks"][image][query] > 0] = 20
        if name != "detection":
            logits[logits.amax(2) < 0, :] = torch.tensor([-20.0, -20, 20])
        output = (logits, boxes if name == "detection" else masks)
        found = task.measure(*(_arrays(part) for part in task.judge(output, batch)))
        assert all(found[metric.name] > (0.99 if name == "detection" else 0.6) for metric in task.metrics)
        turned = tuple(part.roll(1, 0) for part in output)
        found = task.measure(*(_arrays(part) for part in task.judge(turned, batch)))
        assert all(found[metric.name] < 0.2 for metric in task.metrics)


def _arrays(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


def test_codes_of_masks_travel_as_tensors() -> None:
    rng = np.random.default_rng(0)
    codes = [[rng.bytes(length) for length in lengths] for lengths in ((3, 200), (), (7,))]
    packed = _arrays(pack_codes(codes))
    assert packed["codes"].shape == (3, 203)
    padded = np.pad(packed["codes"], ((0, 0), (0, 5)), constant_values=-100)
    assert [unpack_codes(*pair) for pair in zip(padded, packed["lengths"], strict=True)] == codes
    square = read_code(polygon(1, 1, 3, 2), (6, 5))
    plain = read_code({"size": [5, 6], "counts": [6, 2, 3, 2, 3, 2, 12]}, (6, 5))
    assert square == plain
    for wrong, message in (
        ([[1, 2, 3, 4]], "no polygon of three corners"),
        ({"size": [6, 5], "counts": [30]}, "A mask is of 5 x 6 pixels, and its image of 6 x 5"),
        (7, "neither polygons nor a run-length code"),
    ):
        with pytest.raises(ImageDecodeError, match=message):
            read_code(wrong, (6, 5))


@pytest.mark.parametrize(
    ("task", "options", "auto"),
    [
        ("detection", DETECTION, AutoModelForObjectDetection),
        ("instance_segmentation", MASKS, AutoModelForUniversalSegmentation),
    ],
)
def test_it_trains_goes_on_and_leaves_a_model_of_transformers(
    blocks: Path, tmp_path: Path, task: str, options: dict[str, Any], auto: Any
) -> None:
    encoder = save(equissl(num_hidden_layers=4, patch_size=4), tmp_path / "encoder")
    chosen = FineTuningSettings(
        encoder=encoder,
        data=str(blocks),
        output_dir=str(tmp_path / "run"),
        task=task,
        task_options=options,
        method="full",
        batch_size=4,
        epochs=2 if task == "detection" else 1,
        save_steps=2,
        learning_rate=1e-3,
    )
    run = prepare(chosen)
    primary, *others = train(run)
    assert (primary.task, primary.primary, len(others)) == (task, True, len(run.task.metrics) - 1)
    assert 0 <= primary.value <= 1
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = run.network.eval()(pixels)
    for model in (auto.from_pretrained(run.folder).eval(), load_finetuned(run.folder)):
        found = model(pixels)
        for name in ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits"):
            if name in expected:
                torch.testing.assert_close(found[name], expected[name])
    kind = "object-detection" if task == "detection" else "image-segmentation"
    more = {"threshold": 0.0} if task == "detection" else {"threshold": 0.0, "subtask": "instance"}
    seen = pipeline(kind, model=str(run.folder))(Image.open(blocks / "val2017" / "val0.png"), **more)
    assert seen
    assert {one["label"] for one in seen} <= {"blue", "red"}

    if task != "detection":
        return
    # Broken off in the second epoch, and gone on.
    weights = {name: value.clone() for name, value in run.network.state_dict().items()}
    for left in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / left)
    again = replace(chosen, output_dir=str(tmp_path / "again"))
    trainer = build_trainer(prepare(again))
    real = trainer.compute_loss

    def stop(*args: Any, **kwargs: Any) -> Any:
        if args[0].training and trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    trainer.compute_loss = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = prepare(again)
    assert Path(resumed.checkpoint).name == "checkpoint-2"
    build_trainer(resumed).train(resume_from_checkpoint=resumed.checkpoint)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.network.state_dict().items())


def test_columns_of_objects_are_read_alike(blocks: Path, tmp_path: Path) -> None:
    content = json.loads((blocks / "annotations" / "instances_train2017.json").read_text())
    rows: dict[str, list[Any]] = {"image": [], "objects": []}
    for image in content["images"]:
        mine = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        rows["image"].append(str(blocks / "train2017" / image["file_name"]))
        rows["objects"].append(
            {"bbox": [one["bbox"] for one in mine], "category": [{9: 1, 4: 0}[one["category_id"]] for one in mine]}
        )
    label = datasets.ClassLabel(names=["blue", "red"])
    inner = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}
    features = datasets.Features({"image": datasets.Image(), "objects": inner})
    (tmp_path / "hub").mkdir()
    table = datasets.Dataset.from_dict(rows, features=features)
    table.map(lambda row: row).to_parquet(tmp_path / "hub" / "train.parquet")
    # A folder with metadata.jsonl, corners instead of sides, and names instead of numbers.
    (tmp_path / "folder" / "train").mkdir(parents=True)
    lines = []
    for image, objects in zip(content["images"], rows["objects"], strict=True):
        shutil.copy(blocks / "train2017" / image["file_name"], tmp_path / "folder" / "train")
        corners = [[x, y, x + w, y + h] for x, y, w, h in objects["bbox"]]
        names = [("blue", "red")[number] for number in objects["category"]]
        lines.append({"file_name": image["file_name"], "objects": {"bbox": corners, "category": names}})
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "folder" / "train" / "metadata.jsonl").write_text(text)

    expected = make_task("detection", {}).load(settings(blocks)).train
    for folder, options in (("hub", {}), ("folder", {"classes": ["blue", "red"], "box_format": "xyxy"})):
        splits = make_task("detection", options).load(settings(tmp_path / folder, test_split="train"))
        assert splits.classes == ("blue", "red")
        for index in range(8):
            for one, other in zip(expected.read(index)["objects"], splits.train.read(index)["objects"], strict=True):
                assert (one["label"], one["bbox"]) == (other["label"], pytest.approx(other["bbox"]))
    with pytest.raises(ValueError, match="does not say what its categories are called"):
        make_task("detection", {}).load(settings(tmp_path / "folder", test_split="train"))
    with pytest.raises(ValueError, match="an object is of the category red; there are blue, green"):
        make_task("detection", {"classes": ["blue", "green"]}).load(settings(tmp_path / "folder", test_split="train"))
    with pytest.raises(ValueError, match="has objects without a mask"):
        make_task("instance_segmentation", {}).load(settings(tmp_path / "hub", test_split="train"))


def test_layouts_and_odd_annotations(blocks: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(blocks, tmp_path / "data"))

    def edit(content: dict[str, Any]) -> None:
        first, second, third = content["annotations"][:3]
        first["iscrowd"] = 1
        second["bbox"] = [-5, 3, 20, 60]
        third["bbox"] = [100, 3, 20, 60]

    change(data, edit)
    splits = make_task("detection", {}).load(settings(data))
    train = [one for index in range(8) for one in splits.train.read(index)["objects"]]
    assert splits.train.read(2)["objects"] == []
    assert [bool(one.get("crowd")) for one in train].count(True) == 1
    assert [0.0, 3.0, 15.0, 37.0] in [one["bbox"] for one in train]
    assert splits.remarks == (
        "note: instances_train2017.json: 1 boxes reach beyond their images and are cut, e.g. in train1.png",
        "note: instances_train2017.json: 1 boxes are empty or outside of their images and are left out, e.g. in "
        "train1.png",
    )
    # As exported by tools: each split's file beside its images.
    for split in ("train", "valid"):
        shutil.copytree(blocks / f"{split[:5].replace('valid', 'val')}2017", tmp_path / "tool" / split)
        source = blocks / "annotations" / f"instances_{split.replace('valid', 'val')}2017.json"
        shutil.copy(source, tmp_path / "tool" / split / "_annotations.coco.json")
    splits = make_task("detection", {}).load(settings(tmp_path / "tool"))
    assert (len(splits.train), len(splits.test), splits.test_split) == (8, 4, "validation")
    Image.new("RGB", (20, 20)).save(data / "train2017" / "train1.png")
    with pytest.raises(ImageDecodeError, match="has 20 x 20 pixels, and its annotations are for 48 x 40"):
        make_task("detection", {}).load(settings(data)).train.read(1)


def _unknown(content: dict[str, Any]) -> None:
    content["annotations"][1]["category_id"] = 77


@pytest.mark.parametrize(
    ("edit", "split", "message"),
    [
        (_unknown, "train", r"annotation 2 of train1.png is of the category 77, which the file does not name"),
        (lambda c: c["annotations"][0].update(image_id=5), "train", "annotation 1 is of the image 5, which"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "val", r"val0.png: annotation 1 has the box \[1, 2\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", 4]), "train", "expected x, y, width, height"),
        (lambda c: c["categories"][0].update(name="rot"), "val", "the category 'rot', which the training split does"),
        (lambda c: c["images"][3].update(file_name="x.png"), "train", "1 of 8 images are not in .*, e.g. x.png"),
        (lambda c: c["images"][0].update(file_name="x.png"), "train", "its first image, x.png, is in none of"),
        (lambda c: c.pop("categories"), "train", "has no list of categories"),
        (lambda c: c.update(annotations=[]), "val", r"\(validation\) has no objects in any of its 4 images"),
    ],
)
def test_annotations_that_cannot_be_are_refused(
    blocks: Path, tmp_path: Path, edit: Any, split: str, message: str
) -> None:
    data = Path(shutil.copytree(blocks, tmp_path / "data"))
    change(data, edit, split)
    with pytest.raises(ValueError, match=message):
        make_task("detection", {}).load(settings(data))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 2, 3, "x", 5, 6]], "neither polygons nor a run-length code"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"A polygon of a mask is \[1, 2, 3, 4, 5, 6, 7\]; expected x, y, x, y"),
        ([[1, 2, 3, 4, 5, float("nan")]], "A polygon of a mask is"),
        ([[1, 2, 3, 4]], "no polygon of three corners"),
        ("PPYo0", "neither polygons nor a run-length code"),
        ([1, 2, 3, 4, 5, 6], "neither polygons nor a run-length code"),
        ({"counts": [0, 4]}, "neither polygons nor a run-length code"),
        ({"size": [20, 24], "counts": [240, 240]}, "A mask is of 24 x 20 pixels, and its image of 48 x 40"),
        ({"size": [40, 48], "counts": [5, 6]}, "The runs of a mask count 11 pixels, and it has 48 x 40"),
        ({"size": [40, 48], "counts": "not a code"}, "neither polygons nor a run-length code"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_that_cannot_be_are_refused_before_training(
    blocks: Path, tmp_path: Path, mask: Any, message: str, split: str
) -> None:
    data = Path(shutil.copytree(blocks, tmp_path / "data"))
    change(data, lambda content: content["annotations"][-1].update(segmentation=mask), split)
    with pytest.raises(ValueError, match=rf"{split}\d.png: .*{message}.* It is that of the object at x"):
        make_task("instance_segmentation", {}).load(settings(data, "instance_segmentation"))
    make_task("detection", {}).load(settings(data))  # which does not read masks


def test_codes_of_every_form_are_accepted(blocks: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(blocks, tmp_path / "data"))
    compressed = read_code(polygon(3, 4, 10, 8), (48, 40))
    text = {"size": [40, 48], "counts": compressed["counts"].decode()}
    for mask in (text, {"size": [40, 48], "counts": [100, 20, 1800]}, [[1, 2, 3, 4], *polygon(3, 4, 10, 8)]):
        change(data, lambda content, mask=mask: content["annotations"][-1].update(segmentation=mask))
        made = make_task("instance_segmentation", {})
        made.load(settings(data, "instance_segmentation"))
        assert read_code(mask, (48, 40))["size"] == [40, 48]


def test_sizes_that_annotations_lack_are_read_from_the_files(blocks: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(blocks, tmp_path / "data"))

    def edit(content: dict[str, Any]) -> None:
        for image in content["images"]:
            del image["width"], image["height"]
        content["annotations"][0]["bbox"] = [-5, 3, 20, 60]

    change(data, edit)
    # One lies on its side, and says so.
    sideways = Image.open(data / "train2017" / "train1.png").transpose(Image.Transpose.ROTATE_90)
    sideways.save(data / "train2017" / "train1.png", exif=_turned())
    samples = make_task("detection", {}).load(settings(data)).train
    assert [list(size) for size in samples.source.dataset["size"][:]] == 8 * [[48, 40]]
    assert samples.read(0)["objects"][0]["bbox"] == [0, 3, 15, 37]
    assert samples.read(1)["image"].size == (48, 40)
    (data / "train2017" / "train2.png").write_bytes(b"no image")
    assert make_task("detection", {}).load(settings(data)).train.source.dataset["size"][2] == [None, None]


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("detection", {}, "queries is 300, and images of 32 pixels have 84 places: give --set queries=84"),
        ("detection", {**DETECTION, "hidden_size": 20}, "hidden_size, queries and decoder_layers .* are 20, 20 and 2"),
        ("detection", {**DETECTION, "image_size": 40}, "5 patches in a row, which cannot be halved"),
        ("instance_segmentation", {**MASKS, "points": 0}, "expected a multiple of 32 and three numbers"),
        ("instance_segmentation", {**MASKS, "hidden_size": 48}, "are 48, 8, 2 and 128: expected a multiple of 32"),
        ("detection", {"box_format": "cxcywh"}, "box_format .* is cxcywh: expected xywh or xyxy"),
    ],
)
def test_heads_that_cannot_be_are_refused(
    blocks: Path, tmp_path: Path, task: str, options: dict[str, Any], message: str
) -> None:
    options = dict(options)
    size = {"image_size": options.pop("image_size")} if "image_size" in options else {}
    given = {"encoder": save(equissl(num_hidden_layers=4), tmp_path / "encoder"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=message):
        prepare(settings(blocks, task, task_options=options, method="full", batch_size=4, **given, **size))


@pytest.mark.parametrize(("task", "options"), [("detection", DETECTION), ("instance_segmentation", MASKS)])
def test_batches_without_objects_and_adapters_beside_a_pyramid(
    blocks: Path, tmp_path: Path, task: str, options: dict[str, Any]
) -> None:
    encoder = save(equissl(num_hidden_layers=4, patch_size=4), tmp_path / "encoder")
    run = prepare(settings(blocks, task, encoder=encoder, task_options=options, method="lora", batch_size=4))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert any(".levels." in name for name in trained)
    assert not any("encoder.layer" in name and "lora" not in name and ".backbone." in name for name in trained)
    for training in (True, False):
        run.model.train(training).zero_grad()
        batch = run.task.to_inputs(run.task.collate([run.task.transform(run.task.blank(), None)] * 2))
        step = run.task.loss(run.model, batch)
        step.loss.backward()
        assert step.loss.isfinite()
        # A process whose images are all empty keeps the others waiting for no gradient.
        assert all(parameter.grad is not None for parameter in run.model.parameters() if parameter.requires_grad)
        predictions, _ = run.task.judge(step.output, batch)
        assert len(predictions["scores"]) == 2
