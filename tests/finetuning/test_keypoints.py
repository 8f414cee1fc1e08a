"""Key points: they move with their people, heat maps say where they are, and both data sets' formats are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.finetuning import FineTuningSettings, load_finetuned, prepare, train
from hf_equissl.finetuning.tasks import make_task
from hf_equissl.finetuning.tasks.base import EncoderInput
from hf_equissl.finetuning.tasks.keypoints import heat_maps, read_heat_maps
from hf_equissl.finetuning.tasks.people import Person

from .conftest import equissl, save

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")

NAMES = ["nose", "left_hand", "right_hand"]
OPTIONS = {"rotation": 0.0, "scaling": 0.0}


def settings(data: Path, task: str = "keypoints", **changes: Any) -> FineTuningSettings:
    return FineTuningSettings(**{"encoder": "e", "data": str(data), "output_dir": "o", "task": task, **changes})


def bound(task: str = "keypoints", **options: Any) -> Any:
    made = make_task(task, options)
    made.patch_size = 16
    made.bind(settings(Path("d")), EncoderInput(128, (0.5,) * 3, (0.25,) * 3))
    return made


def test_points_move_with_their_person() -> None:
    """Three dots of three colours are where the points say after turning, scaling and mirroring; so is the way back."""
    task = bound()
    task.names = tuple(NAMES)
    assert task.size == (96, 128)
    y, x = np.mgrid[0:300, 0:400] + 0.5
    points = np.array([[200.3, 100.8, 2], [150.0, 170.4, 2], [270.6, 190.2, 1]])
    picture = np.stack([255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 200) for px, py, _ in points], 2)
    person = Person(0, points, (210.0, 150.0), (120.0, 180.0))
    sample = {"image": Image.fromarray(picture.astype(np.uint8)), "person": person}
    turns, mirrors = set(), 0
    rows, columns = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    for seed in range(20):
        made = task.transform(sample, np.random.default_rng(seed) if seed else None)
        mirrored = torch.linalg.det(made["inverse"][:, :2]).item() < 0
        mirrors += mirrored
        turns.add(round(made["inverse"][0, 1].item(), 4))
        for number, point in enumerate(made["points"]):
            # In a mirror the dot of the right hand is the left hand.
            weight = made["pixels"][number if number == 0 or not mirrored else 3 - number].double()
            if made["weights"][number] and (point > 14).all() and (point < torch.tensor([82, 114])).all():
                found = [(weight * place).sum() / weight.sum() for place in (columns, rows)]
                assert point.tolist() == pytest.approx([one.item() for one in found], abs=0.35), (seed, number)
        order = [0, 2, 1] if mirrored else [0, 1, 2]
        back = made["points"] @ made["inverse"][:, :2].T + made["inverse"][:, 2]
        torch.testing.assert_close(back.double(), torch.tensor(points[order, :2]), atol=1e-3, rtol=0)
    assert 4 < mirrors < 16
    assert len(turns) > 8
    # As it is: with a quarter more than its box, in the middle.
    still = task.transform(sample, None)
    expected = [(200.3 - 210) * 128 / 225 + 48, (100.8 - 150) * 128 / 225 + 64]
    assert still["points"][0].tolist() == pytest.approx(expected, abs=1e-4)


def test_heat_maps_say_where_points_are() -> None:
    points = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([18.0, 26.0]) + 3
    maps = heat_maps(points, (32, 24))
    assert maps.shape == (4, 5, 32, 24)
    at = maps[1, 2, 9, 4].item()
    assert at == pytest.approx(np.exp(-(((points[1, 2] - torch.tensor([4.5, 9.5])) ** 2).sum().item() / 8)), rel=1e-5)
    found = np.stack([read_heat_maps(one) for one in maps.numpy()])
    assert np.abs(found[..., :2] - points.numpy()).max() < 0.1
    assert (found[..., 2] > 0.9).all()
    flat = read_heat_maps(np.zeros((5, 32, 24), np.float32))
    assert np.isfinite(flat).all()


@pytest.mark.parametrize("task", ["keypoints", "mpii_keypoints"])
def test_what_was_to_be_found_is_found(shared_data: Path, task: str) -> None:
    """Right heat maps are judged 1, those of points moved by a third of the image 0."""
    made = bound(task)
    data = shared_data / ("coco-keypoints-mini" if task == "keypoints" else "mpii-mini")
    samples = made.load(settings(data, task, test_split="train")).train
    assert len(samples) == (12 if task == "keypoints" else 5)
    assert len({samples.item_name(index) for index in range(len(samples))}) == (4 if task == "keypoints" else 5)
    batch = made.collate([made.transform(samples.read(index), None) for index in range(len(samples))])
    for moved, low, high in ((0, 0.95, 1), (30, 0, 0.05)):
        maps = heat_maps((batch["points"] + moved) / 4, (32, made.size[0] // 4))
        predictions, targets = made.judge((maps, 4.0), batch)
        found = made.measure(predictions.numpy(), {name: value.numpy() for name, value in targets.items()})
        assert low <= found[made.primary.name] <= high, (moved, found)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images with two people each, one of whom has no labelled point; a crowd."""
    root = tmp_path / "people"
    root.mkdir()
    images, annotations = [], []
    for number in range(2):
        Image.new("RGB", (60, 50), (90, 80, 70)).save(root / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 60, "height": 50})
        for points in ([10, 10, 2, 20, 20, 1, 58, 12, 2], 9 * [0]):
            one = {"image_id": number, "category_id": 1, "bbox": [5, 5, 50, 40], "area": 900, "iscrowd": 0}
            annotations.append({**one, "id": len(annotations), "keypoints": points})
    annotations.append({**annotations[0], "id": 9, "iscrowd": 1})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "p", "keypoints": NAMES}]}
    (root / "person_keypoints_train.json").write_text(json.dumps(content))
    return root


