"""Local crops beside global ones in one pass: the tokens and gradients of two passes, stochastic depth per image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_equissl import EquiSSLConfig, EquiSSLModel
from hf_equissl.planning.processes import as_one_of
from hf_equissl.planning.step import build_without_weights
from hf_equissl.pretraining.encoding import encode_crops
from hf_equissl.pretraining.packing import _draw, _plan, encode_packed
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare

RECIPES = Path(__file__).resolve().parents[2] / "training/recipes"
BLOCKS = 3


def make_encoder(**values: Any) -> EquiSSLModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    encoder = EquiSSLModel(EquiSSLConfig(**sizes, feature_size=None, equivariant_size=None, **values)).double().train()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


def make_crops() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 3, 32, 32).double(), torch.randn(4, 3, 3, 16, 16).double()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_register_tokens": 2, "layerscale_value": 0.3, "attn_implementation": "eager"},
        {"cls_insertion_layer": 1},
        {"cls_insertion_layer": BLOCKS - 1, "num_register_tokens": 1},
    ],
    ids=["plain", "registers", "late", "latest"],
)
def test_one_pass_gives_what_two_give(values: dict[str, Any]) -> None:
    encoder, (crops, local) = make_encoder(**values), make_crops()
    masks = torch.rand(6, 16) > 0.5
    apart = encode_crops(encoder, crops, masks, [2, BLOCKS])
    apart.local_tokens = encode_crops(encoder, local, patches=False).tokens
    packed = encode_crops(encoder, crops, masks, [2, BLOCKS], local=local)
    found = []
    for features in (apart, packed):
        hidden = [features.hidden[layer].tokens for layer in (2, BLOCKS)]
        tokens = [features.tokens, features.local_tokens, *hidden]
        encoder.zero_grad()
        sum(part.pow(3).mean() for part in tokens).backward()
        found.append(tokens + [parameter.grad.clone() for parameter in encoder.parameters()])
    assert [part.shape for part in found[0]] == [part.shape for part in found[1]]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["linear", "uniform"])
def test_each_image_keeps_or_loses_its_branches(mode: str) -> None:
    """The reference runs every image alone, with the factors that were drawn for it."""
    encoder, (crops, local) = make_encoder(drop_path_rate=0.5, drop_path_mode=mode, layerscale_value=0.7), make_crops()
    groups = [crops.flatten(0, 1), local.flatten(0, 1)]
    torch.manual_seed(1)
    found = encode_packed(encoder, *groups)[:2]

    embedded = [encoder.embeddings(images)[0] for images in groups]
    blocks, layouts = encoder.encoder.layer, _plan(embedded, BLOCKS, 0, 1)
    torch.manual_seed(1)
    ways = _draw(blocks, layouts, True, torch.device("cpu"))
    factors = torch.ones(2, 2 * BLOCKS, 12, dtype=torch.double)
    for index, ((paths, _), layout) in enumerate(zip(ways, layouts, strict=True)):
        for branch, path in enumerate(paths or ()):
            rows = torch.arange(len(path.factor)) if path.rows is None else path.rows
            spread = torch.zeros(sum(layout.lengths), dtype=torch.double)
            spread[rows] = path.factor[: len(rows), 0].double()
            large, small = layout.split(spread)[:2]
            factors[0, 2 * index + branch, : len(large)] = large[:, 0]
            factors[1, 2 * index + branch, : len(small)] = small[:, 0]
    lost = (factors[:, :, :6] == 0).double().mean().item()
    assert 0.1 < lost < 0.8
    for group, (tokens, result) in enumerate(zip(embedded, found, strict=True)):
        for image in range(len(tokens)):
            x = tokens[image : image + 1]
            for index, block in enumerate(blocks):
                first, second = factors[group, 2 * index : 2 * index + 2, image]
                x = x + first * block.layer_scale1(block.attention(block.norm1(x))[0])
                x = x + second * block.layer_scale2(block.mlp(block.norm2(x)))
            asked = encoder.layernorm(x)[0, : result.shape[1]]
            torch.testing.assert_close(result[image], asked, rtol=1e-6, atol=1e-6)  # factors are drawn in fp32


@pytest.mark.parametrize("mode", ["linear", "uniform"])
def test_weights_of_bfloat16_stay_in_it(mode: str) -> None:
    """Stochastic depth draws its factors in fp32; the same images lose the same branches in either precision."""
    values = {"drop_path_rate": 0.5, "drop_path_mode": mode, "layerscale_value": 0.7}
    encoder, (crops, local) = make_encoder(**values), make_crops()
    groups, found = [crops.flatten(0, 1), local.flatten(0, 1)], []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        tokens = encode_packed(encoder.to(dtype), *(images.to(dtype) for images in groups))[:2]
        assert [part.dtype for part in tokens] == [dtype, dtype]
        found.append([part.float() for part in tokens])
    for exact, rounded in zip(*found, strict=True):
        assert torch.cosine_similarity(exact, rounded, dim=-1).min() > 0.99
    encoder.zero_grad()
    sum(part.pow(2).mean() for part in tokens).backward()
    assert encoder.encoder.layer[0].mlp.fc1.weight.grad.abs().max() > 0


def test_exact_stochastic_depth_computes_no_more_than_it_keeps() -> None:
    encoder = make_encoder(drop_path_rate=0.4, drop_path_mode="uniform")
    seen: list[int] = []
    encoder.encoder.layer[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    encode_packed(encoder, torch.randn(6, 3, 32, 32).double(), torch.randn(12, 3, 16, 16).double())
    assert seen == [3 * 17 + 7 * 5]  # floor(6 * 0.6) and floor(12 * 0.6) images
    seen.clear()
    encode_packed(encoder.eval(), torch.randn(6, 3, 32, 32).double(), torch.randn(12, 3, 16, 16).double())
    assert seen == [6 * 17 + 12 * 5]


class KernelCount(TorchDispatchMode):
    """Counts operations that compute, by name: views and questions about tensors are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in ("device", "_unsafe_view", "detach", "alias", "is_same_size"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recipe", "before"), [("vits16_ibot_se2", 2816), ("vitl16_dinov2_se2", 5635)])
def test_a_step_takes_a_third_fewer_kernels_than_two_passes(recipe: str, before: int) -> None:
    """``before``: kernels of a step in bf16 with a pass for each size of crops, before they went together."""
    run = prepare(Recipe.load(RECIPES / f"{recipe}.yaml", {"training.bf16": True}), None, dry=True, processes=1)
    mode, model = build_without_weights(run.config)
    views = run.pipeline.blank(8, device="meta")
    counted = KernelCount()
    with as_one_of(1), mode, counted:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(views=views.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)))
        output.loss.backward()
    assert counted.names.total() < 2 / 3 * before, counted.names.most_common()
