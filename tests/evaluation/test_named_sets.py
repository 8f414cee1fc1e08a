from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import NAMED_SETS, build_evaluator, cli, load_evaluation_data

from .conftest import PixelEncoder, coloured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, in ``train``, ``val`` and, without splits, in ``renditions``."""
    root = tmp_path_factory.mktemp("named")
    for place, count in (("train", 60), ("val", 30), ("../renditions", 12)):
        for number, (pixels, label) in enumerate(zip(*coloured(count, count, 3), strict=True)):
            target = root / "images" / place / "abc"[int(label)] / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    return root


def test_a_named_set_is_judged_by_its_own_metric(folder: Path) -> None:
    renditions = f"set:imagenet-r={folder / 'renditions'}"
    data = load_evaluation_data(f"set:pets={folder / 'images'}", further_tests=[[renditions]], progress=False)
    assert (data.metric, data.train.split, data.test.split) == ("mean_per_class", "train", "validation")
    assert data.test.dataset == str(folder / "images")
    assert [len(part) for part in (data.train, *data.tests)] == [60, 30, 12]
    encoder = FrozenEncoder(PixelEncoder(), image_size=8)
    records = build_evaluator("knn", data, k=3)(encoder)
    assert [(each.metric, each.primary, each.split) for each in records[:2]] == [
        ("top1", False, "validation"),
        ("mean_per_class", True, "validation"),
    ]
    plain = load_evaluation_data(f"set:cifar10={folder / 'images'}", progress=False)
    assert [each.metric for each in build_evaluator("knn", plain, k=3)(encoder)] == ["top1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "set:pet"], "Did you mean 'pets'"),
        (["--data", "set:inat18"], "set:inat18=/path/to/inat18"),
        (["--data", "set:imagenet-v2"], "is only judged on. Fit on ImageNet: --data set:imagenet --further_test"),
        (["--data", "set:pets=/no/such/folder"], "/no/such/folder"),
        (["--data", "{images}", "--further_test", "set:imagenet-c"], "set:imagenet-c=/path/to/imagenet-c"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [word.format(images=folder / "images") for word in words]
    with pytest.raises(SystemExit):
        cli.main([*words, "--encoder", "raw_pixels", "--image_size", "8", "--output_dir", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_every_set_says_where_it_is_and_by_what_it_is_judged() -> None:
    for name, each in NAMED_SETS.items():
        assert each.metric in ("top1", "mean_per_class"), name
        assert each.source.count("/") == (1 if each.source else 0), name
        assert each.source or each.note, name
        assert each.test_split, name
