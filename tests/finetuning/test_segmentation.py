"""Semantic segmentation: masks move with their images, mIoU is that of pixels, and the task trains as any other."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoModelForSemanticSegmentation, pipeline

from hf_equissl.data import ImageDecodeError, TooManyBadImages
from hf_equissl.evaluation.results import load_records
from hf_equissl.finetuning import FineTuningSettings, load_finetuned, merge_adapter, prepare, train
from hf_equissl.finetuning.run import build_trainer
from hf_equissl.finetuning.tasks.base import EncoderInput
from hf_equissl.finetuning.tasks.masks import IGNORED, Labels
from hf_equissl.finetuning.tasks.segmentation import SegmentationTask
from hf_equissl.finetuning.tasks.windows import random_window, slide, window_starts
from hf_equissl.finetuning.trainer import parameter_groups
from hf_equissl.views.cropping import random_box

from .conftest import equissl, save

TASK = "semantic_segmentation"
QUICK = {"batch_size": 4, "epochs": 2, "learning_rate": 3e-3, "save_steps": 2}
OPTIONS = {"hidden_size": 8}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with a red disc (class 1) and a green box (2) on noise (0); a border of two pixels is ignored (9)."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:48]
    for split, count in (("train", 8), ("val", 5)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            picture, mask = rng.integers(0, 90, (40, 48, 3)).astype(np.uint8), np.zeros((40, 48), np.uint8)
            cy, cx = rng.integers(10, 30), rng.integers(10, 38)
            disc = (y - cy) ** 2 + (x - cx) ** 2 < 64
            box = (abs(y - 38 + cy) < 7) & (abs(x - 46 + cx) < 7) & ~disc
            for number, region in ((1, disc), (2, box)):
                picture[region, number - 1], mask[region] = 230, number
            mask[:2] = 9
            Image.fromarray(picture).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
    (root / "classes.json").write_text(json.dumps({"classes": ["ground", "disc", "box"], "ignore_index": 9}))
    return root


@pytest.fixture
def make(encoders: dict[str, str], shapes: Path, tmp_path: Path) -> Any:
    """Settings of a short run on the shapes; keywords change them."""

    def settings(encoder: str = "equissl", **changes: Any) -> FineTuningSettings:
        given = {"output_dir": str(tmp_path / "run"), "data": str(shapes), "task": TASK, "method": "full", **QUICK}
        return FineTuningSettings(encoder=encoders[encoder], **{**given, "task_options": OPTIONS, **changes})

    return settings


def bound(size: int = 32, **changes: Any) -> SegmentationTask:
    """The task, ready to transform."""
    task = SegmentationTask()
    settings = FineTuningSettings(encoder="e", data="d", output_dir="o", **changes)
    task.bind(settings, EncoderInput(size, (0.5,) * 3, (0.25,) * 3))
    return task


# Of four colours no three are in line and no mixture of some is another: a pixel of one of them has that class.
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def test_a_mask_moves_with_its_image() -> None:
    """The image is the mask in colours, and is so after any crop, scale and mirror, wherever colours are not mixed."""
    mask = np.kron(np.random.default_rng(0).integers(0, 4, (6, 7)), np.ones((16, 16))).astype(np.int32)
    height, width, side, scale = *mask.shape, 48, (0.1, 0.6)
    sample = {"image": Image.fromarray(COLOURS[mask]), "mask": mask}
    task = bound(side, crop_scale=scale)
    mirrors = 0
    for seed in range(20):
        made = task.transform(sample, np.random.default_rng(seed))
        distance = (made["pixels"].permute(1, 2, 0)[..., None, :].int() - torch.from_numpy(COLOURS).int()).abs().amax(3)
        clear = distance.amin(2) < 8
        assert clear.float().mean() > 0.3, seed
        assert torch.equal(distance.argmin(2)[clear], made["mask"].long()[clear]), seed

        # The same draws, by hand: a box, then the mirror; the middle of each pixel says which one of the mask it is.
        rng = np.random.default_rng(seed)
        left, top, right, lower = random_box(width, height, scale, (3 / 4, 4 / 3), rng)
        middles = (np.arange(side) + 0.5) / side
        rows, columns = (top + (lower - top) * middles).astype(int), (left + (right - left) * middles).astype(int)
        if rng.random() < 0.5:
            columns, mirrors = columns[::-1], mirrors + 1
        assert np.array_equal(made["mask"], mask[np.ix_(rows, columns)]), seed
    assert 0 < mirrors < 20


def test_masks_are_mirrored_pixel_by_pixel_and_kept_for_tests() -> None:
    """An image of the encoder's size, as a whole, is not resampled: there every pixel can be compared."""
    mask = np.random.default_rng(0).integers(0, 4, (32, 32)).astype(np.int32)
    sample = {"image": Image.fromarray(COLOURS[mask]), "mask": mask}
    seen = set()
    for seed in range(8):
        made = bound(crop_scale=(1.0, 1.0)).transform(sample, np.random.default_rng(seed))
        assert np.array_equal(made["pixels"].permute(1, 2, 0), COLOURS[made["mask"]])
        seen.add(made["mask"].numpy().tobytes())
        still = bound(crop_scale=(1.0, 1.0), flip=False).transform(sample, np.random.default_rng(seed))
        assert np.array_equal(still["mask"], mask)
    assert seen == {mask.tobytes(), mask[:, ::-1].tobytes()}
    tall = np.repeat(mask, 2, axis=0)
    judged = bound().transform({"image": Image.fromarray(COLOURS[tall]), "mask": tall}, None)
    assert np.array_equal(judged["mask"], tall)
    assert judged["pixels"].shape == (3, 32, 32)


