"""What is saved as a stock model computes what the encoder computes, without this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_equissl.encoders.native import save_native, to_native
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from tests import processes

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
STEM = {"feature_size": 24, "equivariant_size": 8, "decoder_type": "conv"}


@torch.no_grad()
def encoder(**fields: Any) -> EquiSSLModel:
    """Every parameter has a value of its own: zeros and ones would hide what is not used."""
    torch.manual_seed(0)
    model = EquiSSLModel(EquiSSLConfig(**{**TINY, **fields}))
    for name, parameter in model.named_parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape) + ("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        STEM,
        {"layerscale_value": 1e-5, "drop_path_rate": 0.1},
        {"num_register_tokens": 4},
        {"num_register_tokens": 2, "layerscale_value": 0.1, "use_mask_token": False},
        {"use_mask_token": False, "image_size": (32, 32)},
        {"qkv_bias": False, "mlp_ratio": 2, "layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
        {"num_channels": 1, "mlp_ratio": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 16)], ids=str)
def test_outputs_equal(fields: dict[str, Any], size: tuple[int, int]) -> None:
    ours = encoder(**fields)
    native = to_native(ours)
    assert native.config.model_type == ("dinov2_with_registers" if "num_register_tokens" in fields else "dinov2")
    assert not native.training
    images = torch.randn(2, ours.config.num_channels, *size)
    masks = [None, torch.rand(2, size[0] * size[1] // 64) < 0.4] if ours.config.use_mask_token else [None]
    for mask in masks:
        with torch.no_grad():
            expected = ours(images, bool_masked_pos=mask, output_features=False)
            found = native(images, bool_masked_pos=mask)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, **TOLERANCE)


def test_weights_are_copies_in_the_encoders_dtype() -> None:
    ours = encoder().to(torch.bfloat16)
    native = to_native(ours)
    assert native.dtype == torch.bfloat16
    before = ours.layernorm.weight.clone()
    with torch.no_grad():
        native.layernorm.weight.add_(1)
    torch.testing.assert_close(ours.layernorm.weight, before)


def test_stochastic_depth_is_carried_where_it_means_the_same() -> None:
    assert to_native(encoder(drop_path_rate=0.3, drop_path_mode="uniform")).config.drop_path_rate == 0.3
    assert to_native(encoder(drop_path_rate=0.3)).config.drop_path_rate == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cls_insertion_layer": 1}, "cls_insertion_layer=1 has no stock counterpart"),
        ({"image_size": (32, 64)}, r"image_size=\(32, 64\) has no stock counterpart"),
        ({"mlp_ratio": 2.5}, r"mlp_ratio=2\.5 has no stock counterpart"),
    ],
)
def test_what_has_no_counterpart_is_refused(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "before.txt").write_text("kept")
    with pytest.raises(ValueError, match=reason):
        save_native(encoder(**fields), tmp_path / "native", MEAN, STD)
    assert [path.name for path in tmp_path.rglob("*")] == ["native", "before.txt"]


WITHOUT_US = """
import sys, torch
sys.modules["hf_equissl"] = None  # any import of it fails
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
given = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    with torch.no_grad():
        tokens = model.eval()(given["images"]).last_hidden_state
    torch.testing.assert_close(tokens, given[folder.rsplit("/")[-1]], atol=1e-6, rtol=1e-6)
    processor = AutoImageProcessor.from_pretrained(folder)
    print(type(model).__name__, type(processor).__name__, processor.crop_size["height"], list(processor.image_mean))
"""


def test_a_process_without_this_package_loads_it(tmp_path: Path) -> None:
    tensors = {"images": torch.randn(2, 3, 48, 32)}
    for name, fields in {"plain": STEM, "registers": {"num_register_tokens": 4, "layerscale_value": 0.5}}.items():
        ours = encoder(**fields)
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00002.safetensors").write_text("of an older export")
        assert save_native(ours, tmp_path / name, MEAN, STD) == tmp_path / name
        with torch.no_grad():
            tensors[name] = ours(tensors["images"], output_features=False).last_hidden_state
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    save_file(tensors, tmp_path / "given.safetensors")
    folders = [str(tmp_path / name) for name in ("plain", "registers")]
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "given.safetensors"), *folders]
    done = processes.run(command, cwd=tmp_path, preloaded=processes.WITHOUT_US)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["Dinov2Model", "Dinov2WithRegistersModel"]
    assert all(line.split()[1].startswith("BitImageProcessor") for line in lines)
    assert all(line.endswith("32 [0.1, 0.2, 0.3]") for line in lines)


def test_names_in_the_file_are_those_of_transformers_4(tmp_path: Path) -> None:
    folder = save_native(encoder(), tmp_path / "native", MEAN, STD)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    block = "encoder.layer.2."
    attention = {f"{block}attention.attention.{part}.weight" for part in ("query", "key", "value")}
    assert attention | {f"{block}attention.output.dense.weight", f"{block}layer_scale2.lambda1"} <= names
    ones = load_file(folder / "model.safetensors")[f"{block}layer_scale2.lambda1"]
    torch.testing.assert_close(ones, torch.ones(32))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dinov2"
    assert "auto_map" not in config
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "BitImageProcessor"
    assert processor["crop_size"] == {"height": 32, "width": 32}
