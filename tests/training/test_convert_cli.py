"""``training/convert.py``: a folder that loads, what was left out, and one line for mistakes."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
)

from hf_equissl import save_encoder
from hf_equissl.encoders.programs import ProgramError, open_program
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.modeling.layers_equissl import EquiSSLMLP
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
    assert main([str(tmp_path / "ours"), "--to", "native", "--output_dir", str(tmp_path / "native")]) == 0
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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EquiSSL encoder with stem and registers, and two photographs beside it."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    shape = {"num_register_tokens": 2, "feature_size": 32, "equivariant_size": 16}
    save_encoder(EquiSSLModel(EquiSSLConfig(**TINY, **shape)), folder / "encoder", [0.5] * 3, [0.5] * 3)
    (folder / "photos").mkdir()
    for number in range(2):
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number}.png")
    return folder


def test_a_program_for_onnxruntime(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any batch and size within 1e-4 of PyTorch; another size is refused; what int8 loses is measured."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = [str(encoder / "encoder"), "--to", "onnx", "--output_dir", str(tmp_path / "program")]
    assert main([*words, "--int8", "--images", str(encoder / "photos"), "--speed", "--batch_size", "2"]) == 0
    said = capsys.readouterr().out
    assert "images 2 of yours" in said
    assert all(f"  {name} " in said for name in ("PyTorch", "onnx", "onnx int8"))
    assert sorted(path.name for path in (tmp_path / "program").iterdir()) == [
        *(".base", "model.onnx", "model_int8.onnx", "preprocessor_config.json", "program.json")
    ]
    model = AutoModel.from_pretrained(encoder / "encoder").eval()
    program = runtime.InferenceSession(tmp_path / "program" / "model.onnx")
    small = runtime.InferenceSession(tmp_path / "program" / "model_int8.onnx")
    names = [output.name for output in program.get_outputs()]
    assert names == ["last_hidden_state", "pooler_output", "invariant_features", "equivariant_features"]
    lost = json.loads((tmp_path / "program" / "program.json").read_text())["int8_cosine"]
    for shape in [(1, 3, 32, 32), (5, 3, 32, 32), (1, 3, 48, 24), (5, 3, 48, 24), (2, 3, 8, 8)]:
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
        computed = program.run(None, {"pixel_values": images.numpy()})
        rounded = small.run(None, {"pixel_values": images.numpy()})
        for name, value, other in zip(names, computed, rounded, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected[name], atol=1e-4, rtol=1e-4)
            cosine = torch.cosine_similarity(torch.from_numpy(other), expected[name], dim=-1)
            assert 0.9 < cosine.min() < 1 - 1e-7  # it is another program, and near
            assert 0.9 < lost[name]["least"] <= lost[name]["mean"] < 1
    with pytest.raises(Exception, match="cannot be reshaped"):
        program.run(None, {"pixel_values": torch.zeros(1, 3, 32, 36).numpy()})


def test_a_program_of_torch_export(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(encoder / "encoder"), "--to", "torch_export", "--tokens_only"]
    assert main([*words, "--output_dir", str(tmp_path / "program")]) == 0
    assert "multiples of 8 pixels, from 16." in capsys.readouterr().out
    program = torch.export.load(tmp_path / "program" / "model.pt2").module()
    model = AutoModel.from_pretrained(encoder / "encoder").eval()
    for shape in [(1, 3, 32, 32), (5, 3, 48, 24)]:
        images = torch.randn(shape)
        with torch.no_grad():
            tokens, pooled = program(images)
            expected = model(images)
        torch.testing.assert_close(tokens, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.zeros(1, 3, 32, 36))


def test_a_program_that_computes_something_else_is_not_written(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program's feed-forward is a little larger than the encoder's."""
    forward = EquiSSLMLP.forward

    def larger(module: EquiSSLMLP, hidden_states: torch.Tensor) -> torch.Tensor:
        return forward(module, hidden_states) * (1.01 if torch.compiler.is_exporting() else 1.0)

    monkeypatch.setattr(EquiSSLMLP, "forward", larger)
    words = [str(encoder / "encoder"), "--to", "torch_export", "--output_dir", str(tmp_path / "program")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert re.search(r"The program's last_hidden_state differs from PyTorch's by \d\.\de-0[1-4] on 1 images", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["torch_export", "onnx"])
def test_an_encoder_that_no_exporter_takes_ends_in_one_line(
    target: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which way it goes depends on the values of an image, of which a program of tensors knows nothing."""
    if target == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    forward = EquiSSLMLP.forward

    def choosing(module: EquiSSLMLP, hidden_states: torch.Tensor) -> torch.Tensor:
        return forward(module, hidden_states) if hidden_states.sum() > 0 else hidden_states

    monkeypatch.setattr(EquiSSLMLP, "forward", choosing)
    words = [str(encoder / "encoder"), "--to", target, "--output_dir", str(tmp_path / "program")]
    assert main(words) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: torch\.export failed \(\w+: .+\)\. Other versions .* Nothing was written\.", said)
    assert not list(tmp_path.iterdir())


def test_a_program_that_does_not_open_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no program")
    with pytest.raises(ProgramError, match=r"^Opening model\.pt2 failed \(\w+: [^\n]+\)\. Other versions"):
        open_program(tmp_path, "torch_export", ("pooler_output",))


def test_packages_that_are_missing_are_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hf_equissl.encoders.targets.find_spec", lambda name: None if name.startswith("onnx") else find_spec(name)
    )
    assert main(["absent", "--to", "onnx", "--output_dir", str(tmp_path / "program")]) == 2
    said = capsys.readouterr().err
    assert "needs onnx, onnxscript, onnxruntime: pip install 'hf-equissl[onnx]'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stock", "--output_dir", "new", "--int8"], "--int8) is for to='onnx'"),
        (["stock", "--output_dir", "new", "--to", "torch_export", "--int8"], "--int8) is for to='onnx'"),
        (["stock", "--output_dir", "new", "--to", "native", "--tokens_only"], "--tokens_only) is for"),
        (["stock", "--output_dir", "new", "--to", "native", "--speed"], "--speed is for"),
        (["stock", "--output_dir", "new", "--to", "onnx", "--images", "full"], "Give both, or none"),
        (["stock", "--output_dir", "new", "--to", "onnx", "--int8", "--images", "none"], "none"),
        (["stock", "--output_dir", "full", "--to", "torch_export"], "holds files already"),
        (["stock", "--output_dir", "new", "--to", "torch_export", "--image_size", "30"], "no multiple of the patches'"),
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