def test_miou_is_that_of_pixels() -> None:
    rng = np.random.default_rng(0)
    truth = [rng.integers(0, 3, shape) for shape in ((8, 12), (9, 9), (8, 8))]  # class 3 is predicted, never labelled
    for mask in truth:
        mask[0, :4] = IGNORED
    logits = torch.from_numpy(rng.normal(size=(3, 5, 8, 8))).float()
    logits[:, 4] = -99  # neither
    judged = bound().judge(logits, {"mask": [torch.from_numpy(mask).int() for mask in truth]})
    found = bound().measure(*(part.numpy() for part in judged))

    # Every pixel of the split, one by one.
    pairs = []
    for scores, mask in zip(logits, truth, strict=True):
        resized = interpolate(scores[None], mask.shape, mode="bilinear", align_corners=False)[0]
        guess = resized.argmax(0).numpy()
        pairs += [(g, t) for g, t in zip(guess.ravel(), mask.ravel(), strict=True) if t != IGNORED]
    ious = []
    for number in range(4):
        both = sum(g == t == number for g, t in pairs)
        ious.append(both / sum(number in (g, t) for g, t in pairs))
    assert found["miou"] == pytest.approx(np.mean(ious))
    assert found["pixel_accuracy"] == pytest.approx(np.mean([g == t for g, t in pairs]))


