"""EquiSSLModel: features, masks, late CLS, attention kernels, checkpointing, precision and wrong inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_equissl.modeling import EquiSSLModel, EquiSSLStem
from hf_equissl.modeling.layers_equissl import EquiSSLDropPath

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def test_features_are_the_two_parts_of_the_stem(tiny_config, randomise) -> None:
    model = randomise(EquiSSLModel(tiny_config(stem=True, num_register_tokens=2)))
    output = model(torch.randn(2, 3, 64, 64))
    assert model.num_prefix_tokens == 3
    assert output.last_hidden_state.shape == (2, 3 + 16, 32)
    tokens = torch.cat((output.last_hidden_state[:, :1], output.last_hidden_state[:, 3:]), dim=1)
    expected = tokens @ model.stem.weight.T + model.stem.bias  # (2, 17, 24)
    torch.testing.assert_close(output.invariant_features, expected[..., :16], **TOLERANCE)
    torch.testing.assert_close(output.equivariant_features, expected[..., 16:], **TOLERANCE)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0])
    without = model(torch.randn(2, 3, 64, 64), output_features=False)
    assert without.invariant_features is None
    assert without.equivariant_features is None


def test_without_a_stem_there_are_no_features(tiny_config) -> None:
    output = EquiSSLModel(tiny_config()).eval()(torch.randn(1, 3, 64, 64))
    assert output.invariant_features is None
    assert output.equivariant_features is None


def test_stem_parts_are_slices_and_get_their_own_gradient() -> None:
    stem, tokens = EquiSSLStem(6, 5, 2), torch.randn(3, 6)
    both = stem(tokens)
    torch.testing.assert_close(stem(tokens, part="invariant"), both[:, :3])
    torch.testing.assert_close(stem(tokens, part="equivariant"), both[:, 3:])
    stem(tokens, part="equivariant").sum().backward()
    assert stem.weight.grad[:3].abs().max() == 0
    assert (stem.weight.grad[3:].abs().sum(1) > 0).all()
    with pytest.raises(ValueError, match="part='equi'"):
        stem(tokens, part="equi")


@pytest.mark.parametrize("registers", [0, 2])
def test_late_cls_equals_blocks_applied_by_hand(tiny_config, randomise, registers: int) -> None:
    config = tiny_config(cls_insertion_layer=2, num_register_tokens=registers)
    model = randomise(EquiSSLModel(config))
    assert model.embeddings.position_embeddings.shape == (1, 16, 32)
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 16) < 0.3
    with torch.no_grad():
        output = model(images, bool_masked_pos=mask, output_hidden_states=True)
        patches = model.embeddings.patch_embeddings.projection(images).flatten(2).transpose(1, 2)
        patches[mask] = model.embeddings.mask_token[0]
        states = [patches + model.embeddings.position_embeddings]
        for layer in model.encoder.layer[:2]:
            states.append(layer(states[-1]))
        prefix = [model.embeddings.cls_token.expand(2, -1, -1)]
        if registers:
            prefix.append(model.embeddings.register_tokens.expand(2, -1, -1))
        last = model.encoder.layer[2](torch.cat((*prefix, states[-1]), dim=1))
    assert [state.shape[1] for state in output.hidden_states] == [16, 16, 16, 17 + registers]
    for found, expected in zip(output.hidden_states, (*states, last), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(output.last_hidden_state, model.layernorm(last), **TOLERANCE)


def test_late_cls_at_other_sizes(tiny_config) -> None:
    model = EquiSSLModel(tiny_config(cls_insertion_layer=1)).eval()
    assert model(torch.randn(1, 3, 32, 96)).last_hidden_state.shape == (1, 13, 32)


def test_positions_of_a_non_square_training_size(tiny_config, randomise) -> None:
    model = randomise(EquiSSLModel(tiny_config(image_size=(32, 96))))
    torch.testing.assert_close(
        model.embeddings.interpolate_patch_positions((2, 6)), model.embeddings.position_embeddings[:, 1:]
    )
    assert model(torch.randn(1, 3, 96, 32)).last_hidden_state.shape == (1, 13, 32)


def test_selected_hidden_states(tiny_config) -> None:
    output = EquiSSLModel(tiny_config()).eval()(torch.randn(1, 3, 64, 64), output_hidden_states=[2])
    assert [state is not None for state in output.hidden_states] == [False, False, True, False]


def test_sdpa_equals_eager(tiny_config, randomise) -> None:
    model, images = randomise(EquiSSLModel(tiny_config(num_register_tokens=1))), torch.randn(2, 3, 48, 96)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model(images).last_hidden_state)
    torch.testing.assert_close(*outputs, **TOLERANCE)


@pytest.mark.parametrize(("late", "mode"), [(0, "linear"), (1, "linear"), (0, "uniform")])
def test_checkpointing_leaves_gradients_as_they_are(tiny_config, late: int, mode: str) -> None:
    # Stochastic depth in the blocks: recomputation has to draw the same numbers.
    model = EquiSSLModel(
        tiny_config(stem=True, drop_path_rate=0.3, drop_path_mode=mode, cls_insertion_layer=late)
    ).train()
    images, results = torch.randn(4, 3, 64, 64), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        output = model(images, output_hidden_states=True)
        (output.equivariant_features.square().mean() + output.hidden_states[1].square().mean()).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    assert sum(bool(gradient.abs().max() > 0) for gradient in results[0]) > 40
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("mask", [None, torch.zeros(2, 16, dtype=torch.bool)], ids=["no-mask", "empty-mask"])
def test_every_parameter_gets_a_gradient_without_masked_patches(tiny_config, mask, late: int) -> None:
    config = tiny_config(num_register_tokens=2, layerscale_value=0.1, cls_insertion_layer=late)
    model = EquiSSLModel(config).train()
    model(torch.randn(2, 3, 64, 64), bool_masked_pos=mask).last_hidden_state.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.embeddings.mask_token.grad.abs().max() == 0


def test_the_mask_token_changes_nothing_without_a_mask(tiny_config, randomise) -> None:
    model, images = randomise(EquiSSLModel(tiny_config())), torch.randn(2, 3, 64, 64)
    outputs = [model.train(mode)(images).last_hidden_state for mode in (False, True)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_drop_path_rates_rise_linearly_or_are_uniform(tiny_config) -> None:
    linear = EquiSSLModel(tiny_config(drop_path_rate=0.2))
    assert [layer.drop_path.rate for layer in linear.encoder.layer] == pytest.approx([0.0, 0.1, 0.2])
    assert not any(layer.drop_path.exact for layer in linear.encoder.layer)
    uniform = EquiSSLModel(tiny_config(drop_path_rate=0.2, drop_path_mode="uniform"))
    assert [layer.drop_path.rate for layer in uniform.encoder.layer] == [0.2, 0.2, 0.2]
    assert all(layer.drop_path.exact for layer in uniform.encoder.layer)


@pytest.mark.parametrize("exact", [False, True])
def test_drop_path_drops_whole_samples_and_keeps_the_expectation(exact: bool) -> None:
    rate = 0.3
    drop_path, hidden, seen = EquiSSLDropPath(rate, exact).train(), torch.zeros(20_000, 2, 3), []

    def branch(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.ones_like(x)

    output = drop_path(hidden, branch)
    kept = output[:, 0, 0] != 0
    assert torch.equal(output, torch.where(kept, 1 / (1 - rate), 0.0)[:, None, None].expand_as(output))
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.01)
    assert output.mean().item() == pytest.approx(1, abs=0.02)
    if exact:
        assert seen == [14_000] == [int(kept.sum())]  # what is dropped was not computed
        assert not torch.equal(kept, drop_path(hidden, branch)[:, 0, 0] != 0)
    assert torch.equal(drop_path.eval()(hidden, branch), torch.ones_like(hidden))


def test_drop_path_of_one_image_keeps_it() -> None:
    assert torch.equal(
        EquiSSLDropPath(0.9, exact=True).train()(torch.zeros(1, 1, 1), torch.ones_like), torch.ones(1, 1, 1)
    )


def test_without_layer_scale_or_mask_token_there_are_no_such_weights(tiny_config) -> None:
    names = EquiSSLModel(tiny_config(use_mask_token=False)).state_dict()
    assert not [name for name in names if "layer_scale" in name or "mask_token" in name or "register" in name]


def test_initialisation(tiny_config) -> None:
    config = tiny_config(stem=True, hidden_size=128, num_register_tokens=4, layerscale_value=1e-5, decoder_type="conv")
    state = EquiSSLModel(config).state_dict()
    assert state["embeddings.mask_token"].abs().max() == 0
    assert (state["encoder.layer.0.layer_scale1.lambda1"] == 1e-5).all()
    weights = ["position_embeddings", "register_tokens", "patch_embeddings.projection.weight"]
    weights = [f"embeddings.{name}" for name in weights] + ["stem.weight", "decoder.branches.1.convs.0.weight"]
    for name in (*weights, "encoder.layer.2.mlp.fc1.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1), name
    biases = [name for name in state if name.endswith("bias")]
    assert len(biases) > 20
    assert all(state[name].abs().max() == 0 for name in biases)


def test_bfloat16(tiny_config) -> None:
    model = EquiSSLModel(tiny_config(stem=True, decoder_type="conv")).eval()
    images = torch.randn(2, 3, 48, 64)
    expected = model(images).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(images).last_hidden_state
    torch.testing.assert_close(autocast.float(), expected, atol=0.1, rtol=0.1)
    model.bfloat16()
    output = model(images)  # the encoder casts fp32 images itself
    assert output.equivariant_features.dtype == torch.bfloat16
    torch.testing.assert_close(output.last_hidden_state.float(), expected, atol=0.1, rtol=0.1)
    assert model.reconstruct(images, images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"expected a tensor \(B, C, H, W\), got \(3, 64, 64\)"),
        ([1, 2], "got list"),
        (torch.zeros(1, 1, 64, 64), "1 channels, expected num_channels=3"),
        (torch.zeros(1, 3, 64, 60), "64 x 60 pixels, expected multiples of patch_size=16"),
        (torch.zeros(1, 3, 0, 64), "0 x 64 pixels"),
    ],
)
def test_wrong_images(tiny_config, images, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquiSSLModel(tiny_config())(images)


@pytest.mark.parametrize("mask", [torch.zeros(1, 15).bool(), torch.zeros(1, 16), torch.zeros(1, 4, 4).bool()])
def test_wrong_masks(tiny_config, mask) -> None:
    with pytest.raises(ValueError, match=r"torch.bool tensor \(B, N\) = \(1, 16\)"):
        EquiSSLModel(tiny_config())(torch.zeros(1, 3, 64, 64), bool_masked_pos=mask)


def test_a_mask_needs_a_mask_token(tiny_config) -> None:
    model = EquiSSLModel(tiny_config(use_mask_token=False))
    with pytest.raises(ValueError, match="set use_mask_token=True"):
        model(torch.zeros(1, 3, 64, 64), bool_masked_pos=torch.zeros(1, 16).bool())


def test_input_embeddings_give_a_tensor(tiny_config) -> None:
    # PEFT and activation checkpointing hook the module and expect a tensor from it.
    model = EquiSSLModel(tiny_config())
    assert isinstance(model.get_input_embeddings(), nn.Module)
    assert model.get_input_embeddings()(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 32)


@pytest.mark.parametrize("overrides", [{}, {"num_register_tokens": 2, "layerscale_value": 0.1}])
def test_without_patches_cls_and_registers_are_the_same(tiny_config, randomise, overrides: dict) -> None:
    model, results = randomise(EquiSSLModel(tiny_config(stem=True, **overrides))).train(), []
    images = torch.randn(3, 3, 64, 64)
    for output_patches in (True, False):
        model.zero_grad()
        output = model(images, output_patches=output_patches)
        cls = output.pooler_output
        (cls * torch.linspace(-1, 1, cls.numel()).view_as(cls)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "stem" not in name}
        results.append((output, {name: gradient.clone() for name, gradient in gradients.items()}))
    (full, expected), (short, actual) = results
    prefix = 1 + overrides.get("num_register_tokens", 0)
    torch.testing.assert_close(short.last_hidden_state, full.last_hidden_state[:, :prefix], **TOLERANCE)
    torch.testing.assert_close(short.invariant_features, full.invariant_features[:, :1], **TOLERANCE)
    assert len(expected) > 20
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
