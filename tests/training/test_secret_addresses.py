"""Data behind a password and a signature: trained on, resumed under another one, extracted, and never repeated."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from hf_equissl.extraction.cli import main as extract
from hf_equissl.pretraining.run_record import RunRecord
from hf_equissl.training import pretrain
from tests.data.file_server import serving
from tests.hub.tiny_run import RECIPE

SECRETS = ("t0ps3cretPass", "S1gnature", "T0kenOfAws", "UnnamedS3cret")


def texts(folder: Path) -> dict[str, str]:
    return {str(path): path.read_bytes().decode(errors="ignore") for path in folder.rglob("*") if path.is_file()}


def test_no_secret_of_an_address_is_kept_or_said(
    photo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served" / "a.tar", "w") as tar:
        for path in sorted(photo_folder.iterdir()):
            tar.add(path, path.name)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    run, features = tmp_path / "run", tmp_path / "features"
    with serving(tmp_path / "served") as server:

        def address(number: int) -> str:
            where = server.address.replace("://", "://ada:t0ps3cretPass@")
            return f"{where}/a.tar?sig=S1gnature{number}&X-Amz-Security-Token=T0kenOfAws&z=UnnamedS3cret"

        def train(number: int, *more: str) -> int:
            words = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", address(number), "--data.streaming", "true"]
            return pretrain.main([*words, "--output_dir", str(run), *more])

        assert train(1) == 0
        shutil.rmtree(run / "checkpoint-4")
        shutil.rmtree(run / "encoder")
        assert train(2) == 0  # the same data, signed anew
        said = capfd.readouterr()
        assert "resuming from" in said.out
        assert "is not the data that this run has read" not in said.out + said.err
        assert train(3, "--data.column", "none") == 2
        words = ["--encoder", str(run / "encoder"), "--data", address(4), "--streaming", "--output_dir", str(features)]
        assert extract(words) == 0
    after = capfd.readouterr()
    assert "127.0.0.1" in after.err  # the error names the address
    assert RunRecord.load(run).data.startswith(f"{server.address}/a.tar?sig=removed")
    everything = {**texts(run), **texts(features), "said": said.out + said.err + after.out + after.err}
    found = {(name, secret) for name, text in everything.items() for secret in SECRETS if secret in text}
    assert found == set()
