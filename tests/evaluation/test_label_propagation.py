"""Masks follow features from frame to frame: J and F in known cases, and videos whose answer is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import build_evaluator
from hf_equissl.evaluation.label_propagation import carry_labels
from hf_equissl.evaluation.video_data import VideoData
from hf_equissl.evaluation.video_metrics import contour_accuracy, mask_boundary, region_similarity
from hf_equissl.training import probe
from tests.finetuning.conftest import equissl, save

SIDE, PATCH, LENGTH = 48, 4, 6


def square(left: int, top: int, side: int = 12, size: int = SIDE) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of a red square that moves right and a green one that moves up, on blue; masks are palettes."""
    root = tmp_path_factory.mktemp("davis")
    for name, speed in (("slow", PATCH), ("still", 0)):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for number in range(LENGTH):
            picture = np.full((SIDE, SIDE, 3), (20, 20, 200), np.uint8)
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for value, region in ((1, square(4 + speed * number, 8)), (2, square(28, 32 - speed * number))):
                picture[region] = (220, 20, 20) if value == 1 else (20, 220, 20)
                mask[region] = value
            Image.fromarray(picture).save(root / "JPEGImages" / "480p" / name / f"{number:05}.png")
            image = Image.fromarray(mask, mode="P")
            image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0] + [0] * 759)
            image.save(root / "Annotations" / "480p" / name / f"{number:05}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("slow\n")
    (root / "ImageSets" / "2017" / "train.txt").write_text("still\nslow\n")
    return root


class Patches(nn.Module):
    """A map of what each patch shows: its mean colour, or always the same."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def forward(self, pixel_values: Tensor) -> Tensor:
        colours = F.avg_pool2d(pixel_values, PATCH)
        return colours if self.knows else torch.ones_like(colours)


def encoder_of(knows: bool = True) -> FrozenEncoder:
    return FrozenEncoder(Patches(knows), image_size=SIDE, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def test_region_similarity_of_known_cases() -> None:
    mask = square(10, 10)
    assert region_similarity(mask, mask) == 1
    assert region_similarity(mask, square(11, 10)) == pytest.approx(11 / 13)  # one of twelve columns on either side
    assert region_similarity(mask, square(30, 30)) == 0
    empty = torch.zeros_like(mask)
    assert region_similarity(mask, empty) == region_similarity(empty, mask) == 0
    assert region_similarity(empty, empty) == 1
    with pytest.raises(ValueError, match=r"Masks must both be \(H, W\), got \(48, 48\) and \(48, 40\)"):
        region_similarity(mask, mask[:, :40])


def slow_contour_accuracy(predicted: np.ndarray, true: np.ndarray, reach: int) -> float:
    """F by dilation with a disk, pixel by pixel."""

    def boundary(mask: np.ndarray) -> set[tuple[int, int]]:
        height, width = mask.shape
        around = ((0, 1), (1, 0), (1, 1))
        inside = [(y, x) for y in range(height) for x in range(width)]
        return {
            (y, x)
            for y, x in inside
            for down, right in around
            if y + down < height and x + right < width and mask[y, x] != mask[y + down, x + right]
        }

    ours, theirs = boundary(predicted), boundary(true)

    def share(points: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        steps = range(-reach, reach + 1)
        disk = [(a, b) for a in steps for b in steps if a * a + b * b <= reach * reach]
        return sum(any((y + a, x + b) in others for a, b in disk) for y, x in points) / len(points)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / max(precision + recall, 1e-12)


def test_contour_accuracy_of_known_cases() -> None:
    mask, empty = square(10, 10), torch.zeros(SIDE, SIDE)
    assert contour_accuracy(mask, mask) == 1
    assert contour_accuracy(mask, square(11, 10)) == 1  # within ceil(0.008 * 67.9) = 1 pixel
    assert contour_accuracy(mask, square(32, 32)) == 0
    assert contour_accuracy(empty, empty) == 1
    assert contour_accuracy(mask, empty) == contour_accuracy(empty, mask) == 0
    assert int(mask_boundary(mask).sum()) == 4 * 12
    assert not mask_boundary(torch.ones(5, 5)).any()
    rng = np.random.default_rng(0)
    for tolerance, reach in ((0.008, 1), (0.06, 3)):  # of a diagonal of 40 pixels, rounded up
        masks = [rng.random((24, 32)) < 0.05 for _ in range(2)]
        found = contour_accuracy(*map(torch.from_numpy, masks), tolerance=tolerance)
        assert found == pytest.approx(slow_contour_accuracy(*masks, reach))
        assert 0 < found < 1


def test_labels_are_carried_as_written_down() -> None:
    """Against a loop over tokens in float64; the size of blocks changes nothing."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, radius, top_k, temperature = 5, 4, 2, 3, 0.1
    features = F.normalize(torch.randn(6, rows, columns, generator=generator, dtype=torch.float64), dim=0)
    sources = F.normalize(torch.randn(3, 6, rows, columns, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.rand(3, 2, rows, columns, generator=generator, dtype=torch.float64)
    expected = torch.zeros(2, rows, columns, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            near = []
            for m in range(3):
                for a in range(max(0, y - radius), min(rows, y + radius + 1)):
                    for b in range(max(0, x - radius), min(columns, x + radius + 1)):
                        near.append((float(features[:, y, x] @ sources[m, :, a, b]), labels[m, :, a, b]))
            best = sorted(near, key=lambda pair: -pair[0])[:top_k]
            weights = np.exp(np.array([cosine for cosine, _ in best]) / temperature)
            expected[:, y, x] = sum(w * label for w, (_, label) in zip(weights / weights.sum(), best, strict=True))
    for block in (1, 150, 1 << 20):
        found = carry_labels(features, sources, labels, radius, top_k, temperature, block)
        torch.testing.assert_close(found, expected)


def test_masks_follow_what_the_features_show(folder: Path) -> None:
    data = VideoData.load(str(folder))
    assert [(video.name, video.objects, video.judged) for video in data.videos] == [("slow", (1, 2), (1, 2, 3, 4))]
    evaluator = build_evaluator("label_propagation", data, frame_size=SIDE, progress=False)
    evaluator.check(encoder_of())
    found = {record.metric: record for record in evaluator(encoder_of())}
    assert found["j_mean"].value > 0.96  # enlarged labels round the corners of a square: four of its 144 pixels
    assert found["f_mean"].value == 1
    assert found["j_and_f"].value == pytest.approx((found["j_mean"].value + 1) / 2)
    assert found["j_and_f"].primary
    assert found["j_and_f"].dataset == str(folder)
    assert found["j_and_f"].split == "val"
    assert [name for name, _, _ in found["j_and_f"].details["objects"][0]] == ["slow/1", "slow/2"]
    # The first mask where it is: each square has moved by 4, 8, 12, 16 pixels of its 12.
    j = np.mean([8 / 16, 4 / 20, 0, 0])
    f = np.mean([contour_accuracy(square(4, 8), square(4 + 4 * step, 8)) for step in (1, 2, 3, 4)])
    assert found["j_and_f_still"].value == pytest.approx((j + f) / 2, abs=0.01)
    blind = {record.metric: record.value for record in evaluator(encoder_of(knows=False))}
    assert blind["j_and_f"] < 0.6
    # Between two frames a square moves by one token, which a radius of one reaches.
    near = build_evaluator("label_propagation", data, frame_size=SIDE, radius=1, context=1, progress=False)
    assert next(iter(near(encoder_of()))).value > 0.96
    assert not evaluator.missing_seeds(encoder_of(), "video_segmentation", list(found.values()))


def test_videos_of_a_split_and_frames_that_are_no_squares(folder: Path) -> None:
    both = VideoData.load(str(folder), test_split="train")
    assert [video.name for video in both.videos] == ["still", "slow"]
    assert len(both.test) == 2 * LENGTH
    assert len(VideoData.load(str(folder), test_split="train", test_images=1).videos) == 1
    evaluator = build_evaluator("label_propagation", both)
    encoder = FrozenEncoder(
        equissl(patch_size=16, image_size=224), image_size=224, image_mean=[0.5] * 3, image_std=[1.0] * 3
    )
    assert evaluator._size(encoder, 854, 480) == (832, 480)  # as in DINO's protocol
    assert evaluator._size(encoder, 480, 854) == (480, 832)
    small = build_evaluator("label_propagation", both, frame_size=40, progress=False)
    assert small._size(encoder, 90, 60) == (48, 32)
    map_, size = small._map(encoder, Image.new("RGB", (90, 60)))
    assert (map_.shape, size) == ((32, 2, 3), (32, 48))


def test_the_command_runs_it_when_asked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = save(equissl(patch_size=8), tmp_path / "encoder")
    words = ["--encoder", encoder, "--data", str(folder), "--evaluators", "label_propagation"]
    probe.main([*words, "--output_dir", str(tmp_path / "out"), "--set", "label_propagation.frame_size=48"])
    assert "j_and_f_still" in (tmp_path / "out" / "results.md").read_text()
    assert "video_segmentation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "Annotations"), "there is no Annotations/. Expected the layout of DAVIS"),
        (lambda root: (root / "Annotations/480p/slow/00000.png").unlink(), "the first frame has no mask"),
        (
            lambda root: Image.new("L", (SIDE, SIDE)).save(root / "Annotations/480p/slow/00000.png"),
            "no object is marked in the first frame",
        ),
        (
            lambda root: Image.new("L", (9, 7)).save(root / "Annotations/480p/slow/00002.png"),
            "00002.png has 9 x 7 pixels, and its frame 48 x 48",
        ),
        (
            lambda root: Image.new("RGB", (SIDE, SIDE)).save(root / "Annotations/480p/slow/00000.png"),
            "00000.png: the mask is RGB",
        ),
        (
            lambda root: [(root / f"Annotations/480p/slow/{n:05}.png").unlink() for n in range(1, LENGTH - 1)],
            "no frame between the first and the last has a mask",
        ),
        (lambda root: (root / "ImageSets/2017/val.txt").write_text("fast\n"), "there is no such video"),
    ],
)
def test_mistakes_are_named_with_the_file(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "davis"))
    change(root)
    with pytest.raises(ValueError, match=message):
        VideoData.load(str(root))


def test_settings_and_splits_that_mean_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--test_split vall: .* Did you mean 'val'"):
        VideoData.load(str(folder), test_split="vall")
    data = VideoData.load(str(folder))
    with pytest.raises(ValueError, match="top_k is 0: expected 1 or more"):
        build_evaluator("label_propagation", data, top_k=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        build_evaluator("label_propagation", data, temperature=0.0)
    with pytest.raises(ValueError, match="no map"):
        build_evaluator("label_propagation", data).check(FrozenEncoder(nn.Flatten(), image_size=SIDE))
