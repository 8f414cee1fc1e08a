"""Decoders against straightforward references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel, EquiSSLStem, EquiSSLUpsampleConv2d, build_decoder
from hf_equissl.modeling.decoders_equissl import sincos_positions, unpatchify


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 7)])
def test_upsampling_convolution_equals_upsample_then_convolve(shape: tuple[int, int]) -> None:
    layer = EquiSSLUpsampleConv2d(6, 4).double()
    reference = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(6, 4, 3, padding=1)).double()
    reference[1].load_state_dict(layer.state_dict())
    images = torch.randn(2, 6, *shape, dtype=torch.double, requires_grad=True)
    weights = torch.randn(2, 4, 2 * shape[0], 2 * shape[1], dtype=torch.double)
    results = []
    for module in (layer, reference):
        output = module(images)
        results.append((output, *torch.autograd.grad((output * weights).sum(), (images, *module.parameters()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def conv_reference(
    decoder: nn.Module, first: torch.Tensor, second: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """K decoders one by one, with up-sampled images, from the description of the method."""
    images = []
    for k, branch in enumerate(decoder.branches):
        width = decoder.projection.out_features // len(decoder.branches)
        weight, bias = (p[k * width : (k + 1) * width] for p in (decoder.projection.weight, decoder.projection.bias))
        tokens = torch.cat((first, second), dim=2) @ weight.T + bias
        image = tokens.transpose(1, 2).reshape(len(first), width, *grid)
        for index, conv in enumerate(branch.convs):
            if index < math.log2(decoder.upsampled_patch_size):
                image = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            image = nn.functional.conv2d(image, conv.weight, conv.bias, padding=1)
            if index < len(branch.convs) - 1:
                norm = branch.norms[index]
                groups = image.unflatten(1, (norm.num_groups, -1))
                mean = groups.mean((2, 3, 4), keepdim=True)
                variance = groups.var((2, 3, 4), keepdim=True, unbiased=False)
                image = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
                image = nn.functional.gelu(image * norm.weight[:, None, None] + norm.bias[:, None, None])
        images.append(image)
    return torch.stack(images, dim=1)


@pytest.mark.parametrize(
    ("patch", "widths", "final"),
    [(4, [16, 8, 8, 12], False), (8, [16, 8, 8], True), (16, [16, 8, 8, 4], True), (16, [8, 8, 8, 8, 8], False)],
)
def test_conv_decoder_equals_the_reference(tiny_config, randomise, patch: int, widths: list[int], final: bool) -> None:
    config = tiny_config(
        stem=True, patch_size=patch, decoder_type="conv", decoder_widths=widths, decoder_reconstructs_final=final
    )
    decoder = randomise(build_decoder(config)).double()
    first, second = torch.randn(2, 2, 6, 8, dtype=torch.double)
    found = decoder(first, second, (2, 3))
    assert found.shape == (2, 3 if final else 2, 3, 2 * patch, 3 * patch)
    torch.testing.assert_close(found, conv_reference(decoder, first, second, (2, 3)), atol=1e-9, rtol=1e-9)


def test_conv_decoder_at_patch_14_resizes_from_16(tiny_config, randomise) -> None:
    decoder = randomise(
        build_decoder(tiny_config(stem=True, image_size=56, patch_size=14, decoder_type="conv"))
    ).double()
    first, second = torch.randn(2, 1, 6, 8, dtype=torch.double)
    large = conv_reference(decoder, first, second, (2, 3))  # (1, 2, 3, 32, 48)
    expected = nn.functional.interpolate(large[0], size=(28, 42), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(first, second, (2, 3))[0], expected, atol=1e-9, rtol=1e-9)


def test_conv_decoders_are_independent(tiny_config) -> None:
    decoder = build_decoder(tiny_config(stem=True, decoder_type="conv", num_intermediate_images=3))
    first, second = torch.randn(2, 2, 4, 8)
    decoder(first, second, (2, 2))[:, 1].square().mean().backward()
    width = decoder.projection.out_features // 3
    used = decoder.projection.weight.grad.unflatten(0, (3, width)).abs().amax((1, 2))
    assert used[1] > 0
    assert used[0] == used[2] == 0
    for index, branch in enumerate(decoder.branches):
        gradients = [parameter.grad for parameter in branch.parameters()]
        assert all(gradient is not None for gradient in gradients) or index != 1
        assert all(gradient is None or not gradient.any() for gradient in gradients) or index == 1


@pytest.mark.parametrize("kind", ["conv", "cross_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_every_decoder_parameter(tiny_config, kind: str, dtype: torch.dtype) -> None:
    decoder = build_decoder(tiny_config(stem=True, decoder_type=kind))
    first, second = (torch.randn(2, 4, 8, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        images = decoder(first, second, (2, 2))
    images.float().square().mean().backward()
    missing = [n for n, p in decoder.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    # Softmax does not see a constant added to all scores: the bias of the keys has gradient zero by construction.
    still = [n for n, p in decoder.named_parameters() if not p.grad.any() and not n.endswith("k_proj.bias")]
    assert still == []
    assert first.grad.abs().max() > 0
    assert second.grad.abs().max() > 0


def test_positions_by_hand() -> None:
    positions = sincos_positions((2, 3), 8)
    assert positions.shape == (6, 8)
    row, column = 1, 2
    angles = [row, row / 100, column, column / 100]  # frequencies 1 and 10000^(-4/8)
    expected = [math.sin(angles[0]), math.sin(angles[1]), math.cos(angles[0]), math.cos(angles[1])]
    expected += [math.sin(angles[2]), math.sin(angles[3]), math.cos(angles[2]), math.cos(angles[3])]
    torch.testing.assert_close(positions[row * 3 + column], torch.tensor(expected))
    assert len({tuple(row.tolist()) for row in positions}) == 6


def test_unpatchify_by_hand() -> None:
    # 2 x 3 patches of 2 x 2 pixels, 2 channels: the image holds its own flat index.
    image = torch.arange(2 * 4 * 6, dtype=torch.float32).reshape(1, 2, 4, 6)
    patches = [image[0, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for r in range(2) for c in range(3)]
    torch.testing.assert_close(unpatchify(torch.stack(patches)[None], (2, 3), 2), image)


def attention_reference(layer: nn.Module, query: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention by torch's own module."""
    size = query.shape[-1]
    module = nn.MultiheadAttention(size, heads, batch_first=True, dtype=query.dtype)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    module.in_proj_weight.data = torch.cat([p.weight for p in projections])
    module.in_proj_bias.data = torch.cat([p.bias for p in projections])
    module.out_proj.load_state_dict(layer.o_proj.state_dict())
    return module(query, context, context)[0]


