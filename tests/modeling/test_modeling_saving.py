"""save_pretrained, from_pretrained, and remote code in a process without the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel

VARIANTS = {
    "plain": {},
    "stem": {"feature_size": 24, "equivariant_size": 8},
    "late-cls": {"cls_insertion_layer": 1, "num_register_tokens": 2},
    "conv": {"stem": True, "decoder_type": "conv", "layerscale_value": 1e-5, "decoder_reconstructs_final": True},
    "cross": {"stem": True, "decoder_type": "cross_attention", "decoder_num_layers": 1, "use_mask_token": False},
}
LOAD_WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_equissl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModel

folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert "hf_equissl" not in sys.modules
assert type(model).__module__.startswith("transformers_modules")
inputs = torch.load(f"{folder}/inputs.pt")
with torch.no_grad():
    output = model(inputs["images"], bool_masked_pos=inputs["mask"])
    images = model.reconstruct(inputs["images"], inputs["images"].flip(-1))
torch.save({"features": output.equivariant_features, "images": images}, f"{folder}/outputs.pt")
model.save_pretrained(f"{folder}/again")
"""


def assert_equal_weights(first: nn.Module, second: nn.Module) -> None:
    expected = dict(second.named_parameters())
    assert list(dict(first.named_parameters())) == list(expected)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path: Path, tiny_config, randomise, variant: str) -> None:
    model = randomise(EquiSSLModel(tiny_config(**VARIANTS[variant])))
    model.save_pretrained(tmp_path)
    loaded, report = EquiSSLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_equal_weights(loaded, model)
    assert list(loaded.buffers()) == []  # non-persistent ones would come out of the meta device as garbage
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(loaded(images).last_hidden_state, model(images).last_hidden_state, rtol=0, atol=0)
    if model.decoder is not None:
        torch.testing.assert_close(
            loaded.reconstruct(images, images.flip(2)), model.reconstruct(images, images.flip(2)), rtol=0, atol=0
        )
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_a_decoder_can_be_left_out_when_loading(tmp_path: Path, tiny_config) -> None:
    model = EquiSSLModel(tiny_config(stem=True, decoder_type="conv")).eval()
    model.save_pretrained(tmp_path)
    loaded = EquiSSLModel.from_pretrained(tmp_path, decoder_type=None)
    assert loaded.decoder is None
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images).equivariant_features, model(images).equivariant_features)


def test_what_a_checkpoint_lacks_is_initialised(tmp_path: Path, tiny_config) -> None:
    # from_pretrained builds on the meta device: a parameter without a rule in _init_weights would be garbage.
    EquiSSLModel(tiny_config()).save_pretrained(tmp_path)
    config = tiny_config(stem=True, decoder_type="conv", num_register_tokens=3, layerscale_value=0.5)
    loaded = EquiSSLModel.from_pretrained(tmp_path, config=config)
    assert loaded.stem.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert loaded.embeddings.register_tokens.abs().max() < 0.2
    assert (loaded.encoder.layer[1].layer_scale2.lambda1 == 0.5).all()
    assert all((norm.weight == 1).all() for norm in loaded.decoder.branches[0].norms)
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_bfloat16_file_loads_as_bfloat16(tmp_path: Path, tiny_config) -> None:
    EquiSSLModel(tiny_config(stem=True)).bfloat16().save_pretrained(tmp_path)
    assert EquiSSLModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert EquiSSLModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_loads_as_remote_code_without_the_package(tmp_path: Path, tiny_config, randomise) -> None:
    config = tiny_config(stem=True, decoder_type="conv", num_register_tokens=1, layerscale_value=None)
    model = randomise(EquiSSLModel(config))
    folder = tmp_path / "encoder"
    model.save_pretrained(folder)
    files = {path.name for path in folder.glob("*.py")}
    assert files == {f"{name}_equissl.py" for name in ("configuration", "decoders", "layers", "modeling")}
    inputs = {"images": torch.randn(2, 3, 48, 64), "mask": torch.rand(2, 12) < 0.4}
    torch.save(inputs, folder / "inputs.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outputs = torch.load(folder / "outputs.pt")
    with torch.no_grad():
        expected = model(inputs["images"], bool_masked_pos=inputs["mask"]).equivariant_features
        images = model.reconstruct(inputs["images"], inputs["images"].flip(-1))
    torch.testing.assert_close(outputs["features"], expected, rtol=0, atol=0)
    torch.testing.assert_close(outputs["images"], images, rtol=0, atol=0)
    assert files <= {path.name for path in (folder / "again").iterdir()}  # saved again, the code goes along
    assert EquiSSLConfig.from_pretrained(folder / "again").decoder_type == "conv"