def test_what_numbers_in_masks_mean(tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette([200, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    assert Labels(("a", "b", "c"), 255).read(tmp_path / "palette.png").tolist() == [[0, 1], [2, IGNORED]]
    ade = Labels(("a", "b"), 255, reduce_labels=True).read(numbers)
    assert ade.tolist() == [[IGNORED, 0], [1, IGNORED]]
    with pytest.raises(ImageDecodeError, match="holds the class 2, but there are 2"):
        Labels(("a", "b"), 255).read(numbers)
    with pytest.raises(ImageDecodeError, match="The mask is RGB"):
        Labels(("a", "b"), 255).read(np.zeros((2, 2, 3), np.uint8))


def test_it_learns_and_leaves_a_model_of_transformers(make: Any, shapes: Path, tmp_path: Path) -> None:
    # Patches of four pixels: of feature maps 4 x 4 no head could tell where discs and boxes end.
    encoder = save(equissl(patch_size=4), tmp_path / "encoder")
    length = {"epochs": 20, "save_steps": 20, "eval_steps": 20, "keep": "best", "learning_rate": 1e-2}
    settings = replace(make(**length, task_options={"hidden_size": 32}), encoder=encoder)
    miou, accuracy = train(prepare(settings))
    assert (miou.metric, miou.task, miou.split, miou.primary) == ("miou", TASK, "validation", True)
    assert miou.value > 0.7  # all ground: below 0.3; it comes to 0.86
    assert miou.value == miou.details["best_of_all_evaluations"][0]
    assert accuracy.value > miou.value
    assert load_records(Path(settings.output_dir) / "results.json") == [miou, accuracy]
    assert "mIoU %" in (Path(settings.output_dir) / "results.md").read_text()

    # Who loads it with transformers alone measures what was recorded.
    folder = Path(settings.output_dir) / "model"
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert model.config.id2label == {0: "ground", 1: "disc", 2: "box"}
    segment = pipeline("image-segmentation", model=str(folder))
    counts = np.zeros((2, 3))
    for file in sorted((shapes / "images" / "val").glob("*.png")):
        truth = np.asarray(Image.open(shapes / "masks" / "val" / file.name))
        guess = np.zeros_like(truth)
        for entry in segment(Image.open(file)):
            guess[np.asarray(entry["mask"]) > 0] = model.config.label2id[entry["label"]]
        for number in range(3):
            hit, said = (truth == number), (guess == number) & (truth != 9)
            counts[:, number] += (hit & said).sum(), (hit | said).sum()
    assert np.mean(counts[0] / counts[1]) == pytest.approx(miou.value, abs=0.01)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert 'segment = pipeline("image-segmentation"' in card.content


def test_windows_cover_an_image_and_are_averaged() -> None:
    # MMSegmentation's, for 512 pixels and a stride of 341.
    assert window_starts(512, 512) == [0]
    assert window_starts(683, 512) == [0, 171]
    assert window_starts(1024, 512) == [0, 341, 512]
    image = torch.randn(3, 20, 37, generator=torch.Generator().manual_seed(0))
    # What a pixel says by itself is the same whatever windows it is in.
    torch.testing.assert_close(slide(lambda windows: windows[:, :2] ** 2, image, 12), image[:2] ** 2)
    # Of what depends on the window it is the mean: here windows [0, 12), [8, 20), [16, 28), [24, 36), [25, 37).
    numbers = iter(range(10))

    def number_each(windows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full((1, 12, 12), float(next(numbers))) for _ in windows])

    found = slide(number_each, image, 12)[0]
    assert found[0, [0, 9, 13, 24, 25, 36]].tolist() == pytest.approx([0, 0.5, 1, 2.5, 3, 4])
    assert found[10, 0] == pytest.approx(2.5)


def test_windows_of_masks_are_those_of_images() -> None:
    """As above, for windows at an image's own proportions; beyond the image is nothing that counts."""
    mask = np.kron(np.random.default_rng(0).integers(0, 4, (4, 7)), np.ones((16, 16))).astype(np.int32)
    sample = {"image": Image.fromarray(COLOURS[mask]), "mask": mask}
    task = SegmentationTask(slide=True)
    settings = FineTuningSettings(encoder="e", data="d", output_dir="o")
    task.bind(settings, EncoderInput(48, (0.5, 0.4, 0.3), (0.25,) * 3))
    shares = []
    for seed in range(20):
        made = task.transform(sample, np.random.default_rng(seed))
        beyond = made["mask"] == IGNORED
        shares.append(beyond.float().mean().item())
        # Once normalised, nothing: the mean of the images that the encoder knows, not black.
        normal = task.to_inputs({"pixels": made["pixels"][None]})["pixel_values"][0]
        assert (normal[:, beyond].abs() < 0.01).all()
        colours = made["pixels"].permute(1, 2, 0)[..., None, :].int() - torch.from_numpy(COLOURS).int()
        clear = (colours.abs().amax(3).amin(2) < 8) & ~beyond
        assert clear.float().mean() > 0.1, seed
        assert torch.equal(colours.abs().amax(3).argmin(2)[clear], made["mask"].long()[clear]), seed
    assert min(shares) == 0
    assert 0.3 < max(shares) < 0.6  # at scale 0.5 half of the window is below the image, which is wider than high
    one_class = np.zeros((40, 60), np.int32)
    one_class[:, 30:] = 1
    shares = []
    for seed in range(40):
        left, top, right, lower = random_window(one_class, np.random.default_rng(seed))
        seen = one_class[round(top) : round(lower), round(left) : round(right)]
        shares.append(seen.mean())
    # Of windows that two classes share, 20 of 40 would be nearly all of one.
    assert sum(0.2 < share < 0.8 for share in shares) > 34


def test_sliding_windows_judge_test_images(make: Any, tmp_path: Path) -> None:
    encoder = save(equissl(patch_size=4), tmp_path / "encoder")
    settings = make(task="linear_segmentation", task_options={"slide": True}, epochs=2, learning_rate=2e-2)
    run = prepare(replace(settings, encoder=encoder))
    miou, _ = train(run)
    assert miou.protocol["slide"] is True
    assert "crop_scale" not in miou.protocol
    # Image by image: 48 x 40 pixels become 38 x 32, seen through two windows.
    parts = []
    for index in range(5):
        sample = run.splits.test.read(index)
        image = np.asarray(sample["image"].resize((38, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
        mean, std = (
            np.array(value)[:, None, None] for value in (run.task.inputs.image_mean, run.task.inputs.image_std)
        )
        pixels = torch.from_numpy((image - mean) / std).float()
        with torch.no_grad():
            left, right = run.network.eval()(torch.stack([pixels[..., :32], pixels[..., 6:]])).logits
        whole = torch.cat([left[..., :6], (left[..., 6:] + right[..., :26]) / 2, right[..., 26:]], 2)
        parts.append(run.task.judge([whole], {"mask": [torch.from_numpy(sample["mask"])]}))
    found = run.task.measure(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))
    assert found["miou"] == pytest.approx(miou.value)
    with pytest.raises(ValueError, match=r"--crop_scale 0\.5 1\.0: with slide=true crops have scales of their own"):
        prepare(replace(settings, crop_scale=(0.5, 1.0)))


def test_a_linear_head_reads_single_patches(make: Any, tmp_path: Path) -> None:
    encoder = save(equissl(patch_size=4), tmp_path / "encoder")
    settings = make(task="linear_segmentation", task_options={}, epochs=12, learning_rate=2e-2, save_steps=24)
    run = prepare(replace(settings, encoder=encoder, method="frozen"))
    miou, _ = train(run)
    assert (miou.task, miou.features) == ("linear_segmentation", "layers 2")
    assert miou.value > 0.45  # all ground: below 0.3
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, head = load_finetuned(run.folder), run.network.eval()
    with torch.no_grad():
        (logits,) = model(pixels)
        torch.testing.assert_close(logits, head(pixels).logits)
        # By hand: each patch alone, through the norm of all patches and a matrix; then bilinear to the image.
        patches = model.backbone(pixels).feature_maps[0]
        mean, var = (getattr(model.norm, f"running_{name}")[:, None, None] for name in ("mean", "var"))
        normed = (patches - mean) / (var + 1e-5).sqrt() * model.norm.weight[:, None, None]
        normed += model.norm.bias[:, None, None]
        maps = torch.einsum("bdhw,kd->bkhw", normed, model.classifier.weight[:, :, 0, 0])
        maps += model.classifier.bias[:, None, None]
        by_hand = interpolate(maps, (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, by_hand, atol=1e-5, rtol=1e-4)


def test_a_pyramid_under_the_head(make: Any, tmp_path: Path) -> None:
    settings = make(method="full", epochs=1, layer_decay=0.5, task_options={**OPTIONS, "pyramid": True})
    with pytest.raises(ValueError, match=r"layers .* is \(1, 2\): semantic segmentation reads a pyramid of 4 levels"):
        prepare(replace(settings, task_options={**OPTIONS, "pyramid": True, "layers": (1, 2)}))
    run = prepare(replace(settings, encoder=save(equissl(num_hidden_layers=4), tmp_path / "encoder")))
    assert run.task.encoder_name(run.network) == "backbone.backbone"
    groups = parameter_groups(run.model, run.args, run.task.encoder(run.network))
    rate = {id(p): group["lr"] / run.args.learning_rate for group in groups for p in group["params"]}
    named = dict(run.network.named_parameters())
    assert rate[id(named["backbone.levels.level1.weight"])] == 1.0
    assert rate[id(named["backbone.backbone.encoder.layer.0.mlp.fc1.weight"])] == 0.5**4
    miou, _ = train(run)
    assert miou.protocol["pyramid"] is True
    pixels = torch.randn(1, 3, 32, 32)
    model = AutoModelForSemanticSegmentation.from_pretrained(run.folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, run.network.eval()(pixels).logits)


def test_the_paper_s_layers(make: Any, tmp_path: Path) -> None:
    deep = save(equissl(num_hidden_layers=12), tmp_path / "deep")
    task = SegmentationTask(hidden_size=8)
    assert task.reads(task.load_model(deep, ["a", "b"])) == "layers 4, 6, 8, 12"


def test_a_frozen_encoder_stays_as_it_is(make: Any) -> None:
    run = prepare(make("dinov2", method="frozen"))
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    build_trainer(run).train()
    changed = {name for name, value in run.network.state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all(name.startswith("decode_head.") for name in changed)
    assert not run.network.backbone.training


class _StopError(Exception):
    pass


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_ends_with_the_same_weights(make: Any, method: str) -> None:
    settings = make(method=method, lora_dropout=0.2, drop_path=0.2)
    unbroken = prepare(settings)
    build_trainer(unbroken).train()
    expected = {name: value.clone() for name, value in unbroken.model.state_dict().items()}
    shutil.rmtree(settings.output_dir)

    trainer = build_trainer(prepare(settings))
    real = trainer.compute_loss

    def stop(*args: Any, **kwargs: Any) -> Any:
        if args[0].training and trainer.state.global_step == 3:
            raise _StopError
        return real(*args, **kwargs)

    trainer.compute_loss = stop
    with pytest.raises(_StopError):
        trainer.train()
    run = prepare(settings)
    assert Path(run.checkpoint).name == "checkpoint-2"
    build_trainer(run).train(resume_from_checkpoint=run.checkpoint)
    found = run.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("running_mean" in name for name in expected)


def test_an_adapter_and_its_head_travel_and_merge(make: Any, tmp_path: Path) -> None:
    settings = make(method="lora", epochs=1)
    run = prepare(settings)
    train(run)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = run.model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(load_finetuned(run.folder)(pixel_values=pixels).logits, expected)
        merged = merge_adapter(run.folder, tmp_path / "merged")
        plain = AutoModelForSemanticSegmentation.from_pretrained(merged).eval()
        torch.testing.assert_close(plain(pixels).logits, expected, atol=1e-4, rtol=0)


def test_masks_that_do_not_decode(make: Any, shapes: Path, tmp_path: Path) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    (data / "masks" / "val" / "1.png").write_bytes(b"no image")
    Image.new("L", (5, 5)).save(data / "masks" / "train" / "2.png")  # not as large as its image
    with pytest.raises(TooManyBadImages, match="1 of 5 test images did not decode"):
        build_trainer(prepare(make(data=str(data)))).evaluate()
    trainer = build_trainer(prepare(make(data=str(data), max_bad_share=0.3, method="frozen")))
    metrics = trainer.evaluate()
    (data / "masks" / "val" / "1.png").unlink()
    (data / "images" / "val" / "1.png").unlink()
    again = build_trainer(prepare(make(data=str(data), max_bad_share=0.3, method="frozen"))).evaluate()
    assert again["eval_miou"] == pytest.approx(metrics["eval_miou"])
    trainer.train()
    assert "The image has 48 x 40 pixels and its mask 5 x 5" in str(trainer.skipped_images.bad)


def test_a_data_set_with_a_column_of_masks(shapes: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = {
            "image": [str(path) for path in sorted((shapes / "images" / split).iterdir())],
            "annotation": [str(path) for path in sorted((shapes / "masks" / split).iterdir())],
        }
        features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
        table = datasets.Dataset.from_dict(rows, features=features)
        table.map(lambda row: row).to_parquet(tmp_path / f"{split}.parquet")
    settings = FineTuningSettings(encoder="e", data=str(tmp_path), output_dir="o", task=TASK)
    found = SegmentationTask(classes=3, ignore_index=9).load(settings)
    folder = SegmentationTask().load(FineTuningSettings(encoder="e", data=str(shapes), output_dir="o"))
    assert found.classes == ("0", "1", "2")
    assert (len(found.train), len(found.test), found.test_split) == (8, 5, "validation")
    for one, other in ((found.train, folder.train), (found.test, folder.test)):
        assert np.array_equal(one.read(3)["mask"], other.read(3)["mask"])
        assert np.array_equal(np.asarray(one.read(3)["image"]), np.asarray(other.read(3)["image"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "semantic"}, "--task: there is no 'semantic'. Did you mean 'semantic_segmentation'"),
        ({"method": "linear"}, "--method linear: for semantic segmentation there is no such method"),
        ({"pooling": "cls"}, "--pooling cls: semantic segmentation does not read it"),
        ({"batch_size": 1}, "--batch_size 1: UPerNet normalises over the batch"),
        ({"task_options": {"hiden_size": 8}}, "unknown key 'hiden_size'. Did you mean 'hidden_size'"),
        ({"task_options": {"hidden_size": "big"}}, "hidden_size: expected an integer, got 'big'"),
        ({"task_options": {"hidden_size": 0}}, "hidden_size .* is 0: expected 1 or more"),
        ({"task_options": {"layers": (1, 3)}}, r"layers .* is \(1, 3\): .* has the blocks 1 to 2"),
        ({"task_options": {"classes": ("a", "b")}}, "holds the class 2, but there are 2"),
        ({"test_split": "tset"}, "there is no split 'tset'. Did you mean 'test'|Splits: train, validation"),
        ({"encoder": "vit"}, "vit model, for which transformers has no backbone"),
    ],
)
def test_mistakes_are_named_before_training(make: Any, changes: dict[str, Any], message: str) -> None:
    given = dict(changes)
    with pytest.raises(ValueError, match=message):
        prepare(make(given.pop("encoder", "equissl"), **given))


def test_camvid(shared_data: Path, encoders: dict[str, str], tmp_path: Path) -> None:
    settings = FineTuningSettings(
        encoder=encoders["equissl"],
        data=str(shared_data / "camvid"),
        output_dir=str(tmp_path / "run"),
        task=TASK,
        method="frozen",
        task_options=OPTIONS,
        train_images=8,
        test_images=3,
        batch_size=4,
        epochs=1,
    )
    run = prepare(settings)
    assert run.splits.classes[:2] == ("sky", "building")
    miou, _ = train(run)
    assert 0 <= miou.value < 1
    assert (miou.split, miou.protocol["test_images"]) == ("validation", 3)


def test_what_lies_beside_images_and_masks_is_said(make: Any, shapes: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    (data / "images" / "train" / "9.CR2").write_bytes(b"raw")
    (data / "masks" / "val" / "0.json").write_text("{}")
    name = os.fsdecode(b"\xff")
    for kind in ("images", "masks"):
        shutil.copy(data / kind / "train" / "0.png", data / kind / "train" / f"{name}.png")
    splits = SegmentationTask().load(make(data=str(data)))
    assert len(splits.train) == 9
    assert [splits.train.read(index)["mask"].shape for index in range(9)] == [(40, 48)] * 9
    assert splits.remarks == (
        "note: images/train: 1 file of other types (.CR2) are left out",
        "note: masks/val: 1 file of other types (.json) are left out",
    )
    with pytest.raises(ValueError, match="max_pixels = 9"):
        SegmentationTask().load(make(data=str(data), max_pixels=9))