def test_cross_attention_decoder_equals_the_reference(tiny_config, randomise) -> None:
    config = tiny_config(stem=True, decoder_type="cross_attention", decoder_hidden_size=16, decoder_num_heads=2,
                         decoder_num_layers=2)  # fmt: skip
    decoder = randomise(build_decoder(config)).double()
    first, second = torch.randn(2, 2, 6, 8, dtype=torch.double)
    positions = sincos_positions((2, 3), 16).double()
    hidden, context = decoder.projection(first) + positions, decoder.projection(second) + positions
    cross = decoder.cross_layer
    hidden = hidden + attention_reference(cross.attention, cross.norm1(hidden), cross.norm_context(context), 2)
    hidden = hidden + cross.mlp(cross.norm2(hidden))
    for layer in decoder.layers:
        normed = layer.norm1(hidden)
        hidden = hidden + attention_reference(layer.attention, normed, normed, 2)
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    expected = unpatchify(decoder.to_pixels(decoder.layernorm(hidden)), (2, 3), 16)
    found = decoder(first, second, (2, 3))
    assert found.shape == (2, 1, 3, 32, 48)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["conv", "cross_attention"])
def test_wrong_features(tiny_config, kind: str) -> None:
    decoder = build_decoder(tiny_config(stem=True, decoder_type=kind))
    wrong = [
        (torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)),
        (torch.zeros(2, 4, 8), torch.zeros(1, 4, 8)),
        (torch.zeros(2, 4, 7), torch.zeros(2, 4, 7)),
        (torch.zeros(4, 8), torch.zeros(4, 8)),
    ]
    for first, second in wrong:
        with pytest.raises(ValueError, match=r"\(B, 4, 8\) twice for a grid of 2 x 2"):
            decoder(first, second, (2, 2))


@pytest.mark.parametrize(("kind", "count"), [("conv", 2), ("cross_attention", 1)])
def test_reconstruct_reads_equivariant_patch_features_of_both_views(
    tiny_config, randomise, kind: str, count: int
) -> None:
    model = randomise(EquiSSLModel(tiny_config(stem=True, num_register_tokens=2, decoder_type=kind)))
    first, second = torch.randn(2, 2, 3, 32, 48)
    found = model.reconstruct(first, second)
    assert found.shape == (2, count, 3, 32, 48)
    features = [model(view).equivariant_features[:, 1:] for view in (first, second)]
    torch.testing.assert_close(found, model.decoder(*features, (2, 3)), atol=1e-4, rtol=1e-4)


def test_reconstruct_says_what_is_missing(tiny_config) -> None:
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="no decoder"):
        EquiSSLModel(tiny_config(stem=True)).reconstruct(images, images)
    with pytest.raises(ValueError, match="expected one shape"):
        EquiSSLModel(tiny_config(stem=True, decoder_type="conv")).reconstruct(images, images[..., :32])


def test_folded_stem_equals_stem_then_linear_layer():
    torch.manual_seed(0)
    config = EquiSSLConfig(
        hidden_size=16, num_attention_heads=2, image_size=32, patch_size=8, feature_size=48, equivariant_size=20
    ).to_dict()
    config = EquiSSLConfig.from_dict({**config, "decoder_type": "conv", "decoder_widths": [8, 8, 4]})
    stem, decoder = EquiSSLStem(16, 48, 20).double(), build_decoder(config).double()
    tokens = [torch.randn(3, 16, 16, dtype=torch.double, requires_grad=True) for _ in range(2)]
    leaves = [*tokens, *stem.parameters(), *decoder.parameters()]

    apart = decoder(*(stem(part, "equivariant") for part in tokens), (4, 4))
    folded = decoder.paint(decoder.project_tokens(*tokens, stem), (4, 4))
    torch.testing.assert_close(folded, apart)
    gradients = [torch.autograd.grad(images.square().sum(), leaves, retain_graph=True) for images in (apart, folded)]
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
        assert expected.abs().max() > 0


def test_folding_is_chosen_by_its_products():
    stem = EquiSSLStem(384, 8192, 2048)
    # 2 x 196 tokens: 392 * 2048 * (384 + 128) apart, 384 * 128 * (392 + 2048) folded
    assert stem.is_fold_cheaper(392, 128, "equivariant")
    assert not stem.is_fold_cheaper(50, 128, "equivariant")
    stem.weight.ds_id = 0  # ZeRO-3
    assert not stem.is_fold_cheaper(392, 128, "equivariant")
