"""Mistakes end in one line before anything is computed; the plan; publishing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard, HfApi
from PIL import Image

from hf_equissl.extraction import work
from hf_equissl.extraction.cli import main
from tests.hub.loopback_hub import LoopbackHub

pytest_plugins = ["tests.hub.fixtures"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "cls", "patch_token"], "--features: there is no 'patch_token'. Did you mean 'patch_tokens'?"),
        (["--dtype", "float61"], "--dtype float61: expected one of float32, float16. Did you mean 'float16'?"),
        (["--format", "parket"], "--format parket: expected one of parquet, safetensors. Did you mean 'parquet'?"),
        (["--precision", "int8"], "--precision int8: expected one of auto, fp32, bf16, fp16"),
        (["--shard_size", "0"], "--shard_size 0: expected 1 or more"),
        (["--batch_size", "-1"], "--batch_size -1: expected 1 or more"),
        (["--max_bad_share", "2"], "--max_bad_share 2.0: expected a share from 0 to 1"),
        (["--num_workers", "-2"], "--num_workers -2: expected 0 or more"),
        (["--image_size", "18"], "Give 16 or 20"),
        (["--encoder", "/no/such/encoder"], "No encoder at '/no/such/encoder'"),
        (["--data", "/no/such/data"], "/no/such/data: no such file or folder"),
        (["--split", "tset"], "no split 'tset'"),
        (["--label_column", "klass"], "there is no label_column 'klass'"),
        (["--device", "gpu"], "--device gpu: not a device"),
        (["--streaming", "--shard_size", "5"], "--shard_size: of a stream, each shard of the source"),
        (["--value_range", "5,5"], "expected full, auto, or two numbers"),
        (["--max_pixels", "9"], "pixels are more than max_pixels = 9. To read it, set --max_pixels"),
        (["--push_to_hub", "--repo_id", "me/features"], "The licence is yours to say"),
        (["--license", "mit"], "--license belongs to --push_to_hub"),
        (["--private"], "--private belongs to --push_to_hub"),
        (["--push_to_hub", "--repo_id", "nowhere"], "--repo_id is 'nowhere', expected OWNER/NAME"),
    ],
)
def test_mistakes_end_in_one_line_before_compute(
    tmp_path: Path,
    command: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(command(tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]  # behind the bar of the weights
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_stock_encoders_have_no_stem(
    tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tmp_path / "out", "--features", "equivariant", encoder="vit", code=2)
    assert "has no features ['equivariant']: choose among cls, patches, backbone, cls_4" in capsys.readouterr().err


def test_a_processor_of_many_sizes_is_refused(
    encoders: Path, tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(encoders / "ours", tmp_path / "encoder"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_center_crop": False}))
    extract(tmp_path / "out", "--encoder", str(folder), code=2)
    assert "Features need images of one square size: give --image_size" in capsys.readouterr().err


@pytest.mark.parametrize("unusual", [{"rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"do_rescale": False}])
def test_an_unusual_processor_is_followed_to_the_letter(
    unusual: dict[str, object], encoders: Path, pictures: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    """Pixels divided by 127.5 or not at all: the short way over uint8 is not taken. Not normalised: it is."""
    from .test_content import direct, loaded

    folder = Path(shutil.copytree(encoders / "vit", tmp_path / "encoder"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **unusual}))
    rows = loaded(extract(tmp_path / "out", "--encoder", str(folder), "--limit", "6"), tmp_path)
    wanted = direct(folder, pictures, list(rows["name"]))
    usual = direct(encoders / "vit", pictures, list(rows["name"]))
    assert abs(wanted["cls"] - usual["cls"]).max() > 1e-2
    assert abs(rows[:]["cls"] - wanted["cls"]).max() < 1e-5


def test_the_plan_is_printed_and_nothing_written(
    tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tmp_path / "out", "--features", "cls", "patch_tokens", "--dry_run")
    plan = capsys.readouterr().out
    assert "41 images" in plan
    assert "cls 16, patch_tokens 16 x 16; float32, 1.1 KiB per image" in plan
    assert "4, of 12 images, parquet" in plan
    assert "of other types" not in plan
    assert not (tmp_path / "out").exists()


def test_a_range_of_values_is_used_and_recorded_and_what_is_left_out_is_said(
    tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "deep"
    data.mkdir()
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 4096, (20, 20), dtype=np.uint16)
        Image.fromarray(values).save(data / f"{number}.png")
    (data / "a.HEIC.txt").write_bytes(b"text")
    features = []
    for name, more in (("full", []), ("set", ["--value_range", "0,4095"])):
        folder = extract(tmp_path / name, *more, data=data)
        features.append(
            datasets.load_dataset("parquet", data_dir=str(folder / "data"), cache_dir=tmp_path)["train"]["cls"]
        )
        record = json.loads((folder / "extraction.json").read_text())
        assert record["encoding"].get("value_range") == ([0.0, 4095.0] if more else None)
        said = capsys.readouterr().out
        assert "note: 1 file of other types (.txt) are left out" in said
        assert ("become almost black" in said) == (not more)
    assert features[0] != features[1]
    extract(tmp_path / "set", data=data, code=2)
    assert "value_range = [0.0, 4095.0], and this command says 'full'" in capsys.readouterr().err
    extract(tmp_path / "full", "--value_range", "0,4095", data=data, code=2)
    assert "value_range = 'full', and this command says [0.0, 4095.0]" in capsys.readouterr().err


def test_too_small_a_disk_is_noticed_first(
    tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(work.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    extract(tmp_path / "out", code=2)
    assert "4 shards take 7.8 KiB, and 1000 bytes are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_publish(
    hub_here: LoopbackHub, api: HfApi, pictures: Path, tmp_path: Path, extract: Callable[..., Path]
) -> None:
    extract(tmp_path / "out", "--push_to_hub", "--repo_id", "maker/features", "--private", "--license", "cc0-1.0")
    assert api.dataset_info("maker/features").private
    files = set(api.list_repo_files("maker/features", repo_type="dataset"))
    shards = {f"data/train-{shard:05d}-of-00004.parquet" for shard in range(4)}
    assert files >= {"README.md", "extraction.json", *shards}
    record = Path(api.hf_hub_download("maker/features", "extraction.json", repo_type="dataset")).read_text()
    assert str(pictures.parent) not in record
    assert json.loads(record)["splits"]["train"]["rows"] == 40
    card = DatasetCard.load(api.hf_hub_download("maker/features", "README.md", repo_type="dataset"))
    assert card.data.license == "cc0-1.0"
    assert "Features: cc0-1.0, as the publisher of this repository states." in card.text
    assert 'load_dataset("maker/features"' in card.text
    shard = api.hf_hub_download("maker/features", "data/train-00000-of-00004.parquet", repo_type="dataset")
    assert datasets.Dataset.from_parquet(shard, cache_dir=str(tmp_path / "cache")).num_rows == 12
    # A licence of one's own brings its text, which goes with it.
    (tmp_path / "text").write_text("Only on Sundays.")
    push = ["--push_to_hub", "--repo_id", "maker/features", "--license"]
    extract(tmp_path / "out", *push, "other", "--license_name", "sundays", "--license_file", str(tmp_path / "text"))
    text = api.hf_hub_download("maker/features", "LICENSE.md", repo_type="dataset")
    assert Path(text).read_text() == "Only on Sundays."
    assert "[sundays](LICENSE.md)" in DatasetCard.load("maker/features", repo_type="dataset").text
    extract(tmp_path / "out", *push, "mit")
    assert "LICENSE.md" not in api.list_repo_files("maker/features", repo_type="dataset")


@pytest.mark.parametrize(
    ("terms", "asked"), [("", "weights ours: terms unknown"), ("license: cc-by-nc-4.0", "inherit")]
)
def test_the_terms_of_the_encoder_are_asked_for(
    encoders: Path,
    tmp_path: Path,
    command: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    terms: str,
    asked: str,
) -> None:
    shutil.copytree(encoders / "ours", tmp_path / "ours")
    for folder, said in (("ours", terms), ("images", "license: mit")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "README.md").write_text(f"---\ntags: [x]\n{said}\n---\n")
    words = command(tmp_path / "out", "--push_to_hub", "--repo_id", "me/features", data=tmp_path / "images")
    assert main([*words, "--encoder", str(tmp_path / "ours")]) == 2
    assert asked in capsys.readouterr().err
