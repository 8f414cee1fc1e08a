"""Monocular depth: errors are known in known cases, holes never count, and the task beats saying the mean depth."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.data import ImageDecodeError
from hf_equissl.finetuning import FineTuningSettings, load_finetuned, prepare, train
from hf_equissl.finetuning.run import build_trainer
from hf_equissl.finetuning.tasks.base import EncoderInput
from hf_equissl.finetuning.tasks.depth import DepthTask, depth_errors, scale_invariant_log_loss
from hf_equissl.finetuning.tasks.depth_maps import DepthUnits

from .conftest import equissl, save
from .test_segmentation import COLOURS


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Floors that darken with distance, 1 to 5 m in millimetres, with a near disc and a corner of unknown depth."""
    root = tmp_path_factory.mktemp("rooms")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:48]
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "depth"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            far = rng.uniform(3, 5)
            depth = far - (far - 1) * y / 39
            depth[(y - rng.integers(10, 30)) ** 2 + (x - rng.integers(10, 38)) ** 2 < 25] = 1
            grey = 250 / depth + rng.uniform(-4, 4, depth.shape)
            depth[:6, :6] = 0
            Image.fromarray(np.stack([grey] * 3, -1).clip(0, 255).astype(np.uint8)).save(
                root / "images" / split / f"{index}.png"
            )
            Image.fromarray((depth * 1000).round().astype(np.uint16)).save(root / "depth" / split / f"{index}.png")
    return root


def settings_for(encoder: str, data: Path, folder: Path, **changes: Any) -> FineTuningSettings:
    given = {"task": "depth", "method": "full", "batch_size": 4, "epochs": 1, "learning_rate": 3e-3, **changes}
    return FineTuningSettings(encoder=encoder, data=str(data), output_dir=str(folder / "run"), **given)


def bound(size: int = 32, changes: dict[str, Any] | None = None, **options: Any) -> DepthTask:
    """The task, ready to transform."""
    task = DepthTask(**options)
    settings = FineTuningSettings(encoder="e", data="d", output_dir="o", **(changes or {}))
    task.bind(settings, EncoderInput(size, (0.5,) * 3, (0.25,) * 3))
    return task


def test_errors_of_known_cases() -> None:
    true = torch.tensor([1.0, 2.0, 4.0])
    assert depth_errors(true, true) == (0, 0, 1)
    assert depth_errors(2 * true, true) == pytest.approx((math.sqrt(7), 1, 0))
    assert depth_errors(true + 1, true) == pytest.approx((1, (1 + 1 / 2 + 1 / 4) / 3, 0))
    assert depth_errors(true * 1.24, true).delta1 == 1
    assert depth_errors(true / 1.26, true).delta1 == 0
    assert depth_errors(torch.tensor([1.0, 2.0, 5.5]), true) == pytest.approx((math.sqrt(0.75), 0.125, 2 / 3))
    for wrong in (true[:0], torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="above 0"):
            depth_errors(wrong, wrong)


def test_the_loss_of_known_cases() -> None:
    true = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    assert scale_invariant_log_loss(true, true) < 1e-5
    # Everything e times too far: no variance, and a mean of 1, whose square counts 0.15.
    assert scale_invariant_log_loss(math.e * true, true).item() == pytest.approx(math.sqrt(0.15), abs=1e-3)
    g = torch.tensor([0.3, -0.1, 0.0, 0.2], dtype=torch.float64)
    expected = math.sqrt(((g - 0.1) ** 2).mean() + 0.15 * 0.1**2)
    assert scale_invariant_log_loss(g.exp() * (true + 1e-3) - 1e-3, true).item() == pytest.approx(expected)


def test_what_numbers_in_depth_maps_mean(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 2000], [500, 10_000, 10_001]], np.uint16)
    Image.fromarray(stored).save(tmp_path / "mm.png")
    expected = np.array([[0, 0.001, 2], [0.5, 10, 0]], np.float32)
    assert np.array_equal(DepthUnits(1000, 10).read(tmp_path / "mm.png"), expected)
    assert np.array_equal(DepthUnits(256, 80).read(tmp_path / "mm.png"), np.where(stored > 20480, 0, stored) / 256)
    metres = np.array([[np.nan, -1, 3.5], [np.inf, 0, 80]], np.float32)
    Image.fromarray(metres).save(tmp_path / "m.tiff")
    assert DepthUnits(1, 80).read(tmp_path / "m.tiff").tolist() == [[0, 0, 3.5], [0, 0, 80]]
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(ImageDecodeError, match="The depth map is RGB; expected one channel"):
        DepthUnits(1, 80).read(tmp_path / "colour.png")


