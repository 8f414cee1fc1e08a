"""EquiSSLForImageClassification: pooling, loss, gradients, loading from and into encoders, kernels and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from hf_equissl.modeling import EquiSSLForImageClassification, EquiSSLModel

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
POOLINGS = {"cls": 32, "patches": 32, "cls_patches": 64, "invariant": 32, "equivariant": 16}


@pytest.fixture
def classifier(tiny_config, randomise):
    def build(pooling: str = "cls_patches", **overrides) -> EquiSSLForImageClassification:
        config = tiny_config(stem=True, pooling=pooling, num_register_tokens=2, num_labels=5, **overrides)
        return randomise(EquiSSLForImageClassification(config))

    return build


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_are_a_linear_map_of_the_pooled_tokens(classifier, pooling: str, late: int) -> None:
    model, images = classifier(pooling, cls_insertion_layer=late), torch.randn(2, 3, 48, 64)
    tokens = model.equissl(images).last_hidden_state
    cls, patches = tokens[:, 0], tokens[:, 3:].mean(1)
    pooled = {"cls": (cls,), "patches": (patches,), "cls_patches": (cls, patches)}.get(pooling)
    if pooled is None:
        # Feature by feature, then the mean: the classifier takes the mean first.
        features = getattr(model.equissl(images), f"{pooling}_features")
        pooled = (features[:, 0], features[:, 1:].mean(1))
    expected = model.classifier(torch.cat(pooled, dim=1))
    assert model.classifier.in_features == POOLINGS[pooling]
    torch.testing.assert_close(model(images).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_gets_a_gradient(classifier, pooling: str) -> None:
    model = classifier(pooling, decoder_type="conv", layerscale_value=0.1).train()
    output = model(torch.randn(4, 3, 64, 64), labels=torch.tensor([0, 1, 4, 2]))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 4, 2])))
    output.loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert without == {"equissl.embeddings.mask_token"}  # zero, not None: it is part of the graph
    assert model.equissl.embeddings.mask_token.grad is not None


@pytest.mark.parametrize(
    ("settings", "labels", "expected"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0]), nn.functional.mse_loss),
        ({"num_labels": 3}, torch.eye(3)[:2], nn.functional.binary_cross_entropy_with_logits),
        ({"num_labels": 3}, torch.tensor([2, 0]), nn.functional.cross_entropy),
    ],
    ids=["regression", "several-labels", "one-label"],
)
def test_losses_of_the_problem_types(tiny_config, settings, labels, expected) -> None:
    model = EquiSSLForImageClassification(tiny_config(**settings))
    output = model(torch.randn(2, 3, 64, 64), labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits.squeeze(-1), labels))


def test_the_loss_of_accumulated_batches_is_that_of_the_whole(classifier) -> None:
    # What the Trainer hands over: each micro-batch divides by the number of all.
    model, images, labels = classifier(), torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 4, 2])
    parts = [model(images[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=4).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), model(images, labels=labels).loss)


def test_work_that_the_pooling_does_not_need_is_not_done(classifier, monkeypatch) -> None:
    seen = {}

    def spy(model: nn.Module) -> None:
        forward = model.equissl.forward

        def record(*args, **kwargs):
            seen["output"] = forward(*args, **kwargs)
            return seen["output"]

        monkeypatch.setattr(model.equissl, "forward", record)

    spy(model := classifier("cls"))
    model(torch.randn(1, 3, 64, 64))
    assert seen["output"].last_hidden_state.shape == (1, 3, 32)
    spy(model := classifier("invariant"))
    model(torch.randn(1, 3, 64, 64))
    assert seen["output"].invariant_features is None
    assert seen["output"].last_hidden_state.shape == (1, 19, 32)


def test_hidden_states_attentions_and_tuples(classifier) -> None:
    model, images = classifier(attn_implementation="eager"), torch.randn(2, 3, 64, 64)
    output = model(images, labels=torch.tensor([0, 1]), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 19, 32)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 19, 19)] * 3
    as_tuple = model(images, labels=torch.tensor([0, 1]), return_dict=False)
    torch.testing.assert_close(as_tuple, (output.loss, output.logits), **TOLERANCE)
    model.config.return_dict = False
    torch.testing.assert_close(model(images)[0], output.logits, **TOLERANCE)


@pytest.mark.parametrize("pooling", ["cls_patches", "invariant"])
def test_from_an_encoder_and_back(tmp_path: Path, tiny_config, randomise, pooling: str) -> None:
    encoder = randomise(EquiSSLModel(tiny_config(stem=True, decoder_type="conv")))
    encoder.save_pretrained(tmp_path / "encoder")
    model, report = AutoModelForImageClassification.from_pretrained(
        tmp_path / "encoder", id2label={0: "cat", 1: "dog"}, pooling=pooling, output_loading_info=True
    )
    assert type(model) is EquiSSLForImageClassification
    # What the classifier does not read stays in the file without a word.
    assert {name: set(keys) for name, keys in report.items() if keys} == {
        "missing_keys": {"classifier.weight", "classifier.bias"}
    }
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.classifier.out_features == 2
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.equissl.decoder is None
    assert (model.equissl.stem is None) == (pooling == "cls_patches")

    model.save_pretrained(tmp_path / "classifier")
    images = torch.randn(2, 3, 48, 64)
    again, report = EquiSSLForImageClassification.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(report.values())
    assert again.config.pooling == pooling
    torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=0)
    inner, report = EquiSSLModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(inner(images).last_hidden_state, encoder(images).last_hidden_state, rtol=0, atol=0)
    assert not [name for name in load_file(tmp_path / "classifier" / "model.safetensors") if "decoder" in name]


def test_building_one_leaves_the_configuration_as_it_was(tiny_config) -> None:
    config = tiny_config(stem=True, decoder_type="conv")
    EquiSSLForImageClassification(config)
    assert (config.decoder_type, config.feature_size) == ("conv", 24)


@pytest.mark.parametrize("pooling", ["invariant", "equivariant"])
def test_a_slice_of_the_stem_needs_a_stem(tmp_path: Path, tiny_config, pooling: str) -> None:
    with pytest.raises(ValueError, match=rf"pooling='{pooling}' reads the stem.*choose pooling='cls'"):
        EquiSSLForImageClassification(tiny_config(pooling=pooling))
    EquiSSLModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads the stem"):
        EquiSSLForImageClassification.from_pretrained(tmp_path, pooling=pooling)
    with pytest.raises(ValueError, match="pooling='mean': expected one of cls, patches"):
        EquiSSLForImageClassification.from_pretrained(tmp_path, pooling="mean")


def test_kernels_checkpointing_and_stochastic_depth(classifier) -> None:
    model, images, results = classifier(drop_path_rate=0.2).train(), torch.randn(4, 3, 64, 64), []
    for implementation, checkpointing in (("eager", False), ("sdpa", False), ("sdpa", True)):
        model.set_attn_implementation(implementation)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(images, labels=torch.tensor([0, 1, 4, 2])).loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_loading_options(tmp_path: Path, classifier, device_map: str) -> None:
    model, images = classifier(), torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path, dtype="bfloat16", device_map=device_map, attn_implementation="eager"
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == loaded.equissl.encoder.config._attn_implementation == "eager"
    assert loaded(images).logits.dtype == torch.bfloat16  # the encoder casts fp32 images itself
    torch.testing.assert_close(loaded(images).logits.float(), model(images).logits, atol=0.2, rtol=0.1)


def test_input_embeddings_are_found(classifier) -> None:
    assert classifier().get_input_embeddings()(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 32)
