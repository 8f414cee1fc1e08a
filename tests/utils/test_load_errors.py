"""Whatever is wrong with a folder is said in one sentence; the Hub's side is in tests/hub/test_load_errors.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, BertConfig, Dinov2Config

from hf_equissl.encoders.loading import load_encoder
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.utils.load_errors import LoadError, explain_load_errors, read_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.fixture(scope="module")
def model() -> EquiSSLModel:
    torch.manual_seed(0)
    return EquiSSLModel(
        EquiSSLConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    ).eval()


@pytest.fixture
def folder(model: EquiSSLModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def edit_config(folder: Path, **values: object) -> None:
    """Change fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def message(call: Callable[[], object]) -> str:
    with pytest.raises(LoadError) as caught:
        call()
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_right_passes(folder: Path, model: EquiSSLModel) -> None:
    assert read_config(folder).hidden_size == 16
    assert read_config(folder.parent, subfolder="encoder").model_type == "equissl"
    loaded = load_encoder(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_folder_that_does_not_exist(folder: Path) -> None:
    said = message(lambda: read_config(folder.with_name("encodr")))
    assert f"no such folder. Did you mean {str(folder)!r}?" in said
    assert "'name/model'" in said
    run = folder.parent
    said = message(lambda: read_config(run.with_name(run.name + "x") / "encoder"))
    assert f"Did you mean {str(folder)!r}?" in said
    assert "Did you mean" not in message(lambda: read_config("/no/such/folder"))
    assert "No model at ''" in message(lambda: read_config(""))


def test_a_folder_of_another_kind(folder: Path, model: EquiSSLModel) -> None:
    run = folder.parent
    assert f"Did you mean {str(folder)!r}?" in message(lambda: load_encoder(run))
    for name in ("checkpoint-10", "native"):
        model.config.save_pretrained(run / name)
    said = message(lambda: read_config(run))
    assert "/encoder', '" in said
    assert said.index("/native'") < said.index("/checkpoint-10'")
    said = message(lambda: read_config(run, subfolder="natve"))
    assert "(subfolder 'natve'): no such subfolder. With a model in them: 'encoder', 'native', 'checkpoint-10'" in said
    (run / "notes").mkdir()
    (run / "notes" / "readme.txt").write_text("nothing")
    assert "has no config.json (what it has: 'readme.txt')" in message(lambda: read_config(run / "notes"))
    assert "that is a file. Give the folder" in message(lambda: read_config(folder / "model.safetensors"))
    (run / "notes" / "adapter_config.json").write_text("{}")
    assert "PEFT adapter, not a model" in message(lambda: load_encoder(run / "notes"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "nothing_known", "auto_map": None}, "model_type 'nothing_known', a type that transformers"),
        ({"model_type": "nothing_known"}, "comes with code of its own.*trust_remote_code=True"),
        ({"model_type": None, "auto_map": None}, "has no model_type"),
        ({"model_type": "equissl_pretraining", "auto_map": None}, "whole pretraining state.*'encoder'"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": 17}, "hidden_size=17 is not divisible by num_attention_heads=2"),
    ],
)
def test_configs_that_cannot_be_used(folder: Path, values: dict[str, object], said: str) -> None:
    edit_config(folder, **values)
    with pytest.raises(LoadError, match=said):
        load_encoder(folder)


def test_a_config_of_a_newer_version_is_refused(folder: Path) -> None:
    edit_config(folder, equissl_version=99)
    said = message(lambda: load_encoder(folder))
    assert str(folder) in said
    assert "99" in said
    assert "newer" in said


def test_a_config_that_is_no_json(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    for content in (text[:50], ""):
        (folder / "config.json").write_text(content)
        assert "config.json is not JSON" in message(lambda: read_config(folder))


def test_configs_that_do_not_describe_vision(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"BertModel at .* reads 'input_ids', not images"):
        load_encoder(tmp_path)  # before the weights, which are not even there


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "model.safetensors is empty"),
        (lambda data: data[:5], r"\(5 bytes\) is cut short or damaged"),
        (lambda data: data[:2000], r"\(2000 bytes\) is cut short or damaged"),
        (lambda data: data[:-1], "is cut short or damaged"),
        (lambda data: data[:9] + b"\xff\xff" + data[11:], "is cut short or damaged"),
        (lambda data: b"<html>Service unavailable</html>", "is cut short or damaged"),
        (lambda data: POINTER, "Git LFS pointer.*git lfs pull"),
    ],
    ids=["empty", "start", "header", "last-byte", "flipped", "web-page", "pointer"],
)
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(
        LoadError, match=rf"The weights at '{folder}' cannot be read: model.safetensors .*{said}|{said}"
    ):
        load_encoder(folder)


