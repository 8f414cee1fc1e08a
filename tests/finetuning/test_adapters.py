"""Adapters are saved alone, load onto their base and no other, and merge into it without a change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from peft.utils import constants
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from hf_equissl.evaluation.results import load_records
from hf_equissl.finetuning import (
    FineTuningSettings,
    adapters,
    fine_tune,
    load_finetuned,
    merge_adapter,
    prepare,
    register_lora_targets,
    train,
)
from hf_equissl.finetuning.publish import publish
from hf_equissl.hub.contents import list_published
from hf_equissl.utils.files import umask
from hf_equissl.utils.load_errors import LoadError

from .conftest import CLASSES, STOCK


@pytest.fixture(scope="module")
def trained(encoders: dict[str, str], flags: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter for each kind of encoder."""
    from hf_equissl.finetuning import FineTuningSettings

    found = {}
    for encoder, method in (("equissl", "lora"), ("dinov2_with_registers", "dora")):
        folder = tmp_path_factory.mktemp(encoder)
        kept = {"output_dir": str(folder), "batch_size": 8, "epochs": 2, "learning_rate": 1e-2}
        fine_tune(FineTuningSettings(encoder=encoders[encoder], data=flags, method=method, **kept))
        found[encoder] = folder / "adapter"
    return found


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model.eval()(pixel_values=pixels).logits


def test_merging_replaces_a_merged_model_and_nothing_else(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = merge_adapter(trained["equissl"], tmp_path / "merged")
    assert merge_adapter(trained["equissl"], folder) == folder
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, .* would be deleted"):
        merge_adapter(trained["equissl"], folder)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("encoder", ["equissl", "dinov2_with_registers"])
def test_merged_equals_adapter(
    trained: dict[str, Path], tmp_path: Path, pixels: torch.Tensor, encoders: dict[str, str], encoder: str, flags: str
) -> None:
    adapted = load_finetuned(trained[encoder])
    expected = logits(adapted, pixels)
    assert type(adapted).__name__ == "PeftModel"

    # The adapters do something: without them the same head says something else.
    with adapted.disable_adapter():
        assert (logits(adapted, pixels) - expected).abs().max() > 1e-3

    torch.testing.assert_close(
        logits(load_finetuned(trained[encoder], merge=True), pixels), expected, atol=1e-5, rtol=0
    )
    folder = merge_adapter(trained[encoder], tmp_path / "merged")
    plain = AutoModelForImageClassification.from_pretrained(folder)
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain, pixels), expected, atol=1e-5, rtol=0)
    classify = pipeline("image-classification", model=str(folder))
    answers = classify(str(Path(flags) / "test" / "red" / "0.png"))
    assert {answer["label"] for answer in answers} == set(CLASSES)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "merged" in card.content


