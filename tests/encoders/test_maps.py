"""Feature maps of encoders of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetBackbone,
    ResNetConfig,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel

VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8
}  # fmt: skip


def encoder_of(kind: str) -> FrozenEncoder:
    torch.manual_seed(0)
    made = {
        "equissl": lambda: EquiSSLModel(EquiSSLConfig(**VIT, num_register_tokens=2)),
        "late_cls": lambda: EquiSSLModel(EquiSSLConfig(**VIT, cls_insertion_layer=2)),
        "vit": lambda: ViTModel(ViTConfig(**VIT, intermediate_size=32), add_pooling_layer=False),
        "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, mlp_ratio=2)),
        "swin": lambda: SwinModel(
            SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
            add_pooling_layer=False,
        ),
        "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])),
        "resnet": lambda: ResNetBackbone(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 16],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=["stage1", "stage2"],
            )
        ),
    }
    return FrozenEncoder(made[kind]().eval(), image_size=32)


@pytest.mark.parametrize("kind", ["equissl", "late_cls", "vit", "registers"])
def test_maps_are_patch_tokens_in_their_grid(kind: str) -> None:
    encoder, images = encoder_of(kind), torch.randn(2, 3, 32, 48)
    first, last = encoder.maps(images, (1, -1))
    assert first.shape == last.shape == (2, 16, 4, 6)
    tokens = encoder.features(images, ["patch_tokens"])["patch_tokens"]
    assert torch.allclose(last, tokens.reshape(2, 4, 6, 16).permute(0, 3, 1, 2), atol=1e-6)
    assert torch.allclose(encoder.maps(images, (3,))[0], last, atol=1e-6)
    with encoder.frozen():
        options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
        states = encoder.module(images, output_hidden_states=True, **options).hidden_states
    assert torch.allclose(first[0, :, 1, 2], states[1][0, -24 + 6 + 2], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("swin", [(8, 8, 8), (16, 4, 4)]),
        ("convnext", [(8, 8, 8), (16, 1, 1)]),
        ("resnet", [(8, 8, 8), (16, 4, 4)]),
    ],
)
def test_other_backbones_give_maps_of_several_sizes(kind: str, shapes: list[tuple[int, ...]]) -> None:
    found = encoder_of(kind).maps(torch.randn(2, 3, 32, 32), (0, -1))
    assert [tuple(value.shape[1:]) for value in found] == shapes


def test_what_has_no_maps_says_so() -> None:
    encoder = encoder_of("vit")
    with pytest.raises(ValueError, match="gives 4 hidden states"):
        encoder.maps(torch.randn(1, 3, 32, 32), (4,))
    encoder.check_maps()
    vectors = FrozenEncoder(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), image_size=32)
    with pytest.raises(ValueError, match="no map of features"):
        vectors.check_maps()
