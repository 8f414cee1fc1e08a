"""``training/convert.py``: a folder that loads, what was left out, and one line for mistakes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
)

from hf_equissl.modeling import EquiSSLModel
from hf_equissl.training.convert import main
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock classifier stored at 32 px whose processor crops 24 px."""
    folder = tmp_path_factory.mktemp("convert") / "stock"
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, intermediate_size=128)).save_pretrained(folder)
    processor = BitImageProcessorPil(
        crop_size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def tokens(folder: Path) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return AutoModel.from_pretrained(folder).eval()(images).last_hidden_state


def test_a_stock_encoder_and_back(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "training" / "convert.py"), str(source), "--output_dir", "ours"]
    done = processes.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "classifier (2)" in done.stderr
    assert "AutoModel.from_pretrained('ours')" in done.stdout
    assert main([str(tmp_path / "ours"), "--native", "--output_dir", str(tmp_path / "native")]) == 0
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), EquiSSLModel)
    for name in ("ours", "native"):
        torch.testing.assert_close(tokens(tmp_path / name), tokens(source), atol=1e-5, rtol=1e-5)
        processor = AutoImageProcessor.from_pretrained(tmp_path / name)
        assert processor.crop_size["height"] == 24
        assert list(processor.image_mean) == [0.1, 0.2, 0.3]
        assert list(processor.image_std) == [0.4, 0.5, 0.6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]


def test_an_upstream_file_brings_imagenets_normalisation(tmp_path: Path) -> None:
    state = {
        "cls_token": torch.zeros(1, 1, 64),
        "pos_embed": torch.zeros(1, 5, 64),
        "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8),
        "patch_embed.proj.bias": torch.zeros(64),
        **{f"{norm}.{kind}": torch.ones(64) for norm in ("norm",) for kind in ("weight", "bias")},
    }
    shapes = {"norm1": (64,), "norm2": (64,), "attn.qkv": (192, 64), "attn.proj": (64, 64)}
    for name, shape in {**shapes, "mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}.items():
        state |= {f"blocks.0.{name}.weight": torch.zeros(shape), f"blocks.0.{name}.bias": torch.zeros(shape[0])}
    torch.save({"teacher": state}, tmp_path / "vit.pth")
    arguments = [str(tmp_path / "vit.pth"), "--num_attention_heads", "2", "--image_size", "48"]
    assert main([*arguments, "--output_dir", str(tmp_path / "ours")]) == 0
    assert AutoModel.from_pretrained(tmp_path / "ours").config.num_attention_heads == 2
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert processor.crop_size["height"] == 48


def test_a_source_without_processor_needs_the_normalisation(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    ViTForImageClassification.from_pretrained(source).save_pretrained(bare)
    arguments = [str(bare), "--output_dir", str(tmp_path / "ours")]
    assert main(arguments) == 2
    assert main([*arguments, "--image_mean", "0", "0", "0", "--image_std", "1", "1", "1"]) == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert processor.crop_size["height"] == 32
    assert list(processor.image_std) == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "--output_dir", "new"], "absent"),
        (["stock", "--output_dir", "full"], "holds files already"),
        (["stock", "--output_dir", "new", "--image_size", "30"], "no multiple of the patches' 8 pixels"),
        (["stock", "--output_dir", "new", "--image_mean", "0.5"], "expected 3 values each"),
        (["stock", "--output_dir", "new", "--image_std", "1", "0", "1"], "deviations above 0"),
        (["stock", "--output_dir", "new", "--subfolder", "native"], "native"),
        (["model.pth", "--output_dir", "new"], "No file at"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "stock").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "stock"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"
