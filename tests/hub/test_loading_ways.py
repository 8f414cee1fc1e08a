"""A published encoder loads in three ways, each in a process and an environment of its own, with equal outputs.

(a) The package is installed, from its wheel. (b) It is absent, and the code beside the weights runs. (c) It is absent,
and the native export is read: no code but transformers'. The Hub is on loopback; the client is the real one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file

from hf_equissl.encoders import save_encoder
from hf_equissl.encoders.export import image_processor
from hf_equissl.encoders.native import save_native
from hf_equissl.modeling import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel

from .environments import ROOT, make_environment, run_there
from .loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow  # four processes that import torch and transformers
SCRIPT = Path(__file__).with_name("load_there.py")
REPO, CLASSIFIER = "maker/encoder", "maker/classifier"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = {0: "cat", 1: "dog", 2: "tree"}
WAYS: dict[str, dict[str, Any]] = {
    "package": {},
    "remote": {"trust_remote_code": True},
    "native": {"subfolder": "native"},
}


@dataclass
class Published:
    """What lies on the Hub, and what it should give."""

    folder: Path
    commit: str
    pictures: list[str]
    expected: dict[str, torch.Tensor]


@dataclass
class Loaded:
    """What one process reports."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def encoder(seed: int) -> EquiSSLModel:
    """Weights of about one everywhere: with small ones, layers that are mixed up would hardly show."""
    torch.manual_seed(seed)
    config = EquiSSLConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        num_register_tokens=2, feature_size=48, equivariant_size=16, layerscale_value=0.5,
    )  # fmt: skip
    model = EquiSSLModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pictures(folder: Path) -> list[str]:
    """A drawn picture, and a photograph where the test data is."""
    drawn = folder / "drawn.png"
    y, x = np.mgrid[0:90, 0:120]
    Image.fromarray(np.stack([2 * x, 255 - 2 * y, (x * y) % 256], 2).astype(np.uint8)).save(drawn)
    data = Path(os.environ.get("EQUISSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    return [str(drawn), *(str(path) for path in sorted(data.glob("camvid/images/**/*.png"))[:1])]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Published]]:
    """Two commits: an older encoder, tagged v1, and the one that main has."""
    folder = tmp_path_factory.mktemp("published")
    files = pictures(folder)
    pixels = image_processor(32, MEAN, STD)([Image.open(f).convert("RGB") for f in files], return_tensors="pt")
    expected = {"pixels": pixels["pixel_values"]}
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        for seed, name in ((0, "old"), (1, "tokens")):
            model = encoder(seed)
            place = save_encoder(model, folder / f"encoder-{name}", MEAN, STD)
            save_native(model, place / "native", MEAN, STD)
            model.save_pretrained(place / "sharded", max_shard_size="200KB")
            api.create_repo(REPO, exist_ok=True)
            commit = api.upload_folder(repo_id=REPO, folder_path=place).oid
            if name == "old":
                first = commit
                api.create_tag(REPO, tag="v1")
            with torch.no_grad():
                expected[name] = model(pixels["pixel_values"]).last_hidden_state
        assert len(list((place / "sharded").glob("*.safetensors"))) > 1
        backbone = EquiSSLBackbone.from_pretrained(place, out_indices=[1, 2]).eval()
        classifier = EquiSSLForImageClassification.from_pretrained(place, id2label=LABELS).eval()
        with torch.no_grad():
            classifier.classifier.weight.normal_()
            expected["logits"] = classifier(pixels["pixel_values"]).logits
            expected["stage1"], expected["stage2"] = backbone(pixels["pixel_values"]).feature_maps
        classifier.save_pretrained(folder / "classifier")
        image_processor(32, MEAN, STD).save_pretrained(folder / "classifier")
        api.create_repo(CLASSIFIER)
        api.upload_folder(repo_id=CLASSIFIER, folder_path=folder / "classifier")
        yield hub, Published(folder, first, files, expected)


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Interpreters, by whether the package is installed."""
    folder = tmp_path_factory.mktemp("environments")
    return {has: make_environment(folder / f"package-{has}", with_package=has) for has in (True, False)}


def job(published: Published, way: str, out: Path) -> dict[str, Any]:
    extra = {} if way == "native" else {"classifier": CLASSIFIER, "sharded": "sharded"}
    return {
        "way": way, "repo": REPO, "options": WAYS[way], "pictures": published.pictures, "out": str(out),
        "old_revisions": ["v1", published.commit], **extra,
    }  # fmt: skip


@pytest.fixture(scope="module")
def loaded(published: tuple[LoopbackHub, Published], environments: dict[bool, Path]) -> dict[str, Loaded]:
    """The three processes, then, with the Hub unreachable, one that reads what the second has left in its cache."""
    hub, content = published
    found: dict[str, Loaded] = {}
    for way in WAYS:
        home = content.folder / f"home-{way}"
        out = content.folder / f"{way}.safetensors"
        facts = run_there(
            environments[way == "package"], SCRIPT, job(content, way, out), hub.env(home, token=None), content.folder
        )
        found[way] = Loaded(facts, load_file(out))
    out = content.folder / "offline.safetensors"
    environment = {**hub.env(content.folder / "home-remote", token=None), "HF_HUB_OFFLINE": "1"}
    asked = len(hub.requests)
    facts = run_there(
        environments[False], SCRIPT, {**job(content, "remote", out), "short": True}, environment, content.folder
    )
    assert len(hub.requests) == asked
    found["offline"] = Loaded(facts, load_file(out))
    return found


def test_environments_are_what_they_say(loaded: dict[str, Loaded], environments: dict[bool, Path]) -> None:
    assert loaded["package"].facts["package"].startswith(str(environments[True].parents[1]))
    assert loaded["package"].facts["imported"] == ["hf_equissl"]
    assert loaded["package"].facts["module"] == "hf_equissl.modeling.modeling_equissl"
    assert not loaded["package"].facts["remote_code"]
    for way in ("remote", "native", "offline"):
        assert loaded[way].facts["package"] is None
        assert loaded[way].facts["imported"] == []
        assert loaded[way].facts["remote_code"] == (way != "native")
        assert loaded[way].facts["module"].startswith("transformers." if way == "native" else "transformers_modules.")


def test_the_command_runs_from_the_wheel(environments: dict[bool, Path], tmp_path: Path) -> None:
    words = [str(environments[True]), "-I", "-m", "hf_equissl", "recipes"]
    listed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {
        path.stem for path in (ROOT / "training" / "recipes").glob("*.yaml")
    }
    words.append("vits16_ibot_se2")
    assert "name: se2" in subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def test_three_ways_give_the_same_tokens(loaded: dict[str, Loaded], published: tuple[LoopbackHub, Published]) -> None:
    expected = published[1].expected
    assert expected["tokens"].shape == (len(published[1].pictures), 1 + 2 + 16, 64)
    assert expected["tokens"].std() > 0.5
    assert (expected["tokens"] - expected["old"]).abs().max() > 0.5
    for way, one in loaded.items():
        assert torch.equal(one.tensors["pixels"], expected["pixels"])
        differences = {
            other: (one.tensors["tokens"] - tokens).abs().max().item()
            for other, tokens in ((name, two.tensors["tokens"]) for name, two in loaded.items())
        }
        print(f"{way}:", ", ".join(f"{other} {value:.1e}" for other, value in differences.items()))
        assert max(differences.values()) <= 1e-6
        assert (one.tensors["tokens"] - expected["tokens"]).abs().max() <= 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_what_a_transformers_user_expects(
    loaded: dict[str, Loaded], published: tuple[LoopbackHub, Published], way: str
) -> None:
    expected, facts, tensors = published[1].expected, loaded[way].facts, loaded[way].tensors

    def close(name: str, to: torch.Tensor, atol: float = 1e-5) -> None:
        torch.testing.assert_close(tensors[name], to, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")

    kind = "Dinov2WithRegisters" if way == "native" else "EquiSSL"
    assert (facts["config"], facts["model"], facts["dtype"]) == (f"{kind}Config", f"{kind}Model", "torch.float32")
    assert facts["processor"].startswith("BitImageProcessor")
    assert facts["eager"] == "eager"
    assert facts["bfloat16"] == "torch.bfloat16"
    assert facts["new_head"] == [len(published[1].pictures), 3]
    for name in ("eager", "device_map_cpu", "device_map_auto", "new_head_tokens"):
        close(name, expected["tokens"])
    close("bfloat16", expected["tokens"], atol=0.2)
    assert not torch.equal(tensors["bfloat16"], expected["tokens"])
    for revision in ("v1", published[1].commit):
        close(f"revision_{revision}", expected["old"])
    for stage in ("stage1", "stage2"):
        close(stage, expected[stage])
    close("pipeline", expected["tokens"][:1])
    if way != "native":
        close("sharded", expected["tokens"])
        close("logits", expected["logits"])
        scores = expected["logits"][0].softmax(-1).tolist()
        assert facts["classes"] == pytest.approx(dict(zip(LABELS.values(), scores, strict=True)), abs=1e-5)


def test_offline_after_a_first_load(loaded: dict[str, Loaded], published: tuple[LoopbackHub, Published]) -> None:
    """Pinned revisions too; the fixture has seen that the Hub was not asked."""
    expected, tensors = published[1].expected, loaded["offline"].tensors
    torch.testing.assert_close(tensors["tokens"], expected["tokens"], rtol=0, atol=1e-6)
    for revision in ("v1", published[1].commit):
        torch.testing.assert_close(tensors[f"revision_{revision}"], expected["old"], rtol=0, atol=1e-6)
