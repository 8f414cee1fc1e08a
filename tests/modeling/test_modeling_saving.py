"""save_pretrained, from_pretrained, and remote code in a process without the package."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from hf_equissl.modeling import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel
from tests import processes

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
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert "hf_equissl" not in sys.modules
assert type(model).__module__.startswith("transformers_modules")
inputs = torch.load(f"{folder}/inputs.pt")
with torch.no_grad():
    output = model(inputs["images"], bool_masked_pos=inputs["mask"])
    images = model.reconstruct(inputs["images"], inputs["images"].flip(-1))
model.save_pretrained(f"{folder}/again")

# The same folder of an encoder serves the other classes.
classifier = AutoModelForImageClassification.from_pretrained(
    folder, num_labels=10, pooling="invariant", trust_remote_code=True
)
assert type(classifier).__name__ == "EquiSSLForImageClassification"
assert classifier(inputs["images"]).logits.shape == (2, 10)
assert torch.equal(classifier.equissl.stem.weight, model.stem.weight)
classifier.save_pretrained(f"{folder}/classifier")
again = AutoModelForImageClassification.from_pretrained(f"{folder}/classifier", trust_remote_code=True)
assert torch.equal(again(inputs["images"]).logits, classifier(inputs["images"]).logits)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True, out_indices=[1, 3])
backbone = AutoBackbone.from_config(config, trust_remote_code=True).eval()
print(backbone.load_state_dict(model.state_dict(), strict=False))
maps = backbone(inputs["images"]).feature_maps
assert "hf_equissl" not in sys.modules
torch.save({"features": output.equivariant_features, "images": images, "maps": maps}, f"{folder}/outputs.pt")
"""
DERIVED = """
from .modeling_equissl import EquiSSLModel


class DoubledModel(EquiSSLModel):
    def forward(self, pixel_values, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output
"""
AUTO_MAP = {
    "AutoConfig": "configuration_equissl.EquiSSLConfig",
    "AutoModel": "modeling_equissl.EquiSSLModel",
    "AutoModelForImageClassification": "modeling_equissl.EquiSSLForImageClassification",
    "AutoBackbone": "modeling_equissl.EquiSSLBackbone",
}


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


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
    assert files == {f"{name}_equissl.py" for name in ("base", "configuration", "decoders", "layers", "modeling")}
    inputs = {"images": torch.randn(2, 3, 48, 64), "mask": torch.rand(2, 12) < 0.4}
    torch.save(inputs, folder / "inputs.pt")
    words = [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, str(folder)]
    run = processes.run(words, cwd=tmp_path, preloaded=processes.WITHOUT_US)
    assert run.returncode == 0, run.stderr
    outputs = torch.load(folder / "outputs.pt")
    with torch.no_grad():
        expected = model(inputs["images"], bool_masked_pos=inputs["mask"]).equivariant_features
        images = model.reconstruct(inputs["images"], inputs["images"].flip(-1))
    torch.testing.assert_close(outputs["features"], expected, rtol=0, atol=0)
    torch.testing.assert_close(outputs["images"], images, rtol=0, atol=0)
    torch.testing.assert_close(
        outputs["maps"], EquiSSLBackbone.from_pretrained(folder, out_indices=[1, 3])(inputs["images"]).feature_maps
    )
    for name in ("again", "classifier"):
        assert files <= {path.name for path in (folder / name).iterdir()}  # saved again, the code goes along
        assert auto_map(folder / name) == AUTO_MAP
    assert EquiSSLConfig.from_pretrained(folder / "again").decoder_type == "conv"


@pytest.mark.parametrize("kind", [EquiSSLModel, EquiSSLForImageClassification, EquiSSLBackbone])
def test_every_model_carries_one_map_of_all_classes(tmp_path: Path, tiny_config, kind) -> None:
    model = kind(tiny_config())
    model.save_pretrained(tmp_path / "model")
    assert auto_map(tmp_path / "model") == AUTO_MAP
    for reference in AUTO_MAP.values():
        file, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / "model" / f"{file}.py").read_text()
    # The configuration alone points at its own file, whatever has been saved or loaded before.
    for number, config in enumerate((model.config, EquiSSLConfig.from_pretrained(tmp_path / "model"))):
        config.save_pretrained(tmp_path / f"config{number}")
        assert auto_map(tmp_path / f"config{number}") == {"AutoConfig": AUTO_MAP["AutoConfig"]}
        assert {path.name for path in (tmp_path / f"config{number}").iterdir()} == {
            "config.json", "configuration_equissl.py"
        }  # fmt: skip
    kind(EquiSSLConfig.from_pretrained(tmp_path / "config0")).save_pretrained(tmp_path / "again")
    assert auto_map(tmp_path / "again") == AUTO_MAP


def test_code_of_derived_classes_travels(tmp_path: Path, tiny_config, monkeypatch) -> None:
    # As a user writes it: our flat files copied beside a file of theirs.
    package = tmp_path / "their_package"
    EquiSSLModel(tiny_config()).save_pretrained(package)
    (package / "__init__.py").write_text("")
    (package / "modeling_doubled.py").write_text(DERIVED)
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("their_package.modeling_doubled").DoubledModel.from_pretrained(package).eval()
    theirs.save_pretrained(tmp_path / "saved")
    shutil.rmtree(package)
    assert auto_map(tmp_path / "saved") == {**AUTO_MAP, "AutoModel": "modeling_doubled.DoubledModel"}
    code = (
        "import sys, torch; from transformers import AutoModel; "
        f"model = AutoModel.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=True).eval(); "
        f"torch.save(model(torch.ones(1, 3, 64, 64)).last_hidden_state, {str(tmp_path / 'output.pt')!r}); "
        "print(type(model).__name__, 'hf_equissl' in sys.modules)"
    )
    run = processes.run([sys.executable, "-c", code], preloaded=processes.WITHOUT_US)
    assert run.stdout.split() == ["DoubledModel", "False"], run.stderr
    plain = AutoModel.from_pretrained(tmp_path / "saved").eval()  # installed here, the local class is used
    assert type(plain) is EquiSSLModel
    expected = 2 * plain(torch.ones(1, 3, 64, 64)).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected)
