"""FeaturePyramidBackbone: levels that halve, from any plain ViT, taken by the heads that want such maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig, Dinov2Config

from hf_equissl.modeling import EquiSSLBackbone, FeaturePyramidBackbone, FeaturePyramidConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
LEVELS, THREE = [1, 2, 3], {"num_labels": 3}
DETR = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2}
RT_DETR = {
    **DETR,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32] * 3,
    "decoder_in_channels": [32] * 3,
    "num_queries": 5,
    "num_denoising": 4,
}
MASK2FORMER = {
    "hidden_dim": 32,
    "feature_size": 32,
    "mask_feature_size": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 5,
    "train_num_points": 32,
}


def pyramid_of(kind: str, tiny_config: Any, **changes: Any) -> FeaturePyramidConfig:
    indices = [1, 2, 3, 4]
    if kind == "dinov2":
        return FeaturePyramidConfig(backbone_config=Dinov2Config(**SMALL, out_indices=indices), **changes)
    return FeaturePyramidConfig(backbone_config=tiny_config(**SMALL, out_indices=indices), **changes)


def test_levels_are_the_blocks_maps_at_four_scales(tiny_config, randomise) -> None:
    config = pyramid_of("equissl", tiny_config, norm="batch")
    model = randomise(FeaturePyramidBackbone(config)).eval()
    images = torch.randn(2, 3, 64, 96)
    first, second, third, fourth = model.backbone(images).feature_maps
    one, two, three, four = model(images).feature_maps
    assert [tuple(level.shape) for level in (one, two, three, four)] == [
        (2, 32, 16, 24),
        (2, 32, 8, 12),
        (2, 32, 4, 6),
        (2, 32, 2, 3),
    ]
    assert (model.channels, config.hidden_size) == ([32] * 4, 32)
    torch.testing.assert_close(three, third)
    torch.testing.assert_close(four, fourth.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5)))
    # A transposed convolution of stride 2 by hand: four linear maps of each position, side by side.
    up = model.levels["level1"]
    maps = torch.einsum("bchw,cdij->bdhiwj", second, up.weight).flatten(4).flatten(2, 3)
    torch.testing.assert_close(two, maps + up.bias[:, None, None], atol=1e-5, rtol=1e-5)
    doubling, norm, _, again = model.levels["level0"]
    torch.testing.assert_close(one, again(F.gelu(norm(doubling(first)))))


def test_one_map_serves_all_levels_and_only_asked_ones_have_weights(tiny_config, randomise) -> None:
    inner = tiny_config(**SMALL, out_indices=[4])
    model = randomise(FeaturePyramidBackbone(FeaturePyramidConfig(backbone_config=inner, out_indices=LEVELS)))
    assert not any("level0" in name for name, _ in model.named_parameters())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images).feature_maps[1], model.backbone(images).feature_maps[0])
    assert [level.shape[2] for level in model(images, return_dict=False)[0]] == [8, 4, 2]
    # The layer norm of the largest level is over the channels of a position.
    norm = FeaturePyramidBackbone(FeaturePyramidConfig(backbone_config=inner)).levels["level0"][1]
    normed = norm(torch.randn(2, 32, 3, 5) * 4 + 1)
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.std(1, correction=0), torch.ones(2, 3, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "name", "levels", "options"),
    [
        ("equissl", "RTDetrForObjectDetection", LEVELS, RT_DETR),
        ("dinov2", "DFineForObjectDetection", LEVELS, {**RT_DETR, "feat_strides": [8, 16, 32]}),
        ("equissl", "Mask2FormerForUniversalSegmentation", None, MASK2FORMER),
        ("dinov2", "UperNetForSemanticSegmentation", None, {"hidden_size": 16, "use_auxiliary_head": False}),
    ],
)
def test_heads_take_it_and_come_back(
    tiny_config, tmp_path: Path, kind: str, name: str, levels: Any, options: dict
) -> None:
    torch.manual_seed(0)
    head = getattr(transformers, name)
    config = head.config_class(backbone_config=pyramid_of(kind, tiny_config, out_indices=levels), **options, **THREE)
    model = head(config)
    images = torch.randn(2, 3, 64, 64)
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:40, 8:40] = 1
    labels: dict[str, Any] = {"labels": [box, box]}
    if name.startswith("Mask2Former"):
        labels = {"mask_labels": [mask, mask], "class_labels": [torch.tensor([1])] * 2}
    elif name.startswith("UperNet"):
        labels = {"labels": mask.long().expand(2, -1, -1)}
    model.train()(images, **labels).loss.backward()
    silent = {n for n, p in model.named_parameters() if ".levels." in n and (p.grad is None or not p.grad.any())}
    assert not silent
    assert sum(".levels." in n for n, _ in model.named_parameters()) == (2 if levels else 8)

    model.eval().save_pretrained(tmp_path)
    again, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        for one, other in zip(model(images).to_tuple(), again.eval()(images).to_tuple(), strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other)


def test_it_is_a_backbone_of_its_own(tiny_config, randomise, tmp_path: Path) -> None:
    model = randomise(AutoBackbone.from_config(pyramid_of("equissl", tiny_config, out_features=["level0", "level3"])))
    assert isinstance(model, FeaturePyramidBackbone)
    assert isinstance(model.backbone, EquiSSLBackbone)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).out_indices == [0, 3]
    images = torch.randn(1, 3, 64, 64)
    again = FeaturePyramidBackbone.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images).feature_maps, model(images).feature_maps)


def test_what_makes_no_pyramid_is_refused(tiny_config) -> None:
    for changes, message in (
        ({"scales": [4, 3]}, r"scales=\[4, 3\]: expected some of 4, 2, 1, 0.5"),
        ({"norm": "group"}, "norm='group': expected one of layer, batch"),
        ({"scales": [2, 1]}, "has 4 stages and the pyramid 2 levels"),
        ({"out_indices": [5]}, "out_indices must be valid indices"),
    ):
        with pytest.raises(ValueError, match=message):
            pyramid_of("equissl", tiny_config, **changes)
    with pytest.raises(ValueError, match=r"Maps of \(1, 1\) patches cannot be halved"):
        FeaturePyramidBackbone(pyramid_of("equissl", tiny_config))(torch.zeros(1, 3, 16, 16))
    twice = FeaturePyramidConfig(backbone_config=pyramid_of("equissl", tiny_config))
    with pytest.raises(ValueError, match="has a pyramid already"):
        FeaturePyramidBackbone(twice)(torch.zeros(1, 3, 64, 64))