def test_points_are_places_with_the_middle_of_the_first_pixel_at_a_half(coco: Path, tmp_path: Path) -> None:
    """COCO counts pixels from 0, MPII from 1; a dot of one pixel is where its point says, in the image and cut out."""
    picture = np.zeros((50, 60, 3), np.uint8)
    picture[10, 12] = 255
    for number in range(2):
        Image.fromarray(picture).save(coco / f"{number}.png")
    content = json.loads((coco / "person_keypoints_train.json").read_text())
    content["annotations"][0]["keypoints"][:3] = [12, 10, 2]
    (coco / "person_keypoints_train.json").write_text(json.dumps(content))
    joints = [[13, 11], *([20 + n, 30] for n in range(15))]
    entry = {"image": "0.png", "joints": joints, "joints_vis": 16 * [1], "center": [31, 26], "scale": 0.2}
    (tmp_path / "annotations.json").write_text(json.dumps([{**entry, "image": f"people/{n}.png"} for n in range(2)]))
    for task, data, options in (("keypoints", coco, {"sigmas": [0.1] * 3}), ("mpii_keypoints", tmp_path, {})):
        made = bound(task, **options)
        samples = made.load(settings(data, task, test_split="train")).train
        sample = samples.read(0)
        assert sample["person"].points[0, :2].tolist() == [12.5, 10.5]
        still = made.transform(sample, None)
        rows, columns = np.mgrid[0 : still["pixels"].shape[1], 0 : still["pixels"].shape[2]] + 0.5
        weight = still["pixels"][0].double().numpy()
        found = [(weight * place).sum() / weight.sum() for place in (columns, rows)]
        assert still["points"][0].tolist() == pytest.approx(found, abs=0.05)
    assert sample["person"].middle == pytest.approx((30.5, 25.5 + 15 * 0.2))


@pytest.mark.parametrize(
    ("names", "mirrors"),
    [
        (["nose", "left_hand", "right_hand"], True),
        (["Nose", "Left hand", "Right hand"], True),
        (["a", "b", "c"], False),
        (["nose", "left_hand", "right_foot"], False),
        (["nose", "l_hand", "r_hand"], False),
    ],
)
def test_points_that_have_no_sides_are_not_mirrored(coco: Path, names: list[str], mirrors: bool) -> None:
    content = json.loads((coco / "person_keypoints_train.json").read_text())
    content["categories"][0]["keypoints"] = names
    (coco / "person_keypoints_train.json").write_text(json.dumps(content))
    made = bound(**OPTIONS, sigmas=[0.1] * 3)
    splits = made.load(settings(coco, test_split="train"))
    said = [remark for remark in splits.remarks if "people are not mirrored" in remark]
    assert len(said) == (not mirrors)
    assert made.protocol()["flip_probability"] == 0.5 * mirrors
    sample = splits.train.read(0)
    turned = [made.transform(sample, np.random.default_rng(seed))["inverse"][0, 0].item() < 0 for seed in range(12)]
    assert any(turned) == mirrors
    assert made.load(settings(coco, test_split="train", flip=False)).remarks == ()


