from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.encoders.base_image import base_image
from hf_equissl.encoders.block_features import read_last_blocks
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.utils.load_errors import LoadError

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    mlp = {"intermediate_size": 32}
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**TINY, mlp_ratio=2))
    if kind == "registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, mlp_ratio=2, num_register_tokens=3))
    if kind == "vit":
        return ViTModel(ViTConfig(**TINY, **mlp))
    if kind == "ijepa":
        return IJepaModel(IJepaConfig(**TINY, **mlp))
    return ViTMAEModel(ViTMAEConfig(**TINY, **mlp))


@pytest.mark.parametrize("kind", ["dinov2", "registers", "vit", "ijepa", "mae"])
def test_public_encoders_through_automodel(kind: str, tmp_path: Path) -> None:
    model = tiny(kind).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessor(
        crop_size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path)
    encoder = FrozenEncoder(tmp_path)
    assert encoder.image_size == 16
    assert encoder.image_mean == [0.1, 0.2, 0.3]
    assert encoder.image_std == [0.4, 0.5, 0.6]
    made = encoder.features(PIXELS, ("cls", "patches", "backbone"))
    with torch.no_grad():
        options = {}
        if kind == "mae":
            model.config.mask_ratio = 0.0
            options = {"noise": torch.arange(16.0).expand(3, -1)}
        tokens = model(PIXELS, **options).last_hidden_state
    prefix = {"registers": 4, "ijepa": 0}.get(kind, 1)
    patches = tokens[:, prefix:].mean(1)
    assert torch.allclose(made["patches"], patches, atol=1e-5)
    assert torch.allclose(made["cls"], tokens[:, 0] if prefix else patches, atol=1e-5)
    assert torch.equal(made["backbone"], torch.cat([made["cls"], made["patches"]], 1))
    assert made["cls"].std() > 0.01
    with torch.no_grad():
        states = model(PIXELS, **options, output_hidden_states=True).hidden_states[1:]
        read = [model.layernorm(state) for state in states]
    expected = torch.cat(
        [state[:, 0] if prefix else state.mean(1) for state in read], 1
    )  # two blocks are all there are
    found = encoder.features(PIXELS, ("cls_4", "cls_4_patches"))
    assert torch.allclose(found["cls_4"], expected, atol=1e-5)
    assert torch.equal(found["cls_4_patches"], torch.cat([found["cls_4"], made["patches"]], 1))


def test_encoders_without_states_of_blocks_say_so() -> None:
    class Tokens(nn.Module):
        config = Dinov2Config(num_hidden_layers=2, image_size=16, patch_size=4)

        def __init__(self) -> None:
            super().__init__()
            self.layernorm = nn.Identity()

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values.mean(1).flatten(1)[:, :17, None].expand(-1, -1, 8)

    encoder = FrozenEncoder(Tokens(), image_size=16)
    encoder.check_features(("cls_4",))
    with pytest.raises(ValueError, match=r"no features of single blocks: it gives no hidden states"):
        encoder.features(PIXELS, ("cls_4",))
    with pytest.raises(ValueError, match=r"mine \(Linear\) has no features of single blocks: there is no norm"):
        read_last_blocks(nn.Linear(1, 1), None, 16, "mine")


def test_blocks_before_a_late_cls_give_no_patch_in_its_place() -> None:
    torch.manual_seed(0)
    sizes = {**TINY, "num_hidden_layers": 5}
    late = FrozenEncoder(EquiSSLModel(EquiSSLConfig(**sizes, cls_insertion_layer=3)), image_size=16)
    made = late.features(PIXELS, ("cls_4", "cls"))
    assert made["cls_4"].shape == (3, 2 * 16)  # of blocks 4 and 5
    assert torch.allclose(made["cls_4"][:, 16:], made["cls"], atol=1e-5)
    early = FrozenEncoder(EquiSSLModel(EquiSSLConfig(**sizes)), image_size=16)
    assert early.features(PIXELS, ("cls_4",))["cls_4"].shape == (3, 4 * 16)


def test_mae_is_unmasked_and_its_ratio_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_decoder = {
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 8,
        "decoder_num_attention_heads": 1,
    }
    ViTMAEForPreTraining(ViTMAEConfig(**TINY, **small_decoder, intermediate_size=32)).save_pretrained(tmp_path)
    encoder = FrozenEncoder(tmp_path)
    first, again = encoder.features(PIXELS)["patches"], encoder.features(PIXELS)["patches"]
    assert torch.equal(first, again)
    assert encoder.module.config.mask_ratio == 0.75


@pytest.mark.parametrize("kind", ["vit", "mae", "ijepa", "dinov2"])
def test_other_image_sizes_interpolate_positions(kind: str) -> None:
    encoder = FrozenEncoder(tiny(kind), image_size=24)
    assert encoder.features(torch.randn(2, 3, 24, 24))["cls"].shape == (2, 16)


def test_equissl_slices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = EquiSSLConfig(**TINY, num_register_tokens=2, feature_size=12, equivariant_size=4)
    model = EquiSSLModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = FrozenEncoder(tmp_path)
    made = encoder.features(PIXELS, ("cls", "patches", "stem", "invariant", "equivariant"))
    assert torch.equal(made["stem"], torch.cat([made["invariant"], made["equivariant"]], 1))
    with torch.no_grad():
        output = model(PIXELS)
    assert torch.allclose(made["cls"], output.last_hidden_state[:, 0], atol=1e-5)
    assert torch.allclose(made["patches"], output.last_hidden_state[:, 3:].mean(1), atol=1e-5)
    for part in ("invariant", "equivariant"):
        whole = getattr(output, f"{part}_features")
        assert torch.allclose(made[part], torch.cat([whole[:, 0], whole[:, 1:].mean(1)], 1), atol=1e-5)
    plain = FrozenEncoder(EquiSSLModel(EquiSSLConfig(**TINY)))
    assert plain.feature_names == ("cls", "patches", "backbone", "cls_4", "cls_4_patches")
    assert FrozenEncoder(nn.Flatten(), image_size=16).feature_names == ("cls", "patches", "backbone")


