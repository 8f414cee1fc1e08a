from __future__ import annotations

from dataclasses import replace

import pytest

from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, build_objective
from hf_equissl.views.needs import Needs

from .helpers import make_views, random_features, tiny_config


def test_arguments_reach_the_objective():
    objective = build_objective(
        INVARIANCE_OBJECTIVES, "vicreg", tiny_config(), covariance_weight=3, expander_sizes=(4,)
    )
    assert objective.covariance_weight == 3


def test_an_unknown_name_meets_its_nearest_and_all_valid_ones():
    with pytest.raises(ValueError, match=r"there is no 'vicrg'\. Did you mean 'vicreg'\? Valid: .*vicreg"):
        build_objective(INVARIANCE_OBJECTIVES, "vicrg", tiny_config())
    with pytest.raises(ValueError, match=r"Valid: cross_attention_reconstruction, reconstruction\.$"):
        build_objective(EQUIVARIANCE_OBJECTIVES, "reconstrution", tiny_config())


def test_an_unknown_argument_meets_its_nearest_and_all_valid_ones():
    with pytest.raises(ValueError, match=r"'variance_wieght'\. Did you mean 'variance_weight'\?.*covariance_weight"):
        build_objective(INVARIANCE_OBJECTIVES, "vicreg", tiny_config(), variance_wieght=1)


def test_a_missing_argument_is_named():
    class Demanding(EQUIVARIANCE_OBJECTIVES["reconstruction"]):
        def __init__(self, config, layer):
            super().__init__(config)

    with pytest.raises(ValueError, match="needs a value for layer"):
        build_objective({"demanding": Demanding}, "demanding", tiny_config())


def test_features_without_a_stem_are_invariant_throughout():
    features = replace(random_features(tiny_config(), make_views(Needs())), stem=None)
    assert features.invariant(features.cls) is not None
    assert features.invariant(features.tokens) is features.tokens
    with pytest.raises(ValueError, match="feature_size"):
        features.equivariant(features.patches)
