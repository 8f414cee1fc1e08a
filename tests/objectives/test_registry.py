from __future__ import annotations

from dataclasses import replace

import pytest

from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, Objective, build_objective
from hf_equissl.utils.registry import Registry
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
    with pytest.raises(ValueError, match=r"Valid: .*cross_attention_reconstruction, .*reconstruction\b.*\.$"):
        build_objective(EQUIVARIANCE_OBJECTIVES, "reconstrution", tiny_config())


def test_an_unknown_argument_meets_its_nearest_and_all_valid_ones():
    with pytest.raises(ValueError, match=r"'variance_wieght'\. Did you mean 'variance_weight'\?.*covariance_weight"):
        build_objective(INVARIANCE_OBJECTIVES, "vicreg", tiny_config(), variance_wieght=1)


def test_a_missing_argument_is_named():
    class Demanding(EQUIVARIANCE_OBJECTIVES["reconstruction"]):
        def __init__(self, config, layer):
            super().__init__(config)

    with pytest.raises(ValueError, match="objective 'demanding': layer must be given"):
        build_objective(Registry("objective", Objective, {"demanding": Demanding}), "demanding", tiny_config())


@pytest.mark.parametrize("name", ["dino", "dinov2", "ibot"])
def test_arguments_of_parent_classes_are_known(name):
    objective = build_objective(INVARIANCE_OBJECTIVES, name, tiny_config(), num_prototypes=5, head_hidden_size=4)
    assert objective.head.prototypes.direction.shape == (5, 256)
    with pytest.raises(ValueError, match=r"'head_hiden_size'\. Did you mean 'head_hidden_size'\?"):
        build_objective(INVARIANCE_OBJECTIVES, name, tiny_config(), head_hiden_size=4)
    with pytest.raises(ValueError, match=r"num_prototypes: expected an integer, got '5'\. Write it without quotes"):
        build_objective(INVARIANCE_OBJECTIVES, name, tiny_config(), num_prototypes="5")


def test_what_only_one_of_them_has_is_no_argument_of_the_others():
    with pytest.raises(ValueError, match="unknown key 'patch_weight'"):
        build_objective(INVARIANCE_OBJECTIVES, "dino", tiny_config(), patch_weight=1.0)


def test_a_class_of_another_package_registers_itself():
    registry = Registry("objective", Objective, {})

    @registry.register("mine")
    class Mine(EQUIVARIANCE_OBJECTIVES["reconstruction"]):
        pass

    assert type(build_objective(registry, "mine", tiny_config())) is Mine
    assert registry.register("mine")(Mine) is Mine  # a module that is imported twice
    with pytest.raises(ValueError, match=r"The objective 'mine' exists: .*Mine\. Choose another name"):
        registry.register("mine")(INVARIANCE_OBJECTIVES["vicreg"])
    with pytest.raises(ValueError, match="dict is no objective: it has to derive from Objective"):
        registry.register("other")(dict)


def test_features_without_a_stem_are_invariant_throughout():
    features = replace(random_features(tiny_config(), make_views(Needs())), stem=None)
    assert features.invariant(features.cls) is not None
    assert features.invariant(features.tokens) is features.tokens
    with pytest.raises(ValueError, match="feature_size"):
        features.equivariant(features.patches)
