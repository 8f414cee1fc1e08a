"""EquiSSLConfig: presets, derived values, and combinations that make no network."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel, build_decoder

STEM = {"feature_size": 24, "equivariant_size": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 6}, "not divisible by num_attention_heads=6"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"mlp_ratio": -1}, "mlp_ratio=-1"),
        ({"image_size": 225}, "multiple of patch_size=16: choose e.g. image_size=224"),
        ({"image_size": [224, 100]}, "multiple of patch_size=16"),
        ({"image_size": 0}, "multiple of patch_size=16"),
        ({"num_register_tokens": -1}, "num_register_tokens=-1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"drop_path_mode": "cosine"}, "expected one of linear, uniform"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob"),
        ({"cls_insertion_layer": 12}, "expected 0 .* to 11"),
        ({"cls_insertion_layer": -1}, "cls_insertion_layer=-1"),
        ({"feature_size": 24}, "set both"),
        ({"equivariant_size": 8}, "set both"),
        ({"feature_size": 24, "equivariant_size": 24}, "expected 1 to 23"),
        ({"feature_size": 24, "equivariant_size": 0}, "expected 1 to 23"),
        ({"decoder_type": "conv"}, "no stem"),
        ({"decoder_type": "deconv", **STEM}, "None or one of conv, cross_attention"),
        ({"decoder_type": "conv", "num_intermediate_images": 0, **STEM}, "num_intermediate_images=0"),
        ({"decoder_type": "conv", "decoder_widths": [16, 8, 4], **STEM}, "needs 4 doublings"),
        ({"decoder_type": "conv", "decoder_widths": [16, 8, 4, 0], **STEM}, "above 0"),
        ({"decoder_type": "conv", "decoder_widths": [8, 8, 8], "patch_size": 14, **STEM}, "needs 4 doublings"),
        ({"decoder_type": "cross_attention", "decoder_num_heads": 7, **STEM}, "decoder_num_heads=7"),
        (
            {"decoder_type": "cross_attention", "decoder_hidden_size": 30, "decoder_num_heads": 3, **STEM},
            "multiple of 4",
        ),
        ({"decoder_type": "cross_attention", "decoder_num_layers": -1, **STEM}, "decoder_num_layers=-1"),
        ({"patch_size": [16, 8]}, "two equal sides"),
        ({"patch_size": [16]}, "two equal sides"),
        ({"pooling": "mean"}, "pooling='mean': expected one of cls, patches, cls_patches, invariant, equivariant"),
    ],
)
def test_impossible_combinations_raise_at_construction(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquiSSLConfig(**fields)


def test_a_newer_file_is_refused_before_its_fields_are_read(tmp_path) -> None:
    EquiSSLConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("equissl_version") == 1
    file.write_text(json.dumps(fields))
    assert EquiSSLConfig.from_pretrained(tmp_path).equissl_version == 1  # absent: the first form
    file.write_text(json.dumps({**fields, "equissl_version": 2, "hidden_size": "as wide as it takes"}))
    message = r"newer hf_equissl \(equissl_version=2; .* up to 1\)\. Upgrade it .* trust_remote_code=True"
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        EquiSSLConfig(equissl_version=2)
    file.write_text(json.dumps({**fields, "equissl_version": "1.5"}))
    with pytest.raises(ValueError, match="newer hf_equissl"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_pair_of_patch_sides_makes_the_same_network() -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64, **STEM}
    for decoder in ("conv", "cross_attention"):
        models = [
            EquiSSLModel(EquiSSLConfig(**fields, patch_size=p, decoder_type=decoder)).eval() for p in (16, [16] * 2)
        ]
        models[1].load_state_dict(models[0].state_dict())
        views = torch.randn(2, 1, 3, 64, 64)
        torch.testing.assert_close(models[1].reconstruct(*views), models[0].reconstruct(*views))
    assert [model.config.patch_side for model in models] == [16, 16]
    assert models[1].config.patch_size == [16, 16]


def test_fields_are_typed() -> None:
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        EquiSSLConfig(hidden_size="384")
    assert EquiSSLConfig(drop_path_rate=0, mlp_ratio=4.0, layerscale_value=1).drop_path_rate == 0


def test_fields_assigned_later_are_checked_by_the_model() -> None:
    config = EquiSSLConfig()
    config.num_attention_heads = 7
    with pytest.raises(ValueError, match="num_attention_heads=7"):
        EquiSSLModel(config)


def test_derived_values() -> None:
    config = EquiSSLConfig(feature_size=512, equivariant_size=128, image_size=[224, 112], decoder_type="conv")
    assert config.invariant_size == 384
    assert config.grid_size == (14, 7)
    assert config.num_decoded_images == 2
    assert EquiSSLConfig().invariant_size is None
    assert EquiSSLConfig().num_decoded_images == 0
    final = EquiSSLConfig(decoder_type="conv", decoder_reconstructs_final=True, num_intermediate_images=3, **STEM)
    assert final.num_decoded_images == 4
    assert EquiSSLConfig(decoder_type="cross_attention", **STEM).num_decoded_images == 1
    upsamplings = [EquiSSLConfig(patch_size=p, image_size=8 * p).num_decoder_upsamplings for p in (4, 8, 14, 16)]
    assert upsamplings == [2, 3, 4, 4]


def test_round_trip_keeps_every_field(tmp_path) -> None:
    config = EquiSSLConfig(
        decoder_type="conv", decoder_widths=(32, 16, 8, 4), image_size=(64, 32), layerscale_value=1e-5, **STEM
    )
    config.save_pretrained(tmp_path)
    loaded = EquiSSLConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "_name_or_path", "auto_map", "image_size"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert tuple(loaded.image_size) == (64, 32)


def test_stage_names_follow_the_number_of_layers() -> None:
    saved = EquiSSLConfig().to_dict()
    del saved["out_features"], saved["out_indices"]
    assert len(EquiSSLConfig.from_dict({**saved, "num_hidden_layers": 4}).stage_names) == 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch4", (192, 12, 3, 4)),
        ("vit_small_patch16", (384, 12, 6, 16)),
        ("vit_base_patch8", (768, 12, 12, 8)),
        ("vit_large_patch14", (1024, 24, 16, 14)),
        ("vit_giant_patch14", (1536, 40, 24, 14)),
    ],
)
def test_presets(name: str, expected: tuple[int, ...]) -> None:
    config = EquiSSLConfig.from_preset(name, num_register_tokens=4)
    found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    assert found == expected
    assert config.num_register_tokens == 4


def test_unknown_preset_names_its_nearest_neighbour() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'vit_small_patch16'.*vit_giant_patch14"):
        EquiSSLConfig.from_preset("vit_smal_patch16")


# iBOT and DINOv2 give 21 M and 307 M without heads; the position embeddings belong to 224 px.
@pytest.mark.parametrize(
    ("name", "lower", "upper"), [("vit_small_patch16", 21e6, 22e6), ("vit_large_patch16", 303e6, 307e6)]
)
def test_parameter_counts(name: str, lower: float, upper: float) -> None:
    with torch.device("meta"):
        model = EquiSSLModel(EquiSSLConfig.from_preset(name))
    assert lower < sum(parameter.numel() for parameter in model.parameters()) < upper


def test_a_decoder_needs_a_type() -> None:
    with pytest.raises(ValueError, match="decoder_type=None"):
        build_decoder(EquiSSLConfig(**STEM))
