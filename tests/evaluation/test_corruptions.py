from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EvaluationData, ImageSet, build_evaluator
from hf_equissl.evaluation.corruptions import corrupt

from .conftest import PixelEncoder, coloured

library = pytest.importorskip("imagecorruptions", reason="the extra [corruptions] is not installed")
NAMES = library.get_corruption_names("common")


def test_an_image_is_corrupted_alike_wherever_it_stands() -> None:
    images = torch.from_numpy(np.stack(coloured(3, 0, 3, size=32)[0])).permute(0, 3, 1, 2)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in NAMES:
        made = corrupt(images, [5, 6, 7], name, 3)
        assert made.shape == images.shape
        assert made.dtype == torch.uint8
        assert torch.equal(corrupt(images[1:2], [6], name, 3)[0], made[1]), name
        assert not torch.equal(made, images), name
    assert len(NAMES) == 15
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_the_probe_of_clean_images_is_judged_on_corrupted_ones() -> None:
    data = EvaluationData(*(ImageSet(*coloured(60, seed, 3, size=32), progress=False) for seed in (0, 1)))
    evaluator = build_evaluator(
        "corruptions",
        data,
        solver="lbfgs",
        candidates=(1e-2,),
        corruptions=("brightness", "gaussian_noise"),
        severities=(1, 5),
        progress=False,
    )
    encoder = FrozenEncoder(PixelEncoder(), image_size=32)
    evaluator.check(encoder)
    record = evaluator(encoder)[0]
    assert (record.name, record.primary) == ("corruptions top1", True)
    assert set(record.details) == {"brightness", "gaussian_noise"}
    assert record.value == pytest.approx(sum(values[0] for values in record.details.values()) / 2)
    assert 0.3 < record.value < 1.0
    clean = build_evaluator("linear", data, solver="lbfgs", candidates=(1e-2,), features=("cls",))(encoder)[0]
    assert clean.value > record.value
    assert not evaluator.applies_to(data)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        evaluator.check(FrozenEncoder(PixelEncoder(), image_size=16))
    with pytest.raises(ValueError, match=r"corruptions \['fgo'\]"):
        build_evaluator("corruptions", data, corruptions=("fgo",))
