"""A fine-tuned adapter and its merged form go to the Hub and come back, on a base that lies there too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests import processes

from .loopback_hub import LoopbackHub

THERE = """
import json, sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForImageClassification

from hf_equissl.finetuning import cli, load_finetuned
from hf_equissl.encoders import save_encoder
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel

root, api = Path(sys.argv[1]), HfApi()
small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


def publish_encoder(seed):
    torch.manual_seed(seed)
    save_encoder(EquiSSLModel(EquiSSLConfig(**small)), root / "encoder", [0.5] * 3, [0.25] * 3)
    api.create_repo("maker/encoder", exist_ok=True)
    return api.upload_folder(repo_id="maker/encoder", folder_path=root / "encoder").oid


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=torch.ones(1, 3, 32, 32)).logits


commit = publish_encoder(0)
words = ["--encoder", "maker/encoder", "--data", str(root / "data"), "--batch_size", "8", "--epochs", "1"]
words += ["--output_dir", str(root / "run"), "--push_to_hub", "--private"]
assert cli.main([*words, "--repo_id", "maker/adapter"]) == 2  # nobody has said its licence
words += ["--license", "mit"]
assert cli.main([*words, "--repo_id", "maker/adapter"]) == 0
assert cli.main([*words, "--repo_id", "maker/merged", "--merge"]) == 0
expected = logits(load_finetuned(root / "run" / "adapter"))
report = {
    "private": api.model_info("maker/adapter").private,
    "files": sorted(api.list_repo_files("maker/adapter")),
    "license": ModelCard.load("maker/adapter").data.license,
    "base": ModelCard.load("maker/adapter").data.base_model,
    "named": 'load_finetuned("maker/adapter")' in ModelCard.load("maker/adapter").content,
    "adapter": (logits(load_finetuned("maker/adapter")) - expected).abs().max().item(),
    "merged": (logits(AutoModelForImageClassification.from_pretrained("maker/merged")) - expected).abs().max().item(),
}
# The base moves on; the adapter stays with the commit that it was trained on.
publish_encoder(1)
report["later"] = (logits(load_finetuned("maker/adapter")) - expected).abs().max().item()
try:
    load_finetuned("maker/adapter", base="maker/encoder")
except ValueError as error:
    report["refused"] = str(error)
report["revision"] = json.loads((root / "run" / "adapter" / "finetuning.json").read_text())["revision"] == commit
Path(root / "report.json").write_text(json.dumps(report))
"""


def test_adapters_and_merged_models_travel(hub: LoopbackHub, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for low, name in ((0, "dark"), (128, "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(6):
                picture = rng.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "data" / split / name / f"{index}.png")
    words, env = [sys.executable, "-c", THERE, str(tmp_path)], processes.environment(**hub.env(tmp_path / "home"))
    done = processes.run(words, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["private"]
    assert {"adapter_config.json", "adapter_model.safetensors", "finetuning.json", "README.md"} <= set(report["files"])
    assert "model.safetensors" not in report["files"]
    assert report["base"] == "maker/encoder"
    assert report["license"] == "mit"
    assert "The licence is yours to say" in done.stderr
    assert report["named"]
    assert report["revision"]
    assert max(report["adapter"], report["merged"], report["later"]) <= 1e-5
    assert "has the same shapes and other weights" in report["refused"]
    assert hub.token not in done.stdout + done.stderr