def test_weights_modes_and_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten()).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = FrozenEncoder(model, image_size=16)
    version = encoder.version
    made = encoder.features(PIXELS)
    assert not made["cls"].requires_grad
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert encoder.version == version
    digest = encoder.digest()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert encoder.version != version
    assert encoder.digest() != digest


def test_encode_normalises_and_chunks() -> None:
    encoder = FrozenEncoder(nn.Flatten(), image_size=4, image_mean=[0.5] * 3, image_std=[0.25] * 3, batch_size=2)
    images = torch.full((5, 3, 4, 4), 255, dtype=torch.uint8)
    made = encoder.encode(images, ("cls",))["cls"]
    assert made.shape == (5, 48)
    assert torch.allclose(made, torch.full_like(made, 2.0))
    assert torch.equal(encoder.encode(images.float() / 255, ("cls",))["cls"], made)


def test_bf16_is_close_to_fp32() -> None:
    model = tiny("dinov2")
    exact, rough = (FrozenEncoder(model, precision=p).features(PIXELS)["cls"] for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.1)


def test_an_overflow_of_fp16_is_not_called_divergence() -> None:
    """Finite in fp32: the number format is to blame, not the encoder."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[2].weight.fill_(1e6)
    pixels = torch.ones(2, 3, 4, 4)
    for precision in ("fp32", "bf16"):
        assert FrozenEncoder(model, image_size=4, precision=precision).features(pixels)["cls"].abs().max() > 65504
    encoder = FrozenEncoder(model, image_size=4, precision="fp16")
    with pytest.raises(ValueError, match=r"not finite: fp16 holds .* Give the precision \(--precision\) bf16 or fp32"):
        encoder.features(pixels)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No encoder at"):
        FrozenEncoder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ValueError, match=r"No encoder .*'no_such_type'"):
        FrozenEncoder(tmp_path)
    with pytest.raises(ValueError, match="image_size"):
        FrozenEncoder(nn.Flatten())
    encoder = FrozenEncoder(nn.Flatten(), image_size=4)
    with pytest.raises(ValueError, match="choose among cls, patches, backbone"):
        encoder.features(torch.zeros(1, 3, 4, 4), ("equivariant",))
    with pytest.raises(ValueError, match="not finite"):
        encoder.features(torch.full((1, 3, 4, 4), float("nan")))


def test_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    Dinov2Model(Dinov2Config(**{**TINY, "num_hidden_layers": 1}, mlp_ratio=2)).save_pretrained(tmp_path)
    Dinov2Config(**TINY, mlp_ratio=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of Dinov2Model are missing"):
        FrozenEncoder(tmp_path)


def test_weights_that_are_cut_short_are_named(tmp_path: Path) -> None:
    tiny("dinov2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"weights at .* cannot be read: .*cut short"):
        FrozenEncoder(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights at .* cannot be read: .*missing"):
        FrozenEncoder(tmp_path)


def test_the_folder_of_a_run_points_at_its_encoder(tmp_path: Path) -> None:
    tiny("dinov2").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"Did you mean '.*/encoder'\?"):
        FrozenEncoder(tmp_path)


def test_a_damaged_image_processor_is_not_taken_for_an_absent_one(tmp_path: Path) -> None:
    tiny("dinov2").save_pretrained(tmp_path)
    assert FrozenEncoder(tmp_path).image_mean == [0.485, 0.456, 0.406]
    BitImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(settings.read_text()[:40])
    with pytest.raises(LoadError, match=r"preprocessor_config\.json is cut short or damaged"):
        FrozenEncoder(tmp_path)


def test_chosen_sizes_must_be_filled_by_patches() -> None:
    with pytest.raises(ValueError, match=r"--image_size\) is 18, not a multiple of the 4-pixel .* Give 16 or 20"):
        FrozenEncoder(tiny("vit"), image_size=18)
    assert FrozenEncoder(tiny("vit"), image_size=20).image_size == 20
    model = nn.Flatten()
    model.image_size, model.patch_size = 27, 14  # its maker's own choice: the border is not read
    assert FrozenEncoder(model, image_size=27).image_size == 27


def test_base_image_crops_the_centre_and_keeps_images_that_fit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    kept = base_image(Image.fromarray(pixels), 32)
    assert np.array_equal(kept.permute(1, 2, 0).numpy(), pixels[:, 4:36])
    flat = Image.new("RGB", (100, 57), (10, 20, 30))
    assert base_image(flat, 28).shape == (3, 28, 28)
    # From 96 pixels on a margin is cut off: a quarter of a 512-pixel image is a quarter of 256, of which 224 are kept.
    bar = np.zeros((512, 512, 3), np.uint8)
    bar[:, 192:320] = 255
    row = base_image(Image.fromarray(bar), 224)[0, 112].float() / 255
    assert row.sum().item() == pytest.approx(64, abs=0.1)
    assert torch.allclose(row, row.flip(0), atol=0.01)