def test_depth_moves_with_its_image_and_holes_stay_holes() -> None:
    """Where the image says the depth, in colours, it does so after any crop and mirror; no hole becomes a depth."""
    depth = np.kron(np.random.default_rng(0).integers(0, 4, (5, 6)), np.ones((16, 16))).astype(np.float32)
    image = Image.fromarray(COLOURS[depth.astype(int)])
    seen = set()
    for seed in range(10):
        task = bound(48, {"crop_scale": (0.2, 1.0)})
        made = task.transform({"image": image, "depth": depth}, np.random.default_rng(seed))
        distance = (made["pixels"].permute(1, 2, 0)[..., None, :].int() - torch.from_numpy(COLOURS).int()).abs().amax(3)
        clear = distance.amin(2) < 8
        assert clear.float().mean() > 0.3
        assert torch.equal(distance.argmin(2)[clear].float(), made["depth"][clear])
        assert set(made["depth"].unique().tolist()) <= set(range(4))
        whole = bound(48).transform({"image": image, "depth": depth}, np.random.default_rng(seed))
        seen.add(whole["depth"].numpy().tobytes())
    assert len(seen) == 2  # whole, and mirrored
    kept = bound(48).transform({"image": image, "depth": depth}, None)
    assert np.array_equal(kept["depth"], depth)


def test_images_are_judged_where_depth_is_known() -> None:
    task = bound()
    depth = torch.full((3, 20, 30), 4.0)
    depth[1, :10] = 0
    depth[1, 10:] = 2
    depth[2] = 0  # nowhere
    found = task.measure(*task.judge(torch.full((3, 8, 8), 3.0), {"depth": list(depth)}))
    # One metre too near, and one too far; 1/4 and 1/2 of the truth; the mean depth is 3 m, from which both are 1 m.
    assert found == pytest.approx({"rmse": 1, "abs_rel": 0.375, "delta1": 0, "baseline_mean_depth": 1})
    with pytest.raises(ValueError, match="No test image has a known depth"):
        task.measure(*task.judge(torch.full((1, 8, 8), 3.0), {"depth": [torch.zeros(20, 30)]}))

    edges = torch.full((480, 640), 9.0)
    edges[45:471, 41:601] = 3
    judged = bound(eval_crop="eigen").judge(torch.full((1, 8, 8), 3.0), {"depth": [edges]})
    assert judged[0].tolist() == [[0, 0, 1]]
    assert judged[1][0, 0] == 426 * 560
    # As the published evaluation cuts KITTI's images.
    for (height, width), edges in {(375, 1242): (153, 371, 44, 1197), (352, 1216): (143, 349, 43, 1172)}.items():
        rows, columns = bound(eval_crop="garg")._judged(height, width)
        assert (rows.start, rows.stop, columns.start, columns.stop) == edges


def test_holes_do_not_enter_the_loss() -> None:
    task, guess = bound(), torch.rand(2, 8, 8) * 4 + 1

    class Says(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return guess.requires_grad_()

    depth = torch.full((2, 32, 32), 2.0)
    depth[0, :16] = depth[1] = 0
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "depth": list(depth)}
    task.loss(Says(), batch).loss.backward()
    assert guess.grad[0, 5:].abs().min() > 0
    assert not guess.grad[0, :3].any()
    assert not guess.grad[1].any()
    nothing = task.loss(Says(), {**batch, "depth": list(torch.zeros(2, 32, 32))}).loss
    assert nothing == 0
    nothing.backward()


