"""Exported programs take any batch and any image size that the patch divides, and compute what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_equissl import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
STEM = {"feature_size": 16, "equivariant_size": 8}
# Name -> a model, and the tensors of its output that are compared.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], tuple[Tensor, ...]]]] = {
    "encoder": (
        lambda: EquiSSLModel(EquiSSLConfig(**SMALL, **STEM)),
        lambda output: (output.last_hidden_state, output.equivariant_features),
    ),
    "registers": (
        lambda: EquiSSLModel(EquiSSLConfig(**SMALL, num_register_tokens=2)),
        lambda output: (output.last_hidden_state, output.pooler_output),
    ),
    "late CLS": (
        lambda: EquiSSLModel(EquiSSLConfig(**SMALL, cls_insertion_layer=1)),
        lambda output: (output.last_hidden_state,),
    ),
    "classifier": (
        lambda: EquiSSLForImageClassification(EquiSSLConfig(**SMALL, num_labels=3, pooling="cls_patches")),
        lambda output: (output.logits,),
    ),
    "backbone": (
        lambda: EquiSSLBackbone(EquiSSLConfig(**SMALL, out_indices=[1, 2])),
        lambda output: tuple(output.feature_maps),
    ),
}


class Tensors(nn.Module):
    """A model that returns a tuple of tensors, as tracers want it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        build, self.choose = MODELS[name]
        self.model = build().eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.choose(self.model(pixel_values))


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def any_size() -> dict[str, Any]:
    rows, columns = torch.export.Dim("rows", max=64), torch.export.Dim("columns", max=64)
    return {"pixel_values": {0: torch.export.Dim("batch"), 2: 4 * rows, 3: 4 * columns}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("others", [(5, 16, 16), (3, 24, 32)], ids=["another batch", "another size"])
@torch.no_grad()
def test_traced(name: str, others: tuple[int, int, int]) -> None:
    module = Tensors(name).eval()
    traced = torch.jit.trace(module, (images(2, 16, 16),), check_trace=False)
    torch.testing.assert_close(traced(images(*others)), module(images(*others)))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_exported(name: str) -> None:
    module = Tensors(name).eval()
    program = torch.export.export(module, (images(2, 16, 16),), dynamic_shapes=any_size()).module()
    for others in [(5, 16, 16), (1, 24, 32)]:
        torch.testing.assert_close(program(images(*others)), module(images(*others)))


@pytest.mark.parametrize(("name", "dynamo"), [("encoder", True), ("backbone", False)], ids=["dynamo", "torchscript"])
@torch.no_grad()
def test_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    """Both exporters. With registers that of TorchScript fails, of ours as of transformers' models: it knows no
    antialiased bicubic interpolation.
    """
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, file = Tensors(name).eval(), str(tmp_path / "model.onnx")
    sizes: dict[str, Any] = {"dynamic_shapes": any_size()}
    if not dynamo:
        sizes = {"dynamic_axes": {"pixel_values": {0: "batch", 2: "height", 3: "width"}}, "opset_version": 18}
    torch.onnx.export(
        module, (images(2, 16, 16),), file, input_names=["pixel_values"], dynamo=dynamo, verbose=False, **sizes
    )
    others = images(3, 24, 32)
    computed = runtime.InferenceSession(file).run(None, {"pixel_values": others.numpy()})
    torch.testing.assert_close(tuple(map(torch.from_numpy, computed)), module(others), rtol=1e-4, atol=1e-5)
