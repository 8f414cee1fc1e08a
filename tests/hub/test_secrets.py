"""What travels to the Hub holds no secret, and only what belongs to what is published."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hf_equissl.checkpoints import Manifest
from hf_equissl.encoders import save_encoder
from hf_equissl.evaluation.results import ResultRecord, load_records, save_records
from hf_equissl.hub import PublishError, build_repository, check_publishable
from hf_equissl.hub.contents import check_secrets, list_left_behind, list_published
from hf_equissl.modeling import EquiSSLModel
from hf_equissl.utils.strict_yaml import dump_yaml, load_yaml
from tests.utils.secrets import ALL, SECRETS, left_in

from .test_push import CARD, SETTINGS, TINY
from .tiny_run import copy_of, records_of, run

__all__ = ["run"]  # a fixture
SURE = [text for secret, text in SECRETS.items() if secret != "h0neyNamedByNobody"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    torch.manual_seed(0)
    save_encoder(EquiSSLModel(TINY), folder, **SETTINGS)
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text("[]")
    return folder


def _give_away(run: Path) -> None:
    """Write all secrets into every text of a run, as a version without redaction may have left them."""
    recipe = load_yaml((run / "recipe.yaml").read_text(), "recipe.yaml")
    recipe |= {"name": ALL, "description": ALL, "monitor": {"source": ALL}}
    recipe["data"] |= {"source": f"{ALL} (train)", "column": ALL}
    recipe["training"] |= {"hub_model_id": ALL, "run_name": ALL}
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    record = json.loads((run / "run.json").read_text())
    record |= {"command": f"python x.py --data '{ALL}'", "data": ALL, "hardware": {"device": ALL, "cpu": ALL}}
    record["versions"]["torch"] = ALL
    (run / "run.json").write_text(json.dumps(record))
    (checkpoint,) = run.glob("checkpoint-4")
    manifest = Manifest.read(checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 4, "loss": 1.0, "loss_ssl": 1.0, "loss_note": 2.0, "note": ALL}]
    state |= {"trial_name": ALL}
    size = (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    files = {**manifest.files, "trainer_state.json": size}
    replace(manifest, files=files, checksums={}).write(checkpoint)  # such a version wrote no checksums


def test_no_secret_is_published_wherever_it_stood(
    run: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_equissl.hub.repository.run_snippets", lambda *_: None)  # a new interpreter
    _give_away(copy_of(run, tmp_path / "run"))
    records = []
    for known in records_of(run, photo_folder):
        known = replace(known, protocol={**known.protocol, "note": ALL, "api_key": "abcd1234"})
        details = {"note": [ALL for _ in known.seeds]}
        records.append(replace(known, dataset=ALL, split=ALL, command=f"probe '{ALL}'", details=details))
    assert all(left_in(f"{record.dataset}{record.command}{record.protocol}") == [] for record in records)
    save_records(records, tmp_path / "results.json")
    assert left_in((tmp_path / "results.json").read_text()) == []
    assert [record.key for record in load_records(tmp_path / "results.json")] == [record.key for record in records]
    built = build_repository(
        tmp_path / "run",
        tmp_path / "built",
        repo_id="some-lab/tiny",
        parts=("pretraining", "figures", "card"),
        results=records,
        description=f"My words. {ALL}",
    )
    for path in built.rglob("*"):
        if path.is_file():
            assert left_in(path.read_bytes().decode(errors="ignore")) == [], path.name
    assert "My words." in (built / "README.md").read_text()
    check_publishable(built)


@pytest.mark.parametrize("text", SURE)
def test_a_push_refuses_what_still_holds_one(repository: Path, tmp_path: Path, text: str) -> None:
    """In every kind of file, also where JSON or gzip hide it; no message repeats it."""
    escaped = json.dumps(text).replace("e", "\\u0065").replace("s", "\\u0073")
    table = pa.table({"name": ["a.png", f"{text} https://x"]}).replace_schema_metadata({"a": "b"})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.select([]).replace_schema_metadata({"note": text}), tmp_path / "b.parquet")
    (tmp_path / "a.gz").write_bytes(gzip.compress(gzip.compress(f"a note: {text}".encode())))
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"note": text})
    carriers: dict[str, Path | bytes] = {
        "README.md": f"{CARD}\n{text}\n".encode(),
        "results.json": f'{{"results": [{{"dataset": {escaped}}}]}}'.encode(),
        "log.jsonl": f'{{"a": 1}}\n{{"b": {escaped}}}\n'.encode(),
        "wide.txt": text.encode("utf-16"),
        **{name: tmp_path / name for name in ("a.gz", "a.parquet", "b.parquet", "a.safetensors")},
    }
    for name, content in carriers.items():
        with pytest.raises(PublishError, match=f"{name} holds what looks like a") as caught:
            check_secrets({name: content})
        assert left_in(str(caught.value)) == []
    (repository / "results.json").write_text(json.dumps({"note": text}))
    with pytest.raises(PublishError, match=r"results.json holds what looks like a"):
        check_publishable(repository)


def test_only_what_belongs_to_the_model_is_published(repository: Path) -> None:
    named = set(list_published(repository))
    assert {"README.md", "results.json", "config.json", "model.safetensors", "preprocessor_config.json"} < named
    assert "modeling_equissl.py" in named
    for name in ("notes.txt", "wandb/settings", "wandb/config.json", "data/pw.txt", "helper.py", ".env"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    check_publishable(repository)
    assert set(list_published(repository)) == named
    assert list_left_behind(repository) == [
        "data/pw.txt",
        "helper.py",
        "notes.txt",
        "wandb/config.json",
        "wandb/settings",
    ]
    (repository / "id_rsa").write_text("x")
    with pytest.raises(PublishError, match="id_rsa is called as files with keys"):
        check_publishable(repository)


def _link(name: str, target: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return link


@pytest.mark.parametrize(
    "plant", [_link("notes.txt", "/etc/passwd"), _link("README.md", "../outside.md"), _link("native", "../..")]
)
def test_no_link_leads_out_of_the_folder(repository: Path, plant: Callable[[Path], object]) -> None:
    (repository.parent / "outside.md").write_text(CARD)
    _link("LICENSE", "README.md")(repository)
    check_publishable(repository)  # a link inside the folder is fine
    plant(repository)
    with pytest.raises(PublishError, match="is a link that leads out of"):
        check_publishable(repository)


def test_records_of_before_lose_their_secrets(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps({"format": 1, "results": [{**_entry(), "dataset": ALL, "command": ALL, "encoder": ALL}]})
    )
    (record,) = load_records(tmp_path / "results.json")
    assert left_in(str(record)) == []


def _entry() -> dict[str, object]:
    return ResultRecord(
        evaluator="knn",
        task="classification",
        metric="top1",
        features="cls",
        values=(0.5,),
        seeds=(0,),
        primary=True,
        dataset="d",
        split="test",
        protocol={},
        encoder="e",
        encoder_digest="0",
    ).to_dict()