def test_people_in_images_without_a_size(coco: Path) -> None:
    content = json.loads((coco / "person_keypoints_train.json").read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    content["annotations"][2]["keypoints"][6] = 61
    (coco / "person_keypoints_train.json").write_text(json.dumps(content))
    splits = make_task("keypoints", {"sigmas": [0.1] * 3}).load(settings(coco, test_split="train"))
    assert splits.train.people[1].points[2, 2] == 0
    (coco / "1.png").write_bytes(b"no image")
    splits = make_task("keypoints", {"sigmas": [0.1] * 3}).load(settings(coco, test_split="train"))
    assert splits.train.people[1].points[2, 2] == 2


def test_points_outside_of_images_do_not_count(coco: Path) -> None:
    file = coco / "person_keypoints_train.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["keypoints"][6] = 61
    file.write_text(json.dumps(content))
    splits = make_task("keypoints", {"sigmas": [0.1] * 3}).load(settings(coco, test_split="train"))
    assert [samples.people[1].points[2, 2] for samples in (splits.train, splits.test)] == [0, 0]
    assert len(splits.train) == 2
    (remark,) = splits.remarks
    assert remark.startswith("note: 1 key points lie outside of their images and do not count, e.g. in ")
    assert remark.endswith("1.png")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["annotations"][0].update(keypoints=[1, 2, 3]), r"0.png: somebody's keypoints are \[1, 2, 3\]"),
        (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, float("nan")), "a key point is not finite"),
        (lambda c: c["categories"][0].pop("keypoints"), "0 of its 1 categories name key points"),
        (lambda c: [one.update(keypoints=9 * [0]) for one in c["annotations"]], "nobody in its 2 images"),
        (lambda c: c["categories"][0]["keypoints"].append("x"), "there are 4 key points, and sigmas of 3"),
    ],
)
def test_key_points_that_cannot_be_are_refused(coco: Path, edit: Any, message: str) -> None:
    file = coco / "person_keypoints_train.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        make_task("keypoints", {"sigmas": [0.1] * 3}).load(settings(coco, test_split="train"))


def test_lists_of_mpii(shared_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "mpii"
    (data / "annot").mkdir(parents=True)
    shutil.copytree(shared_data / "mpii-mini", data / "images")
    entries = json.loads((data / "images" / "annotations.json").read_text())
    (data / "images" / "annotations.json").unlink()
    entries[0]["head_box"] = [10, 20, 40, 60]
    for split in ("train", "valid"):
        (data / "annot" / f"{split}.json").write_text(json.dumps(entries))
    splits = make_task("mpii_keypoints", {}).load(settings(data, "mpii_keypoints"))
    assert (splits.test_split, splits.classes[9], len(splits.test)) == ("validation", "head_top", 5)
    assert [person.head for person in splits.train.people[:2]] == pytest.approx([30, 58.73], abs=0.01)
    for change, message in (
        ({"joints": [[1, 2]]}, r"train.json, entry 1 \(052475643.jpg\): expected joints \(16 x 2\)"),
        ({"scale": 0}, r"entry 1 \(052475643.jpg\): its scale is 0"),
        ({"image": "no.jpg"}, "1 images are not in .*images, e.g. no.jpg"),
    ):
        (data / "annot" / "train.json").write_text(json.dumps([entries[0], {**entries[1], **change}]))
        with pytest.raises(ValueError, match=message):
            make_task("mpii_keypoints", {}).load(settings(data, "mpii_keypoints"))
    with pytest.raises(ValueError, match="there is no list of MPII's form"):
        make_task("mpii_keypoints", {}).load(settings(tmp_path, "mpii_keypoints"))


@pytest.mark.parametrize("task", ["keypoints", "mpii_keypoints"])
def test_it_trains_and_comes_back(shared_data: Path, tmp_path: Path, task: str) -> None:
    run = prepare(
        settings(
            shared_data / ("coco-keypoints-mini" if task == "keypoints" else "mpii-mini"),
            task,
            encoder=save(equissl(patch_size=16), tmp_path / "encoder"),
            output_dir=str(tmp_path / "run"),
            test_split="train",
            method="full",
            image_size=64,
            batch_size=4,
            epochs=1,
            task_options={"simple": task == "keypoints"},
        )
    )
    first, *_ = train(run)
    assert (first.task, first.metric, first.primary) == (task, run.task.primary.name, True)
    assert first.protocol["input"] == ("64 x 48" if task == "keypoints" else "64 x 64")
    pixels = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    maps = run.network.eval()(pixels)
    assert maps.shape == (2, len(run.splits.classes), 16, 12)
    torch.testing.assert_close(load_finetuned(run.folder)(pixels), maps)
