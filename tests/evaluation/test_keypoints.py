"""PCKh on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from hf_equissl.evaluation.keypoints import pckh


def test_known_answers() -> None:
    truth = np.random.default_rng(0).uniform(0, 100, (3, 4, 2))
    visible, heads = np.ones((3, 4)), np.array([10.0, 20.0, 40.0])
    seven = np.array([7, 0])
    assert pckh(truth, truth, visible, heads) == 1
    # All moved by 7 pixels: more than half of 10, less than half of 20 and of 40.
    assert pckh(truth + seven, truth, visible, heads) == pytest.approx(2 / 3)
    assert pckh(truth + np.array([3, 4]), truth, visible, heads) == 1  # exactly half of 10
    assert pckh(truth + 50, truth, visible, heads) == 0
    assert pckh(truth + seven, truth, visible, heads, threshold=1) == 1
    # Points that nobody labelled, people without a head, and points that are left out do not count.
    wrong = truth.copy()
    wrong[0, 1] += 99
    assert pckh(wrong, truth, visible, heads) == pytest.approx(11 / 12)
    visible[0, 1] = 0
    assert pckh(wrong, truth, visible, heads) == 1
    wrong[2] += 99
    assert pckh(wrong, truth, visible, heads) == pytest.approx(7 / 11)
    assert pckh(wrong, truth, visible, heads * (1, 1, 0)) == 1
    wrong[1, 3] += 99
    assert pckh(wrong, truth, visible, heads * (1, 1, 0), left_out=(3,)) == 1
    with pytest.raises(ValueError, match="PCKh is undefined"):
        pckh(truth, truth, 0 * visible, heads)
