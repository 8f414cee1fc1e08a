"""The cards of features and of fine-tuned models: no name changes them, and no secret is in them."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from hf_equissl.evaluation.results import ResultRecord
from hf_equissl.extraction.card import write_card as write_features_card
from hf_equissl.extraction.push import _public
from hf_equissl.finetuning.adapters import Description
from hf_equissl.finetuning.card import write_card as write_finetuned_card
from hf_equissl.hub.privacy import public_record, public_source
from tests.utils.secrets import ALL, left_in
from tests.utils.test_markdown import HOSTILE

from .test_card import structure


def extraction_of(word: str, file_format: str) -> dict[str, Any]:
    split = {
        "complete": True,
        "data": word,
        "options": {"column": word},
        "columns": {"image": word, "label": word},
        "classes": ["a"],
        "selection": {"split": word, "shards": 2},
        "command": shlex.join(["python", "x.py", "--data", word]),
        "rows": 3,
        "bytes": 4,
        "skipped": [{"index": 1, "name": word, "reason": f"broken: {word}"}],
        "runs": [{"images_per_second": 1.0, "processes": 1, "device": "cpu"}],
        "versions": {"torch": word},
    }
    encoding = {
        "encoder_class": "ViTModel",
        "encoder_digest": "0",
        "precision": "fp32",
        "preprocessing": {"size": word},
        "features": {"cls": [8]},
        "dtype": "float32",
        "format": file_format,
    }
    encoder = {"encoder": word, "encoder_options": {"revision": word}, "encoder_commit": None}
    return {"format_version": 1, **encoder, "encoding": encoding, "splits": {"train": split}}


def features_card(folder: Path, word: str, file_format: str = "parquet", name: str | None = None) -> str:
    folder.mkdir(exist_ok=True)
    write_features_card(folder, extraction_of(word, file_format), name=name or word)
    return (folder / "README.md").read_text(encoding="utf-8")


def finetuned_card(folder: Path, word: str, adapter: bool = False) -> str:
    folder.mkdir(exist_ok=True)
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    sizes = {"model_type": "equissl", "hidden_size": 8}
    description = Description("lora", word, None, "", "0" * 64, sizes, word, ["red", word], 32)
    protocol = {"method": "lora", "lora_rank": 8, "trained_parameters": 1, "parameters": 2, "epochs": 1.0, "note": word}
    images = {"train_images": 4, "train_split": word, "test_images": 2, "weights": "best step"}
    record = ResultRecord(
        evaluator="finetune",
        task="classification",
        metric="top1",
        features=word,
        values=(50.0,),
        seeds=(0,),
        primary=True,
        dataset=word,
        split=word,
        protocol=protocol | images,
        encoder=word,
        encoder_digest="0",
        details={"seconds": [1.0], "saved_bytes": [10]},
        command=shlex.join(["python", "x.py", "--data", word]),
    )
    write_finetuned_card(folder, description, [public_record(record, word, public_source(record.dataset))], name=word)
    return (folder / "README.md").read_text(encoding="utf-8")


def code_in(card: str) -> str:
    tokens = MarkdownIt("commonmark").parse(card.partition("\n---\n")[2])
    return next(token.content for token in tokens if token.info == "python")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_changes_the_structure(tmp_path: Path, name: str) -> None:
    for file_format in ("parquet", "safetensors"):
        card = features_card(tmp_path / "features", name, file_format)
        assert structure(card) == _without_title(features_card(tmp_path / "features", "plain", file_format), card)
        assert name in _strings(card)
    for adapter in (False, True):
        card = finetuned_card(tmp_path / f"model{adapter}", name, adapter)
        assert structure(card) == _without_title(finetuned_card(tmp_path / f"model{adapter}", "plain", adapter), card)
        assert name in _strings(card)


def _without_title(card: str, other: str) -> list[tuple[str, str]]:
    """The structure of ``card`` under the title of ``other``: both name what they are of."""
    blocks, title = structure(card), structure(other)[1]
    assert blocks[1][0] == title[0] == "inline"
    return [blocks[0], title, *blocks[2:]]


def _strings(card: str) -> set[object]:
    return {node.value for node in ast.walk(ast.parse(code_in(card))) if isinstance(node, ast.Constant)}


def test_no_secret_is_in_them(tmp_path: Path) -> None:
    assert left_in(features_card(tmp_path / "features", ALL)) == []
    assert left_in(str(_public(extraction_of(ALL, "parquet")))) == []
    assert left_in(finetuned_card(tmp_path / "model", ALL)) == []