def test_it_learns_and_stands_beside_the_mean_depth(rooms: Path, encoders: dict[str, str], tmp_path: Path) -> None:
    length = {"epochs": 20, "eval_steps": 40, "save_steps": 40, "learning_rate": 1e-2, "layer_decay": 1.0}
    run = prepare(settings_for(encoders["equissl"], rooms, tmp_path, task_options={"max_depth": 6.0}, **length))
    assert "the head reads layers 1, 2" in run.summary()
    rmse, abs_rel, delta1 = train(run)
    (baseline,) = rmse.details["baseline_mean_depth"]
    assert rmse.value < baseline / 2
    assert abs_rel.value < 0.2
    assert delta1.value > 0.7
    assert rmse.primary
    assert rmse.split == "validation"
    table = (tmp_path / "run" / "results.md").read_text()
    assert "RMSE m" in table
    assert f"| {baseline:.4f} m" in table
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        depth = run.model.eval()(pixels)
        torch.testing.assert_close(load_finetuned(run.folder)(pixels), depth)
    assert depth.shape == (2, 16, 16)
    assert depth.min() > 0
    assert depth.max() < 6


@pytest.mark.parametrize(("blocks", "read"), [(12, "3, 6, 9, 12"), (24, "5, 12, 18, 24"), (8, "2, 4, 6, 8")])
def test_the_layers_of_dinov2_s_protocol(tmp_path: Path, blocks: int, read: str) -> None:
    deep = save(equissl(num_hidden_layers=blocks), tmp_path / "deep")
    task = bound()
    assert task.reads(task.load_model(deep, [])) == f"layers {read}"
    assert task.protocol()["layers"] == "as DINOv2"
    chosen = bound(layers=(1, 4))
    assert chosen.reads(chosen.load_model(deep, [])) == "layers 1, 4"
    assert chosen.protocol()["layers"] == [1, 4]


def test_columns_of_depth_maps_and_maps_that_do_not_fit(rooms: Path, encoders: dict[str, str], tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = {
            name: [str(path) for path in sorted((rooms / kind / split).iterdir())]
            for name, kind in (("image", "images"), ("depth_map", "depth"))
        }
        features = datasets.Features({"image": datasets.Image(), "depth_map": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table" / f"{split}.parquet")
    load = DepthTask().load
    columns, folder = (load(settings_for("e", data, tmp_path)) for data in (tmp_path / "table", rooms))
    assert (len(columns.train), len(columns.test), columns.test_split) == (8, 4, "validation")
    for one, other in ((columns.train, folder.train), (columns.test, folder.test)):
        assert np.array_equal(one.read(3)["depth"], other.read(3)["depth"])

    data = Path(shutil.copytree(rooms, tmp_path / "data"))
    Image.fromarray(np.ones((5, 7), np.uint16)).save(data / "depth" / "train" / "2.png")
    Image.new("I;16", (48, 40)).save(data / "depth" / "val" / "1.png")  # known nowhere
    trainer = build_trainer(prepare(settings_for(encoders["dinov2"], data, tmp_path, max_bad_share=0.2)))
    trainer.train()
    assert [name for name in map(str, trainer.skipped_images.bad) if "2.png" in name]
    assert "The image has 48 x 40 pixels and its depth map 7 x 5" in str(trainer.skipped_images.bad)
    assert math.isfinite(trainer.evaluate()["eval_rmse"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_options": {"depth_scale": 1}}, r"8 of the first 8 depth maps hold no depth above 0 and up to 10 m"),
        ({"task_options": {"depth_scale": -1}}, r"depth_scale and max_depth \(--set\) are -1 and 10"),
        ({"task_options": {"eval_crop": "nyu"}}, "eval_crop .* is 'nyu': choose among eigen, garg"),
        ({"task_options": {"eval_crops": "eigen"}}, "unknown key 'eval_crops'. Did you mean 'eval_crop'"),
        ({"method": "linear"}, "--method linear: for depth estimation there is no such method"),
        ({"remove": "depth/val/2.png"}, "1 of 4 images in images/val have no depth map in depth/val, e.g. 2.png"),
        ({"wrong": "depth/val"}, r"none of the first 4 depth maps can be used: .*0.png \(The depth map is RGB"),
    ],
)
def test_mistakes_are_named_before_training(
    rooms: Path, encoders: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data, given = Path(shutil.copytree(rooms, tmp_path / "data")), dict(changes)
    if name := given.pop("remove", None):
        (data / name).unlink()
    if name := given.pop("wrong", None):
        for path in (data / name).iterdir():
            Image.new("RGB", (48, 40)).save(path)
    with pytest.raises(ValueError, match=message):
        prepare(settings_for(encoders["equissl"], data, tmp_path, **given))
