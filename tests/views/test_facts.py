from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from hf_equissl.views.facts import ViewFacts, measure_draws
from hf_equissl.views.view_specs import PIPELINES, PipelineSpec


def test_statistics_are_those_of_the_augmentation() -> None:
    """Boxes against the estimates in ADevillers/EquiMod (``p_mean`` in ``src/main.py``, 32 px), others by formula."""
    spec = PIPELINES["vicreg"].override({"crop_scale": (0.2, 1.0)})
    means, deviations = measure_draws(spec.views, side=32)
    theirs = {"top": (4.3122, 3.9740), "left": (4.3216, 3.9851), "height": (23.369, 4.9544), "width": (23.374, 4.9539)}
    for name, (mean, deviation) in theirs.items():
        assert means[name] == pytest.approx(mean / 32, abs=0.01), name
        assert deviations[name] == pytest.approx(deviation / 32, abs=0.005), name
    factor = math.sqrt(0.8 * 0.8**2 / 12)  # uniform over a width of 0.8, in 4 of 5 images
    blurred, sigma, square = (1.0 + 0.1) / 2, (0.1 + 2.0) / 2, (2.0**3 - 0.1**3) / 3 / 1.9
    expected = {
        "flip": (0.5, 0.5),
        "jitter_applied": (0.8, 0.4),
        "brightness": (1.0, factor),
        "contrast": (1.0, factor),
        "saturation": (1.0, factor / 2),
        "hue": (0.0, factor / 4),
        "grayscale": (0.2, 0.4),
        "blur_applied": (blurred, math.sqrt(blurred * (1 - blurred))),
        "blur_sigma": (blurred * sigma, math.sqrt(blurred * square - (blurred * sigma) ** 2)),
        "solarize": (0.1, 0.3),
    }
    assert set(means) == set(deviations) == {*theirs, *expected}
    for name, (mean, deviation) in expected.items():
        assert means[name] == pytest.approx(mean, abs=0.06 * deviation), name
        assert deviations[name] == pytest.approx(deviation, rel=0.05), name


def test_what_never_changes_has_no_deviation_and_facts_go_through_json() -> None:
    view = replace(PIPELINES["center"].views[0], flip_probability=1.0)
    facts = ViewFacts.of(PipelineSpec((view, view)), None)
    assert not any(facts.deviations.values())
    assert (facts.means["flip"], facts.means["brightness"], facts.means["top"]) == (1.0, 1.0, 0.0)
    again = ViewFacts.of(PIPELINES["dino"], None, num_classes=3)
    assert ViewFacts.from_dict(json.loads(json.dumps(again.to_dict()))) == again
    assert again == ViewFacts.of(PIPELINES["dino"], None, num_classes=3)
