"""EquiSSLBackbone: feature maps, stages, sizes, loading, kernels, and positions stored at another size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Backbone, Dinov2Config

from hf_equissl.modeling import EquiSSLBackbone, EquiSSLForImageClassification, EquiSSLModel

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("registers", [0, 2])
def test_feature_maps_are_the_patches_of_the_hidden_states(tiny_config, randomise, registers: int, late: int) -> None:
    config = tiny_config(num_register_tokens=registers, cls_insertion_layer=late, out_indices=[0, 1, 3])
    encoder = randomise(EquiSSLModel(config))
    backbone = EquiSSLBackbone(config).eval()
    backbone.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 48, 96)  # 3 x 6 patches
    output = backbone(images)
    states = encoder(images, output_hidden_states=True).hidden_states
    assert output.hidden_states is None
    assert backbone.channels == [32, 32, 32]
    for index, feature_map in zip((0, 1, 3), output.feature_maps, strict=True):
        prefix = 0 if late > 0 and index <= late else 1 + registers
        assert states[index].shape[1] == prefix + 18
        expected = encoder.layernorm(states[index][:, prefix:]).reshape(2, 3, 6, 32).permute(0, 3, 1, 2)
        torch.testing.assert_close(feature_map, expected, **TOLERANCE)
        assert feature_map.is_contiguous()


def test_equals_the_backbone_of_dinov2(tiny_config, randomise) -> None:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layerscale_value")
    config = tiny_config(layerscale_value=1.0, out_features=["stage1", "stage3"])
    fields = {name: getattr(config, name) for name in names}
    native = randomise(Dinov2Backbone(Dinov2Config(out_features=["stage1", "stage3"], **fields)))
    ours = EquiSSLBackbone(config).eval()
    ours.load_state_dict(native.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images).feature_maps, native(images).feature_maps, **TOLERANCE)


def test_flat_maps_without_the_norm(tiny_config, randomise) -> None:
    config = tiny_config(num_register_tokens=1, apply_layernorm=False, reshape_hidden_states=False)
    backbone = randomise(EquiSSLBackbone(config))
    output = backbone(torch.randn(2, 3, 32, 64), output_hidden_states=True)
    torch.testing.assert_close(output.feature_maps, (output.hidden_states[-1][:, 2:],))
    assert output.feature_maps[0].shape == (2, 8, 32)
    as_tuple = backbone(torch.randn(2, 3, 32, 64), return_dict=False)
    assert as_tuple[0][0].shape == (2, 8, 32)


def test_hidden_states_and_attentions_on_demand(tiny_config) -> None:
    backbone = EquiSSLBackbone(tiny_config(attn_implementation="eager")).eval()
    output = backbone(torch.randn(1, 3, 64, 64), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 17, 32)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, 17, 17)] * 3


def test_every_parameter_gets_a_gradient(tiny_config, randomise) -> None:
    config = tiny_config(stem=True, decoder_type="conv", num_register_tokens=2, layerscale_value=0.1)
    backbone = randomise(EquiSSLBackbone(config)).train()
    backbone(torch.randn(2, 3, 64, 64)).feature_maps[0].pow(3).mean().backward()
    without = {n for n, p in backbone.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert without == {"embeddings.mask_token"}


def test_loads_from_encoders_and_classifiers_without_a_word(tmp_path: Path, tiny_config, randomise) -> None:
    encoder = randomise(EquiSSLModel(tiny_config(stem=True, decoder_type="conv")))
    encoder.save_pretrained(tmp_path / "encoder")
    EquiSSLForImageClassification.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "classifier")
    images = torch.randn(2, 3, 64, 32)
    for source in ("encoder", "classifier"):
        backbone, report = EquiSSLBackbone.from_pretrained(
            tmp_path / source, out_indices=(1, -1), output_loading_info=True
        )
        assert not any(report.values())
        assert backbone.out_features == ["stage1", "stage3"]
        expected = encoder.layernorm(encoder(images, output_hidden_states=True).hidden_states[1])[:, 1:]
        torch.testing.assert_close(backbone(images).feature_maps[0].flatten(2).mT, expected, **TOLERANCE)
    backbone.save_pretrained(tmp_path / "backbone")
    again, report = EquiSSLBackbone.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(again(images).feature_maps, backbone(images).feature_maps)
    loaded, report = EquiSSLModel.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded(images).last_hidden_state, encoder(images).last_hidden_state)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_loading_options(tmp_path: Path, tiny_config, randomise, device_map: str) -> None:
    encoder, images = randomise(EquiSSLModel(tiny_config())), torch.randn(1, 3, 64, 64)
    encoder.save_pretrained(tmp_path)
    expected = EquiSSLBackbone.from_pretrained(tmp_path)(images).feature_maps[0]
    options = {"dtype": "bfloat16", "device_map": device_map, "attn_implementation": "eager"}
    backbone = EquiSSLBackbone.from_pretrained(tmp_path, **options)
    assert backbone.encoder.config._attn_implementation == "eager"
    feature_map = backbone(images).feature_maps[0]
    assert feature_map.dtype == torch.bfloat16
    torch.testing.assert_close(feature_map.float(), expected, atol=0.1, rtol=0.1)


def test_kernels_and_checkpointing(tiny_config, randomise) -> None:
    backbone = randomise(EquiSSLBackbone(tiny_config(num_register_tokens=1, out_indices=[1, 3]))).train()
    images, results = torch.randn(2, 3, 48, 64), []
    for implementation, checkpointing in (("eager", False), ("sdpa", False), ("sdpa", True)):
        backbone.set_attn_implementation(implementation)
        if checkpointing:
            backbone.activation_checkpointing_enable()
        backbone.zero_grad()
        sum(feature_map.pow(3).mean() for feature_map in backbone(images).feature_maps).backward()
        results.append([parameter.grad.clone() for parameter in backbone.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_unknown_stages_and_wrong_images(tiny_config) -> None:
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        tiny_config(out_features=["stage7"])
    with pytest.raises(ValueError, match="multiples of patch_size=16"):
        EquiSSLBackbone(tiny_config())(torch.zeros(1, 3, 64, 60))


@pytest.mark.parametrize("overrides", [{}, {"cls_insertion_layer": 1}, {"num_register_tokens": 2}], ids=str)
@pytest.mark.parametrize("kind", [EquiSSLModel, EquiSSLBackbone, EquiSSLForImageClassification])
def test_positions_stored_at_another_size_change_no_output(
    tmp_path: Path, tiny_config, randomise, kind, overrides: dict
) -> None:
    model, images = randomise(kind(tiny_config(**overrides))), torch.randn(2, 3, 48, 96)
    expected = model(images).to_tuple()[0]
    model.resize_positions((48, 96))
    embeddings = model.base_model.embeddings
    assert embeddings.position_embeddings.shape[1] == 18 + (0 if overrides.get("cls_insertion_layer") else 1)
    assert embeddings.interpolate_patch_positions((3, 6)).data_ptr() in {
        embeddings.position_embeddings.data_ptr(), embeddings.position_embeddings[:, 1:].data_ptr()
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    for one in (model, kind.from_pretrained(tmp_path)):
        torch.testing.assert_close(one(images).to_tuple()[0], expected, **TOLERANCE)
        assert tuple(one.config.image_size) == (48, 96)
    with pytest.raises(ValueError, match=r"image_size=\(48, 90\) is not a positive multiple of patch_size=16"):
        model.resize_positions((48, 90))
    assert tuple(model.config.image_size) == (48, 96)
