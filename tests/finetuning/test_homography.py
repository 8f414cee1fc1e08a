"""Homography estimation: pairs are what they say, MCE is known in known cases, and the task beats standing still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.finetuning import FineTuningSettings, load_finetuned, prepare, train
from hf_equissl.finetuning.run import build_trainer
from hf_equissl.finetuning.tasks.base import EncoderInput
from hf_equissl.finetuning.tasks.corner_pairs import (
    FRAME,
    fit_homography,
    is_convex,
    make_pair,
    mean_corner_error,
    patch_corners,
    project,
)
from hf_equissl.finetuning.tasks.homography import HomographyTask

from .conftest import equissl, save

# The mean length of (x, y) with both of -32 ... 32 alike: what saying that nothing moves costs on the whole.
STEPS = np.arange(-32, 33)
STANDING_STILL = np.hypot(STEPS[:, None], STEPS).mean()


def bound(size: int = 128, **options: Any) -> HomographyTask:
    """The task, ready to transform."""
    task = HomographyTask(**options)
    settings = FineTuningSettings(encoder="e", data="d", output_dir="o")
    task.bind(settings, EncoderInput(size, (0.5,) * 3, (0.25,) * 3))
    return task


def test_homographies_are_found_from_four_points_and_from_many() -> None:
    true = np.array([[1.1, 0.05, 4.0], [-0.1, 0.9, -7.0], [1e-3, -5e-4, 1.0]])
    points = np.random.default_rng(0).uniform(0, 128, (30, 2))
    x, y = points.T
    below = 1e-3 * x - 5e-4 * y + 1
    moved = np.stack([(1.1 * x + 0.05 * y + 4) / below, (-0.1 * x + 0.9 * y - 7) / below], axis=1)
    assert np.allclose(project(true[None], points)[0], moved)
    for count in (4, 30):
        assert np.allclose(fit_homography(points[:count], moved[None, :count])[0], true, atol=1e-9)
    corners = patch_corners(128)
    assert np.allclose(fit_homography(corners, corners[None] + (3, -5))[0], [[1, 0, 3], [0, 1, -5], [0, 0, 1]])


def test_mean_corner_error_of_known_cases() -> None:
    corners = np.random.default_rng(0).uniform(-32, 32, (6, 4, 2))
    assert mean_corner_error(corners, corners) == 0
    assert mean_corner_error(corners + np.array([1, 0]), corners) == pytest.approx(1)
    assert mean_corner_error(corners + np.array([3, -4]), corners) == pytest.approx(5)
    one = corners.copy()
    one[0, 2] += (6, 8)  # one of 24 corners by ten pixels
    assert mean_corner_error(one, corners) == pytest.approx(10 / 24)
    for wrong in (corners[:0], corners[:, :3], corners[0]):
        with pytest.raises(ValueError, match=r"Corners must both be \(B, 4, 2\)"):
            mean_corner_error(wrong, wrong)
    assert pytest.approx(24.867, abs=1e-3) == STANDING_STILL
    frame = Image.new("L", FRAME)
    offsets = np.stack([make_pair(frame, 128, 32, np.random.default_rng(seed))[2] for seed in range(1000)])
    assert set(offsets.ravel()) == set(STEPS)
    assert mean_corner_error(np.zeros_like(offsets), offsets) == pytest.approx(STANDING_STILL, abs=0.5)


def test_the_second_patch_shows_at_p_what_the_image_shows_at_h_p() -> None:
    """Of two images whose grey values are x / 2 and y the second patch says, pixel by pixel, where it was read."""
    y, x = np.mgrid[0:240, 0:320] + 0.5
    for seed in range(5):
        rows = []
        for plane in (x / 2, y):
            frame = Image.fromarray(plane.astype(np.uint8))
            first, second, offsets = make_pair(frame, 128, 32, np.random.default_rng(seed))
            rows.append([np.asarray(first, float), np.asarray(second, float)])
        (left_half, seen_x), (top, seen_y) = rows
        middles = np.stack(np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5), axis=-1).reshape(-1, 2)
        corners = patch_corners(128)
        expected = project(fit_homography(corners, (corners + offsets)[None]), middles)[0].reshape(128, 128, 2)
        assert np.abs(seen_y - top[0, 0] - expected[..., 1]).max() < 1.6  # grey values are whole numbers
        assert np.abs(2 * (seen_x - left_half[0, 0]) - expected[..., 0]).max() < 3.2
        assert seen_y.min() > 0


def test_moved_corners_are_never_folded() -> None:
    """At any size of patches; where offsets were good at once, they are those that were drawn first."""
    corners = patch_corners(128)
    bow = corners[[0, 2, 1, 3]]
    dent, flat = corners.copy(), corners.copy()
    dent[0], flat[0] = (70, 70), (64, 64)
    assert is_convex(corners)
    assert [is_convex(one) for one in (bow, dent, flat, corners[::-1])] == 4 * [False]
    frame = Image.new("L", FRAME)
    redrawn = 0
    for side, rho in ((128, 32), (112, 32), (66, 32), (21, 10)):
        for seed in range(40):
            offsets = make_pair(frame, side, rho, np.random.default_rng(seed))[2]
            again = make_pair(frame, side, rho, np.random.default_rng(seed))[2]
            assert (offsets == again).all()
            assert is_convex(patch_corners(side) + offsets)
            assert np.abs(offsets).max() <= rho
            rng = np.random.default_rng(seed)
            _ = [rng.integers(rho, length - rho - side, endpoint=True) for length in frame.size]
            first = rng.integers(-rho, rho, (4, 2), endpoint=True)
            redrawn += bool((first != offsets).any())
            assert (first != offsets).any() != is_convex(patch_corners(side) + first)
    assert 5 < redrawn < 80


def test_pairs_follow_from_seed_and_number_alone() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320), np.uint8))

    def offsets(rng: Any = None, pair: int = 3, **options: Any) -> list[Any]:
        made = bound(**options).transform({"image": image, "pair": pair}, rng)
        assert (made["pixels"].shape, made["pixels"].dtype) == ((2, 3, 128, 128), torch.uint8)
        return made["offsets"].tolist()

    draw = np.random.default_rng
    assert offsets() == offsets(draw(5), fixed=True) == offsets(draw(6), fixed=True)
    others = [offsets(pair=4), offsets(pair_seed=1), offsets(draw(5)), offsets(draw(6))]
    assert all(one != other for i, one in enumerate([offsets(), *others]) for other in others[i:])


def test_the_true_field_has_no_error() -> None:
    task = bound(16)
    offsets = torch.from_numpy(np.random.default_rng(0).integers(-32, 33, (5, 4, 2))).float()
    corners, points = patch_corners(128), task._middles((4, 3))
    assert points[:2].tolist() == [[128 / 6, 16], [64, 16]]
    true = project(fit_homography(corners, corners + offsets.numpy()), points) - points
    field = torch.from_numpy(true / 32).float().transpose(1, 2).unflatten(2, (4, 3))
    predictions, targets = task.judge(field, {"offsets": offsets})
    assert task.measure(predictions, targets)["mce"] < 1e-3

    class Oracle(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return field + pixel_values

    batch = {"offsets": offsets, "pixel_values": torch.zeros(())}
    assert task.loss(Oracle(), batch).loss < 1e-6
    # Far from the knee smooth L1 is the distance less half a pixel, here in units of rho = 32.
    batch["pixel_values"] = torch.tensor(8 / 32)
    assert task.loss(Oracle(), batch).loss.item() == pytest.approx(7.5 / 32, abs=1e-6)


def test_it_learns_fixed_pairs_and_stands_beside_standing_still(photo_folder: Path, tmp_path: Path) -> None:
    encoder = save(equissl(patch_size=8), tmp_path / "encoder")
    settings = FineTuningSettings(
        encoder=encoder,
        data=str(photo_folder),
        output_dir=str(tmp_path / "run"),
        task="homography",
        task_options={"fixed": True},
        method="full",
        layer_decay=1.0,
        test_split="train",
        train_images=8,
        test_images=8,
        batch_size=8,
        epochs=80,
        eval_steps=80,
        save_steps=80,
        learning_rate=3e-3,
    )
    run = prepare(settings)
    before = build_trainer(run).evaluate()
    assert before["eval_mce"] == pytest.approx(before["eval_baseline_identity"], abs=1e-4)
    (record,) = train(run)
    assert record.details["baseline_identity"] == [before["eval_baseline_identity"]]
    assert record.value < before["eval_mce"] / 3
    table = (tmp_path / "run" / "results.md").read_text()
    assert "MCE px" in table
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == [
        record.text,
        f"{before['eval_mce']:.2f} px",
    ]
    pixels = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_finetuned(run.folder)(pixels), run.model.eval()(pixels))


def test_images_serve_for_more_pairs_and_bad_ones_are_counted(
    encoders: dict[str, str], photo_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "photos"
    data.mkdir()
    for path in sorted(photo_folder.iterdir())[:20]:
        (data / path.name).write_bytes(path.read_bytes())
    (data / "05.png").write_bytes(b"no image")
    settings = FineTuningSettings(
        encoder=encoders["dinov2"],
        data=str(data),
        output_dir=str(tmp_path / "run"),
        task="homography",
        task_options={"train_pairs": 40, "test_pairs": 7, "patch": 112},
        method="frozen",
        max_bad_share=0.5,
        batch_size=20,
    )
    run = prepare(settings)
    assert (len(run.splits.train), len(run.splits.test)) == (40, 7)
    names = [run.splits.train.item_name(index) for index in (0, 18, 36)]
    assert names[0] == names[1] == names[2]  # 18 of 20 images, two are held out
    trainer = build_trainer(run)
    trainer.train()
    assert any("05.png" in str(bad) for bad in trainer.skipped_images.bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_options": {"patch": 64}}, r"patch and rho \(--set\) are 64 and 32"),
        ({"task_options": {"patch": 224}}, "patch \\+ 2 rho of at most 240"),
        ({"task_options": {"test_pairs": 0}}, "test_pairs .* is 0: expected 1 or more"),
        ({"crop_scale": (0.5, 1.0)}, "--crop_scale .* homography estimation does not read it"),
        ({"method": "linear"}, "--method linear: for homography estimation there is no such method"),
        ({"batch_size": 40}, "is more than the 29 training images"),
    ],
)
def test_mistakes_are_named_before_training(
    encoders: dict[str, str], photo_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"task": "homography", "method": "frozen", "output_dir": str(tmp_path / "run"), **changes}
    with pytest.raises(ValueError, match=message):
        prepare(FineTuningSettings(encoder=encoders["equissl"], data=str(photo_folder), **given))