def test_an_adapter_is_small_and_says_what_it_is(trained: dict[str, Path], encoders: dict[str, str]) -> None:
    folder = trained["equissl"]
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert all("lora_" in name or "classifier" in name for name in names)
    assert {"README.md", "results.json", "preprocessor_config.json", "finetuning.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert AutoImageProcessor.from_pretrained(folder).crop_size == {"height": 32, "width": 32}
    record = next(record for record in load_records(folder / "results.json") if record.primary)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert record.details["saved_bytes"] == [size]
    total = sum(p.numel() for p in AutoModel.from_pretrained(encoders["equissl"]).parameters())
    assert record.protocol["trained_parameters"] < record.protocol["parameters"] < 1.5 * total
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert "load_finetuned" in card.content
    assert str(encoders["equissl"]) not in card.content
    model = load_finetuned(folder)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert not model.training


def test_the_base_by_another_place(trained: dict[str, Path], encoders: dict[str, str], tmp_path: Path) -> None:
    moved = shutil.copytree(encoders["equissl"], tmp_path / "moved")
    assert load_finetuned(trained["equissl"], base=moved) is not None
    adapter = shutil.copytree(trained["equissl"], tmp_path / "adapter")
    content = json.loads((adapter / "finetuning.json").read_text())
    (adapter / "finetuning.json").write_text(json.dumps({**content, "base": str(tmp_path / "gone")}))
    with pytest.raises(LoadError, match=r"The base of the adapter .* cannot be loaded.*Say where it is"):
        load_finetuned(adapter)
    assert load_finetuned(adapter, base=moved) is not None


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("other", r"was trained on .*equissl \(weights [0-9a-f]{12}\); .*other has the same shapes and other weights"),
        ("wide", r"wide is another encoder: hidden_size 48 instead of 32"),
        ("dinov2", r"dinov2 is another encoder: model_type dinov2 instead of equissl"),
    ],
)
def test_an_adapter_for_another_base_is_refused(
    trained: dict[str, Path], encoders: dict[str, str], base: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_finetuned(trained["equissl"], base=encoders[base])


def test_what_is_no_adapter(trained: dict[str, Path], encoders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="fine-tuned model"):
        load_finetuned(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapter(encoders["equissl"], tmp_path / "merged")
    with pytest.raises(ValueError, match=r"classifier.*an encoder that was not fine-tuned"):
        load_finetuned(encoders["equissl"])
    with pytest.raises(ValueError, match="is a whole model, not an adapter"):
        load_finetuned(encoders["equissl"], base=encoders["equissl"])
    foreign = shutil.copytree(trained["equissl"], tmp_path / "foreign")
    (foreign / "finetuning.json").unlink()
    with pytest.raises(LoadError, match=r"holds no finetuning.json"):
        load_finetuned(foreign)
    (foreign / "finetuning.json").write_text("{}")
    with pytest.raises(ValueError, match="not a description of a fine-tuned model"):
        load_finetuned(foreign)
    broken = shutil.copytree(trained["equissl"], tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(LoadError, match="adapter"):
        merge_adapter(broken, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_default_targets_are_told_to_peft_when_asked(encoders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    table.pop("equissl", None)
    monkeypatch.setattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", table)
    before = dict(table)
    register_lora_targets()
    assert table == {**adapters.LORA_TARGETS, **before}  # PEFT's own choices stay
    register_lora_targets()
    # PEFT's own list, which its tuners have by name.
    monkeypatch.undo()
    register_lora_targets()
    for kind in ("equissl", *STOCK):
        model = get_peft_model(AutoModel.from_pretrained(encoders[kind]), LoraConfig())
        assert sum("lora_A" in name for name, _ in model.named_parameters()) == 12, kind


def test_target_modules_can_be_chosen(settings: Any) -> None:
    run = prepare(settings(method="lora", target_modules=r".*attention\.[qv]_proj", lora_rank=2))
    names = {name.split(".lora_")[0] for name, p in run.model.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"--target_modules nothing: "):
        prepare(settings(method="lora", target_modules="nothing"))


def test_decoders_and_stem_get_no_adapters() -> None:
    from .conftest import equissl

    config = LoraConfig(target_modules=adapters.LORA_TARGETS["equissl"])
    model = get_peft_model(equissl(decoder_type="cross_attention", decoder_hidden_size=32), config)
    names = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert names
    assert all(".encoder.layer." in name for name in names)


def test_an_encoder_in_a_subfolder(
    settings: Any, encoders: dict[str, str], tmp_path: Path, pixels: torch.Tensor
) -> None:
    """As a published repository holds its native export."""
    shutil.copytree(encoders["dinov2"], tmp_path / "repository" / "native")
    chosen = settings(str(tmp_path / "repository"), subfolder="native", method="lora", epochs=1)
    run = prepare(chosen)
    assert run.description.architecture["model_type"] == "dinov2"
    train(run)
    expected = logits(run.model, pixels)
    found = logits(load_finetuned(run.folder), pixels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    publish(run, merge=True)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "merged")
    torch.testing.assert_close(logits(merged, pixels), expected, atol=1e-5, rtol=0)


def test_an_adapter_says_nothing_of_this_machine(trained: dict[str, Path], encoders: dict[str, str]) -> None:
    folder = trained["equissl"]
    for path in folder.glob("[!.]*"):
        assert str(Path(encoders["equissl"]).parent) not in path.read_bytes().decode(errors="ignore"), path.name
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert json.loads((folder / "finetuning.json").read_text())["base"] == "equissl"
    assert ".base" not in list_published(folder)
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def test_an_adapter_that_is_not_finite_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(trained["equissl"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    for merge in (False, True):
        with pytest.raises(LoadError, match="adapter has values that are not finite"):
            load_finetuned(adapter, merge=merge)


@pytest.mark.parametrize("pattern", ["*attention", "(q_proj", "[a-"])
def test_a_pattern_that_is_none_gets_one_sentence(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"--target_modules .*: no regular expression \(.*\)\. Example") as caught:
        FineTuningSettings(encoder="e", data="d", output_dir="o", target_modules=pattern)
    assert "\n" not in str(caught.value)
