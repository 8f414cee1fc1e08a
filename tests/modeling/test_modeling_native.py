"""With equal weights, EquiSSLModel equals transformers' Dinov2Model and Dinov2WithRegistersModel."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_equissl.modeling import EquiSSLModel

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SHARED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layerscale_value")


@pytest.fixture(params=[0, 4], ids=["dinov2", "registers"])
def pair(request, tiny_config, randomise):
    """Our encoder, a native one with the same weights under the same names."""
    config = tiny_config(layerscale_value=1.0, num_register_tokens=request.param, attn_implementation="eager")
    fields = {name: getattr(config, name) for name in SHARED} | {"attn_implementation": "eager"}
    if request.param:
        native = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=request.param, **fields))
    else:
        native = Dinov2Model(Dinov2Config(**fields))
    ours = EquiSSLModel(config)
    ours.load_state_dict(randomise(native).state_dict(), strict=True)
    return ours.eval(), native


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 96), (32, 128)], ids=str)
def test_outputs_equal(pair, size: tuple[int, int], masked: bool) -> None:
    ours, native = pair
    images = torch.randn(2, 3, *size)
    mask = torch.rand(2, size[0] * size[1] // 256) < 0.4 if masked else None
    with torch.no_grad():
        found = ours(images, bool_masked_pos=mask, output_hidden_states=True, output_attentions=True)
        expected = native(images, bool_masked_pos=mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, **TOLERANCE)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    assert len(found.attentions) == len(expected.attentions) == 3
    for name in ("hidden_states", "attentions"):
        for ours_state, native_state in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours_state, native_state, **TOLERANCE)


def test_gradients_equal(pair) -> None:
    ours, native = pair
    images, mask = torch.randn(2, 3, 48, 64), torch.rand(2, 12) < 0.4
    for model in pair:
        model.train()
        model(images, bool_masked_pos=mask).last_hidden_state.square().mean().backward()
    gradients = dict(native.named_parameters())
    assert any(parameter.grad.abs().max() > 1e-3 for parameter in gradients.values())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, **TOLERANCE)
