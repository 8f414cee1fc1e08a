"""Encoders that mean harm, or are another thing than they say: one sentence, nothing asked, nothing run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_equissl.extraction.cli import main


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def says(encoder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    paths = ["--encoder", str(encoder), "--data", str(pictures), "--output_dir", str(tmp_path / "features")]
    assert main([*paths, "--dry_run", *words]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return err.strip().splitlines()[-1]


def test_code_beside_an_image_processor_is_refused_without_asking(
    encoders: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = shutil.copytree(encoders / "vit", tmp_path / "vit")
    change(encoder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.Own"}, image_processor_type="Own")
    (encoder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    assert "comes with code of its own" in says(encoder, pictures, tmp_path, capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"hidden_size": 10**9}, "hidden_size is 1e+09"),
        ("config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers is 1e+07"),
        ("config.json", {"num_hidden_layers": 9999, "hidden_size": 6000}, "which no machine holds"),
        ("config.json", {"image_size": 10**6}, "image_size is 1e+06"),
        ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, "size.height is 1e+06"),
        ("preprocessor_config.json", {"size": {"height": 0, "width": 0}}, "size.height is 0"),
        ("preprocessor_config.json", {"image_std": [float("nan"), 1, 1]}, "image_std is [nan, 1, 1]"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "deviations above 0"),
    ],
)
def test_sizes_that_no_machine_holds(
    file: str,
    values: dict[str, Any],
    message: str,
    encoders: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("ours", "vit"):
        encoder = shutil.copytree(encoders / name, tmp_path / name)
        change(encoder / file, **values)
        assert message in says(encoder, pictures, tmp_path, capsys)


def test_a_folder_has_no_revision(
    encoders: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no revision" in says(encoders / "ours", pictures, tmp_path, capsys, "--revision", "main")
    assert "have revisions" in says(encoders / "ours", pictures, tmp_path, capsys, "--data_revision", "main")