def test_weights_that_are_missing_or_of_another_network(folder: Path, model: EquiSSLModel) -> None:
    edit_config(folder, hidden_size=32)
    assert "shapes are not those of the model that config.json describes" in message(lambda: load_encoder(folder))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing beside config.json" in message(lambda: load_encoder(folder))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    said = message(lambda: load_encoder(folder))
    assert "pickle of more than tensors" in said
    assert "weights_only" not in said  # torch's advice is to run what the file says


def test_sharded_weights(model: EquiSSLModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(load_encoder(tmp_path).layernorm.weight, model.layernorm.weight)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-4])
    assert f"{shards[1].name} ({len(whole) - 4} bytes) is cut short" in message(lambda: load_encoder(tmp_path))
    shards[1].unlink()
    said = message(lambda: load_encoder(tmp_path))
    assert f"lists {len(shards)} files, of which {shards[1].name} is missing" in said
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is damaged" in message(lambda: load_encoder(tmp_path))


def test_offline_and_not_cached(tmp_path: Path) -> None:
    said = message(lambda: read_config("name/model", revision="v1", cache_dir=tmp_path))
    assert "'name/model' (revision 'v1'): it is not in the cache" in said
    assert str(tmp_path) in said
    assert "HF_HUB_OFFLINE=1" in said
    assert "no such folder" in message(lambda: read_config("runs/vits/encoder"))


def test_other_errors_pass_as_they_are(tmp_path: Path, folder: Path) -> None:
    """No memory, a full disk, a bug or an interruption are not a damaged file."""
    full = OSError(28, "No space left on device")
    for error in (MemoryError(), full, torch.OutOfMemoryError("no memory"), TypeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, explain_load_errors(folder):
            raise error
        assert caught.value is error
    with pytest.raises(LoadError, match=r"^said already$"), explain_load_errors(folder):
        raise LoadError("said already")


def test_files_of_weights_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"weight": torch.ones(3), "config": Dinov2Config()}, path)
    for content, said in (
        (path.read_bytes(), "pickle of more than tensors"),
        (path.read_bytes()[:300], "is damaged"),
        (b"", "checkpoint.pth is empty"),
        (POINTER, "checkpoint.pth is a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadError, match=said), explain_load_errors(path, "checkpoint"):
            torch.load(path, weights_only=True)


def test_adapters_have_a_config_of_their_own(tmp_path: Path) -> None:
    with (
        pytest.raises(LoadError, match=r"No adapter at .* has no adapter_config.json \(what it has: nothing\)"),
        explain_load_errors(tmp_path, "adapter", config_name="adapter_config.json"),
    ):
        raise ValueError("Can't find 'adapter_config.json'")
    (tmp_path / "adapter_config.json").write_text("{}")
    with (
        pytest.raises(LoadError, match=r"adapter_model.safetensors is missing beside adapter_config.json"),
        explain_load_errors(tmp_path, "adapter", config_name="adapter_config.json"),
    ):
        raise FileNotFoundError("adapter_model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with (
        pytest.raises(LoadError, match=r"No image processor .*: preprocessor_config.json is not JSON"),
        explain_load_errors(tmp_path, "image processor", config_name="preprocessor_config.json"),
    ):
        AutoImageProcessor.from_pretrained(tmp_path)


def test_damage_is_not_blamed_on_the_kind(folder: Path) -> None:
    """A pretraining state is right where one is loaded; only its weights are not."""
    edit_config(folder, model_type="equissl_pretraining")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"model\.safetensors is empty"), explain_load_errors(folder):
        EquiSSLModel.from_pretrained(folder)


def test_the_module_is_light() -> None:
    heavy = (
        "import sys, hf_equissl.utils.load_errors; print(sorted({'torch', 'transformers', 'httpx'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_auto_classes_agree_with_what_is_explained(folder: Path) -> None:
    """The context manager serves any call that loads."""
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"model\.safetensors is empty"), explain_load_errors(folder):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (PermissionError(13, "Permission denied", "/home/ada/encoder/model.safetensors"), "model.safetensors"),
        (OSError("cannot open: Permission denied (os error 13)"), "colleague"),
    ],
)
def test_what_may_not_be_read_is_one_sentence(tmp_path: Path, error: Exception, named: str) -> None:
    with (
        pytest.raises(LoadError, match=rf"this account has no right to read \S*{named}. Ask its owner for it: chmod"),
        explain_load_errors(tmp_path / "colleague"),
    ):
        raise ValueError("loading failed") from error
