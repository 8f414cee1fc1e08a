from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hf_equissl.data import load_images
from hf_equissl.evaluation import cli, load_evaluation_data, load_records, runner
from hf_equissl.evaluation.runner import check_output_dir
from tests import processes

from .conftest import coloured

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder and a tiny image folder with three classes and two splits, and one of loose images."""
    root = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4
    )
    for name in ("encoder", "other"):
        Dinov2Model(config).save_pretrained(root / name)
        BitImageProcessor(crop_size={"height": 16, "width": 16}).save_pretrained(root / name)
    for split, count, seed in (("train", 60, 0), ("test", 24, 1)):
        images, labels = coloured(count, seed, 3, size=18)
        for number, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            target = root / "images" / split / "abc"[label] / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
            (root / "flat").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / "flat" / f"{split}{number}.png")
    return root


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "--encoder", str(folder / "encoder"), "--data", str(folder / "images"), "--output_dir", str(output),
        "--tests", "rotation", "flip", "--seeds", "1", "--epochs", "2", "--num_draws", "1", "--fill", "reflect", *more,
    ]  # fmt: skip


def test_command_line_end_to_end_and_resume(folder: Path, tmp_path: Path) -> None:
    done = processes.run([sys.executable, str(ROOT / "training" / "probe.py"), *arguments(folder, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "rotation r2 [reflect]" in done.stdout
    assert "linear top1" in done.stdout
    assert (tmp_path / "results.md").read_text().startswith("| encoder |")
    first = (tmp_path / "results.json").read_text()
    records = load_records(tmp_path / "results.json")
    assert {(record.evaluator, record.task) for record in records} == {
        ("transformation_regression", "rotation"),
        ("transformation_regression", "flip"),
        *((("equivariance", task)) for task in ("rotation", "hflip", "scale")),
        ("linear", "classification"),
        ("knn", "classification"),
        ("effective_rank", "representation"),
    }
    assert all(record.command.startswith("python training/probe.py --encoder") for record in records)
    assert all(record.seeds == (0,) for record in records)

    # Again: nothing is computed, nothing changes. Then one more seed, and one more encoder.
    cli.main(arguments(folder, tmp_path))
    assert (tmp_path / "results.json").read_text() == first
    cli.main(arguments(folder, tmp_path, "--encoder", str(folder / "other"), "--seeds", "2"))
    later = load_records(tmp_path / "results.json")
    assert {record.seeds for record in later if record.evaluator == "transformation_regression"} == {(0, 1)}
    assert {Path(record.encoder).name for record in later} == {"encoder", "other"}
    kept = {record.key: record for record in records}
    assert all(record.values[0] == kept[record.key].values[0] for record in later if record.key in kept)
    assert sum(record.key in kept for record in later) == len(kept)

    # The table holds what the folder holds, not what the last command asked for.
    cli.main(arguments(folder, tmp_path, "--evaluators", "knn"))
    assert "rotation r2" in (tmp_path / "results.md").read_text()


def test_overwrite_and_changed_weights_compute_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = arguments(folder, tmp_path, "--evaluators", "knn")
    calls = []
    real = runner.save_records
    monkeypatch.setattr(runner, "save_records", lambda *a: (calls.append(1), real(*a)))
    cli.main(quick)
    cli.main(quick)
    assert len(calls) == 1
    cli.main([*quick, "--overwrite"])
    assert len(calls) == 2
    cli.main([*quick, "--image_size", "12"])
    assert len(calls) == 3
    assert len({record.encoder_digest for record in load_records(tmp_path / "results.json")}) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tests", "rotatoin"], "rotation"),
        (["--evaluators", "lineer"], "Did you mean 'linear'"),
        (["--encoder", "/no/such/encoder"], "No encoder at '/no/such/encoder'"),
        (["--data", "/no/such/data"], "/no/such/data"),
        (["--features", "equivariant"], "no features"),
        (["--label_column", "klass"], "klass"),
        (["--test_split", "tset"], "tset"),
        (["--train_subset", "0.2"], "--train_subset 0.2: expected fields, such as '{share: 0.2"),
        (["--train_subset", "{part: half, share: 0.2}"], "expected first or rest, got 'half'"),
        (["--train_subset", "{shares: 0.2}"], "Did you mean 'share'"),
        (["--train_images", "0"], "train_images must be at least 1"),
        (["--max_bad_share", "2"], "(--max_bad_share) must be a share from 0 to 1, got 2.0"),
        (["--device", "gpu"], "--device gpu: not a device"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--image_size", "18"], "Give 16 or 20"),
        (["--set", "knn.k"], "--set knn.k: expected EVALUATOR.KEY=VALUE"),
        (["--set", "kn.k=3"], "Did you mean 'knn'"),
        (["--set", "knn.kk=3"], "Did you mean 'k'"),
        (["--set", "knn.k=0"], "k must be at least 1"),
        (["--set", "knn.k=many"], "expected an integer, got 'many'"),
        (["--further_test", "a", "b", "c"], "expected a source, or a source and a split"),
        (["--further_test", "/no/such/data"], "/no/such/data"),
        (["--value_range", "half"], "--value_range: expected full, auto or two numbers such as [0, 4095], got 'half'"),
        (["--value_range", "5,5"], "expected full, auto, or two numbers [a, b] with a below b"),
        (["--max_pixels", "100"], "18 x 18 = 324 pixels are more than max_pixels = 100. To read it, set --max_pixels"),
    ],
)
def test_mistakes_end_in_one_line_before_compute(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments(folder, tmp_path, *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_flat_folder_needs_no_labels_until_they_are_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = [*arguments(folder, tmp_path), "--data", str(folder / "flat")]
    with pytest.raises(SystemExit):
        cli.main([*flat, "--evaluators", "linear"])
    assert "LinearEvaluator needs labels" in capsys.readouterr().err
    cli.main(flat)
    records = load_records(tmp_path / "results.json")
    assert {record.evaluator for record in records} == {"effective_rank", "equivariance", "transformation_regression"}
    assert {record.split for record in records} == {"train (held-out)"}


def test_too_many_held_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*arguments(folder, tmp_path), "--data", str(folder / "flat"), "--test_images", "80"])
    assert "(--test_images) is 80" in (message := capsys.readouterr().err)
    assert "4 would be left" in message


def test_messages_name_flags_of_this_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit):
        cli.main([*arguments(folder, tmp_path / "out"), "--data", str(tmp_path / "train.parquet")])
    message = capsys.readouterr().err
    assert "name the image column: --image_column" in message


def test_files_that_do_not_decode_are_named_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shutil.copytree(folder / "flat", tmp_path / "photos")
    (photos / "broken.png").write_bytes(b"no image")
    quick = [*arguments(folder, tmp_path / "out"), "--data", str(photos)]
    with pytest.raises(SystemExit):
        cli.main(quick)
    assert "broken.png" in (message := capsys.readouterr().err)
    assert "--max_bad_share" in message
    with caplog.at_level("WARNING"):
        cli.main([*quick, "--max_bad_share", "0.2"])
    skipped = [text for text in caplog.messages if text.startswith("Skipped")]
    assert len(skipped) == 1
    assert "broken.png" in skipped[0]


def test_one_encoder_is_measured_once_however_it_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    quick = ["--data", "images", "--output_dir", str(tmp_path), "--evaluators", "knn", "--encoder", "encoder/"]
    cli.main([*quick, "--encoder", "encoder", "--encoder", str(folder / "encoder")])
    records = load_records(tmp_path / "results.json")
    assert {record.encoder for record in records} == {"encoder"}
    # What is recorded of paths is what was typed.
    assert all("--encoder encoder/ --encoder encoder" in record.command for record in records)
    assert {record.dataset for record in records} == {"images"}
    cli.main([*quick[:-1], "./encoder"])
    assert load_records(tmp_path / "results.json") == records


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_output_dir(tmp_path / "file" / "results")


def test_held_out_and_subsets_are_fixed_and_disjoint(folder: Path) -> None:
    data = load_evaluation_data(str(folder / "flat"), progress=False)
    again = load_evaluation_data(str(folder / "flat"), progress=False)
    assert (len(data.train), len(data.test)) == (76, 8)
    assert [*data.test.images] == [*again.test.images]
    assert not {*data.train.images} & {*data.test.images}
    small = load_evaluation_data(str(folder / "images"), train_images=10, test_images=5, progress=False)
    assert (len(small.train), len(small.test), small.test.split) == (10, 5, "test")
    assert small.train.labels is not None


def test_probes_are_fitted_on_the_part_that_was_known_in_training(folder: Path) -> None:
    known = cli.read_subset("{share: 0.25, stratified: true}")
    data = load_evaluation_data(str(folder / "images"), train_subset=known, progress=False)
    whole = load_evaluation_data(str(folder / "images"), progress=False)
    source = load_images(folder / "images", subset=known)
    assert [*data.train.images] == [source.content(source.row(n)) for n in range(len(source))]
    assert data.train.labels.bincount().tolist() == [round(0.25 * n) for n in whole.train.labels.bincount().tolist()]
    assert (len(data.test), whole.train.split) == (len(whole.test), "train")
    assert data.train.split == "train (0.25 of the images of each class, seed 0)"  # which protocols record
    with pytest.raises(ValueError, match="Leave out streaming"):
        load_evaluation_data(str(folder / "images"), train_subset={"share": 0.5}, streaming=True, progress=False)


def test_cifar10(shared_data: Path) -> None:
    data = load_evaluation_data(str(shared_data / "cifar10"), train_images=20, test_images=10, progress=False)
    assert data.train.labels.max() < 10
    _, pixels = next(iter(data.train.batches(32)))
    assert pixels.shape == (20, 3, 32, 32)
    assert json.dumps(data.test.dataset).endswith('cifar10"')


def test_further_test_sets_have_the_classes_of_the_training_images(folder: Path, tmp_path: Path) -> None:
    for name, kept in (("fewer", "bc"), ("others", "bz")):
        for new, old in zip(kept, "bc", strict=True):
            shutil.copytree(folder / "images" / "test" / old, tmp_path / name / "test" / new)
    data = load_evaluation_data(str(folder / "images"), further_tests=[[str(tmp_path / "fewer")]], progress=False)
    assert set(data.tests[1].labels.tolist()) == {1, 2}  # not 0 and 1, which are its own numbers
    assert (data.tests[1].split, data.num_classes) == ("test", 3)
    for wrong in ({"further_tests": [[str(tmp_path / "others")]]}, {"test_split": "other"}):
        shutil.copytree(folder / "images", tmp_path / "images", dirs_exist_ok=True)
        shutil.copytree(tmp_path / "others" / "test", tmp_path / "images" / "other", dirs_exist_ok=True)
        with pytest.raises(ValueError, match=r"1 class that .* does not have: 'z'"):
            load_evaluation_data(str(tmp_path / "images"), progress=False, **wrong)


def test_a_test_split_without_a_class_is_numbered_as_the_training_split(folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder / "images", tmp_path / "images")
    shutil.rmtree(data / "test" / "a")
    loaded = load_evaluation_data(str(data), progress=False)
    assert (set(loaded.test.labels.tolist()), loaded.num_classes) == ({1, 2}, 3)
    streams = load_evaluation_data(str(data), streaming=True, progress=False)
    assert streams.test.labels.tolist() == loaded.test.labels.tolist()


def test_a_range_of_values_is_used_and_recorded_and_what_is_left_out_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "deep"
    data.mkdir()
    for number, path in enumerate(sorted((folder / "flat").glob("*.png"))[:24]):
        values = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(values * 16).save(data / f"{number}.png")
    (data / "a.CR2").write_bytes(b"raw")
    quick = [*arguments(folder, tmp_path / "out"), "--data", str(data), "--evaluators", "effective_rank"]
    with caplog.at_level("INFO"):
        cli.main(quick)
    assert "note: 1 file of other types (.CR2) are left out" in caplog.messages
    assert any("use only" in message and "--value_range" in message for message in caplog.messages)
    dark = [record.value for record in load_records(tmp_path / "out" / "results.json")]
    cli.main([*quick, "--value_range", "[0, 4095]"])
    found: dict[str, list[float]] = {}
    for record in load_records(tmp_path / "out" / "results.json"):
        found.setdefault(str(record.protocol.get("value_range")), []).append(record.value)
    assert found.keys() == {"None", "[0.0, 4095.0]"}
    assert found["None"] == dark
    assert len(found["[0.0, 4095.0]"]) == len(dark)
    assert found["[0.0, 4095.0]"] != dark
