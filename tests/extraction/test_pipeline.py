"""Batches overlap, memory stays small, and what stops an extraction is named."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from hf_equissl import EquiSSLModel, save_encoder
from hf_equissl.data import ImageSource
from hf_equissl.encoders import FrozenEncoder
from hf_equissl.encoders.frozen import NonFiniteFeaturesError
from hf_equissl.extraction import ExtractionError, ExtractionSettings, prepare
from hf_equissl.extraction.pipeline import attach_features, begin
from hf_equissl.extraction.reading import Batch
from hf_equissl.extraction.shards import SafetensorsShard, read_record, shard_features

PIXELS = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)


def batch(number: int) -> Batch:
    return Batch(number, False, None, [number], [None], [None], [])


def test_a_batch_is_fetched_when_the_next_one_has_been_begun() -> None:
    seen: list[str] = []

    def start(one: Batch) -> Callable[[], dict[str, Tensor]]:
        seen.append(f"begin {one.shard}")
        return lambda: seen.append(f"fetch {one.shard}") or {}

    given = [one.shard for one, _ in attach_features(map(batch, range(3)), start)]
    assert given == [0, 1, 2]
    assert seen == ["begin 0", "begin 1", "fetch 0", "begin 2", "fetch 1", "fetch 2"]


def test_what_precedes_an_error_is_given_and_nothing_behind_it() -> None:
    def broken() -> Iterator[Batch]:
        yield from map(batch, range(2))
        raise OSError("gone")

    made = attach_features(broken(), lambda one: dict)
    assert [next(made)[0].shard, next(made)[0].shard] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(made)

    def start(one: Batch) -> Callable[[], dict[str, Tensor]]:
        return dict if one.shard else lambda: {}[one.shard]

    with pytest.raises(KeyError):  # a shard without one of its batches must not be finished
        next(attach_features(map(batch, range(3)), start))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_begun_is_what_numpy_rounds(dtype: str) -> None:
    encoder = FrozenEncoder(nn.Flatten(), image_size=4)
    numbers = torch.cat([torch.linspace(-65519, 65519, 48), torch.logspace(-9, 3, 48)]).view(2, 3, 4, 4)
    made = begin(encoder, numbers, ("cls", "backbone"), normalised=True, dtype=dtype)()
    for name, value in encoder.features(numbers, ("cls", "backbone")).items():
        assert made[name].numpy().dtype == dtype
        np.testing.assert_array_equal(made[name].numpy(), value.numpy().astype(dtype))
    plain = begin(encoder, PIXELS / 96, ("cls",), normalised=False, dtype="float32")()["cls"]
    assert torch.equal(plain, encoder.encode(PIXELS / 96, ("cls",))["cls"])


def test_overflow_and_what_is_not_finite_are_named() -> None:
    encoder = FrozenEncoder(nn.Flatten(), image_size=4)
    for worst in (65520.0, -65520.0):
        large = PIXELS.clone()
        large[0, 0, 0, 0] = worst
        result = begin(encoder, large, ("cls", "patches"), normalised=True, dtype="float16")
        with pytest.raises(ExtractionError, match=r"cls exceeds what float16 holds\. Give --dtype float32"):
            result()
        assert begin(encoder, large, ("cls",), normalised=True, dtype="float32")()["cls"].min() <= worst
    for worst in (float("nan"), float("inf"), -float("inf")):
        large[0, 0, 0, 0] = worst
        result = begin(encoder, large, ("cls",), normalised=True, dtype="float16")
        with pytest.raises(NonFiniteFeaturesError, match="its training has diverged"):
            result()


def test_rows_of_tokens_do_not_keep_all_tokens() -> None:
    encoder = FrozenEncoder(_Tokens(), image_size=4)
    for value in (
        encoder.encode(PIXELS, ("cls",))["cls"],
        begin(encoder, PIXELS, ("cls",), normalised=False, dtype="float32")()["cls"],
    ):
        assert value.untyped_storage().nbytes() == value.nbytes


class _Tokens(nn.Module):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.flatten(2)  # (B, 3, 16): a CLS and two patches


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_features_beyond_the_stored_type_or_not_finite_stop_it(
    stored: str,
    encoders: Path,
    tmp_path: Path,
    extract: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = EquiSSLModel.from_pretrained(encoders / "ours")
    with torch.no_grad():
        dict(encoder.named_parameters())[_last_norm(encoder)].fill_(1e6 if stored == "float16" else float("nan"))
    save_encoder(encoder, tmp_path / "far", image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    extract(
        tmp_path / "out", "--encoder", str(tmp_path / "far"), "--dtype", stored, code=2 if stored != "float16" else 1
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    if stored == "float16":
        assert said == "error: cls exceeds what float16 holds. Give --dtype float32."
    else:
        assert said.endswith("gives features that are not finite: its training has diverged.")


def _last_norm(encoder: EquiSSLModel) -> str:
    return [name for name, _ in encoder.named_parameters() if "norm" in name and name.endswith("weight")][-1]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_a_library_raises_names_the_image(
    workers: str,
    pictures: Path,
    tmp_path: Path,
    extract: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PayloadError(Exception):
        pass

    content = ImageSource.content

    def broken(self: ImageSource, row: Mapping[str, Any]) -> bytes:
        if "bear/13.png" in str(row):
            raise PayloadError("Response payload is not completed")
        return content(self, row)

    monkeypatch.setattr(ImageSource, "content", broken)
    monkeypatch.setattr("hf_equissl.extraction.work._SAMPLED", 2)  # the plan does not read it
    folder = extract(tmp_path / "out", "--num_workers", workers, code=1)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {pictures}/bear/13.png, shard 1, cannot be read: PayloadError: Response payload")
    assert [path.name for path in (folder / "data").iterdir()] == ["train-00000-of-00004.parquet"]

    monkeypatch.setattr(ImageSource, "row", lambda self, index: {}[index])
    monkeypatch.setattr("hf_equissl.extraction.work._digest", lambda *_: "")
    extract(tmp_path / "rows", "--num_workers", workers, code=1)
    assert f"{pictures} (train), row 0, cannot be read: KeyError: 0" in capsys.readouterr().err


def test_a_file_of_tensors_takes_no_memory_and_is_what_safetensors_writes(tmp_path: Path) -> None:
    columns = shard_features({"patch_tokens": (200, 64), "cls": (64,)}, "float16", ["a", "b"], True)
    rng = np.random.default_rng(0)
    path = tmp_path / "train-00000-of-00001.safetensors"
    parts = []
    shard = SafetensorsShard(path, columns)
    tracemalloc.start()
    for number in range(60):
        part: dict[str, Any] = {"index": np.arange(3) + 3 * number, "name": ["x", None, "é"], "label": [0, None, 1]}
        part["patch_tokens"] = rng.standard_normal((3, 200, 64)).astype(np.float16)
        part["cls"] = rng.standard_normal((3, 128)).astype(np.float16)[:, ::2]
        parts.append({name: np.array(value) for name, value in part.items() if name not in ("name", "label")})
        shard.add(part)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    shard.close({"rows": 180})
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole["label"] = np.array([0, -1, 1] * 60)
    assert whole["patch_tokens"].nbytes > 4 * 10**6
    assert peak < 3 * 10**6
    found = load_file(path)
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    assert read_record(path) == {"rows": 180}
    metadata = {"hf_equissl": json.dumps({"rows": 180}), "names": json.dumps(["x", None, "é"] * 60)}
    (header, numbers), (own, theirs) = (_split(content) for content in (path.read_bytes(), save(whole, metadata)))
    assert (header, numbers) == (own, theirs)
    assert list(tmp_path.iterdir()) == [path]


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_the_plan_says_who_has_nothing_to_do(
    tars: Path, tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*more: str, **options: object) -> str:
        extract(tmp_path / "out", "--dry_run", *more, **options)
        return capsys.readouterr().out

    said = plan("--streaming", "--num_workers", "8", data=tars)
    assert "5 shards for 1 processes x 8 workers" in said
    assert "\nwarning   one worker reads a shard of the source from end to end: 5 of 8 workers decode. Leave" in said
    for enough in (plan("--streaming", "--num_workers", "5", data=tars), plan("--num_workers", "8")):
        assert "warning" not in enough


def test_the_plan_of_many_processes(encoders: Path, pictures: Path, tars: Path, tmp_path: Path) -> None:
    words = {"encoder": str(encoders / "ours"), "output_dir": str(tmp_path / "out")}
    work = prepare(ExtractionSettings(**words, data=str(tars), source_options={"streaming": True}))
    said = work.describe(work.shards, 8, 0)
    assert "5 shards for 8 processes x 0 workers" in said
    assert "5 of 8 workers decode, and 3 of 8 processes have nothing to do. Leave out --streaming" in said
    assert "warning" not in work.describe([], 8, 4)
    work = prepare(ExtractionSettings(**words, data=str(pictures), shard_size=12, file_format="safetensors"))
    assert "4 shards, and 4 of 8 processes have nothing to do: lower --shard_size." in work.describe(work.shards, 8, 4)
    assert "warning" not in work.describe(work.shards, 4, 4)


def test_the_cores_decide_how_many_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ExtractionSettings(encoder="e", data="d", output_dir="o")
    for cores, processes, workers in ((192, 8, 24), (256, 1, 32), (4, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert settings.workers(processes) == workers


def test_waiting_for_images_is_said(
    tmp_path: Path,
    extract: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = ImageSource.row
    monkeypatch.setattr(ImageSource, "row", lambda self, index: time.sleep(0.05) or row(self, index))
    folder = extract(tmp_path / "out")
    run = json.loads((folder / "extraction.json").read_text())["splits"]["train"]["runs"][0]
    assert 0.3 < run["data_wait"] <= 1
    said = capsys.readouterr().out
    assert (
        f"the encoder waited for images {run['data_wait']:.0%} of the time: give more --num_workers (now 0 for" in said
    )
