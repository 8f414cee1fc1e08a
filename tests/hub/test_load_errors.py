"""What is wrong with a repository is said in one sentence, and nothing half-read is taken for whole by a later load.

The real client, in this process, against the Hub on loopback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import BertConfig, IJepaConfig, IJepaModel

from hf_equissl.encoders.convert import convert_encoder
from hf_equissl.encoders.loading import load_encoder
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.utils.load_errors import LoadError, read_config
from tests.processes import wait_until

from .loopback_handler import Handler
from .loopback_hub import LoopbackHub

REPO = "maker/encoder"
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
LOADERS = [load_encoder, convert_encoder]


@pytest.fixture(scope="module")
def model() -> EquiSSLModel:
    torch.manual_seed(0)
    return EquiSSLModel(EquiSSLConfig(**TINY)).eval()


@pytest.fixture
def folder(model: EquiSSLModel, tmp_path: Path) -> Path:
    """What will be published; a test damages it first."""
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def publish(api: HfApi, folder: Path) -> Callable[[], str]:
    """Upload ``folder`` as it is now; returns the commit."""

    def upload() -> str:
        api.create_repo(REPO, exist_ok=True)
        return api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*").oid

    return upload


def message(load: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load(*args, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert "hf_Loopback" not in said  # no token
    return said


def equal(loaded: torch.nn.Module, model: EquiSSLModel) -> bool:
    found = loaded.state_dict()
    return all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("load", LOADERS)
def test_a_repository_that_does_not_exist(hub_here: LoopbackHub, load: Callable[..., object]) -> None:
    said = message(load, "maker/encodr")
    assert (
        f"'maker/encodr': {hub_here.endpoint} has no such repository, or it is private and your token may not" in said
    )
    assert "There is no folder 'encodr' here either" in message(load, "encodr")


@pytest.mark.parametrize("load", LOADERS)
def test_private_repositories(
    api: HfApi, hub_here: LoopbackHub, publish: Callable[[], str], model: EquiSSLModel,
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any],
) -> None:  # fmt: skip
    publish()
    api.update_repo_settings(REPO, private=True)
    assert "private and your token may not read it" in message(load, REPO, token=hub_here.other_token)
    assert "answers 401: the token was refused" in message(load, REPO, token="hf_LoopbackMistyped")
    assert "private and no token is set" in message(load, REPO, token=False)
    monkeypatch.setenv("HF_TOKEN", "")
    said = message(load, REPO)
    assert "private and no token is set" in said
    assert "hf auth login" in said
    assert equal(load(REPO, token=hub_here.token), model)


def test_gated_and_forbidden_repositories(
    hub_here: LoopbackHub, publish: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    hub_here.refuse(f"/{REPO}/resolve", 403, "Access to model is restricted", X_Error_Code="GatedRepo")
    assert "is gated and your token's account was not granted access" in message(load_encoder, REPO)
    monkeypatch.setenv("HF_TOKEN", "")
    assert f"no token is set. Ask for access on {hub_here.endpoint}/{REPO}" in message(load_encoder, REPO)
    hub_here.heal()
    hub_here.refuse(f"/{REPO}/resolve", 403, "This token may not read contents")
    assert "answers 403: the token does not allow it" in message(load_encoder, REPO)


@pytest.mark.parametrize("load", LOADERS)
def test_wrong_revision_and_wrong_subfolder(publish: Callable[[], str], load: Callable[..., object]) -> None:
    publish()
    said = message(load, REPO, revision="v9")
    assert f"No model at '{REPO}' (revision 'v9')".replace("model", said.split()[1]) in said
    assert "has no revision 'v9'" in said
    said = message(load, REPO, subfolder="nativ")
    assert "the repository has no nativ/config.json" in said
    assert f"/{REPO}/tree/main" in said


@pytest.mark.parametrize("load", LOADERS)
def test_a_repository_of_something_else(folder: Path, publish: Callable[[], str], load: Callable[..., object]) -> None:
    """Without a config; with a text model's; with one that nobody knows; with a head for which we have no encoder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    publish()
    assert "the repository has no config.json" in message(load, REPO)
    BertConfig().save_pretrained(folder)
    publish()
    with pytest.raises(ValueError, match=r"reads 'input_ids', not images|'bert', which does not convert"):
        load(REPO)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "auto_map": {}}))
    publish()
    assert "model_type 'unheard_of'" in message(load, REPO)


def test_an_encoder_that_does_not_convert(folder: Path, publish: Callable[[], str]) -> None:
    IJepaModel(IJepaConfig(**TINY, intermediate_size=32)).save_pretrained(folder)
    publish()
    with pytest.raises(ValueError, match=f"'{REPO}' has model type 'ijepa', .*no CLS token"):
        convert_encoder(REPO)


@pytest.mark.parametrize("load", [*LOADERS, read_config])
def test_a_config_of_a_newer_version(folder: Path, publish: Callable[[], str], load: Callable[..., object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "equissl_version": 99}))
    publish()
    said = message(load, REPO)
    assert REPO in said
    assert "written by a newer hf_equissl (equissl_version=99" in said
    assert "pip install --upgrade hf-equissl" in said


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:9] + b"\xff\xff" + data[11:], lambda data: data[: len(data) // 2], lambda data: b""],
    ids=["flipped", "truncated", "empty"],
)
def test_damaged_weights_on_the_hub(
    folder: Path, publish: Callable[[], str], model: EquiSSLModel, load: Callable[..., Any],
    damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    """And once they are published whole, the damaged ones in the cache are in nobody's way."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(damage(whole))
    publish()
    said = message(load, REPO)
    assert f"The weights at '{REPO}' cannot be read: model.safetensors" in said
    assert "cut short or damaged" in said or "is empty" in said
    assert "force_download=True" in said
    weights.write_bytes(whole)
    publish()
    assert equal(load(REPO), model)


def test_missing_weights_on_the_hub(folder: Path, publish: Callable[[], str], model: EquiSSLModel) -> None:
    (folder / "model.safetensors").unlink()
    publish()
    assert "model.safetensors is missing beside config.json" in message(load_encoder, REPO)
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    publish()
    assert f"lists {len(shards)} files, of which {shards[1].name} is missing" in message(load_encoder, REPO)


def test_a_hub_that_is_down_or_forbidden(
    hub_here: LoopbackHub, publish: Callable[[], str], model: EquiSSLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "it is not in the cache" in (said := message(load_encoder, REPO))
        assert "HF_HUB_OFFLINE=1 is set" in said
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its five attempts
    hub_here.refuse("HEAD", 503, "The Hub is being repaired")
    assert f"{hub_here.endpoint} cannot be reached" in (said := message(load_encoder, REPO))
    assert "503" in said
    hub_here.heal()
    assert equal(load_encoder(REPO), model)
    hub_here.refuse("HEAD", 503, "The Hub is being repaired")
    assert equal(load_encoder(REPO), model)  # from the cache


def break_downloads(hub: LoopbackHub, kind: str, patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, every download of LFS contents ends after half of its body ("drop", "stall")."""
    handler_class: Any = hub._servers[1].RequestHandlerClass

    def half(handler: Handler, data: bytes, headers: dict[str, str]) -> None:
        if handler.server is not hub._servers[1]:
            Handler._send_file(handler, data, headers)
            return
        handler.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        handler._break(kind)

    patch.setattr(handler_class, "_send_file", half, raising=False)


def test_a_download_that_breaks_off(
    hub_here: LoopbackHub, publish: Callable[[], str], model: EquiSSLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    with monkeypatch.context() as patch:
        break_downloads(hub_here, "drop", patch)
        said = message(load_encoder, REPO)
    assert f"the connection to {hub_here.endpoint} broke off" in said
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
    assert equal(load_encoder(REPO), model)


def test_a_killed_download_is_completed_by_the_next_load(
    hub_here: LoopbackHub, publish: Callable[[], str], model: EquiSSLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies with half of the weights on disk: the client's own ``.incomplete`` file, never a snapshot's."""
    commit = publish()
    broken = pytest.MonkeyPatch()
    break_downloads(hub_here, "stall", broken)
    code = (
        "from huggingface_hub import constants, snapshot_download\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 1024  # our file is small\n"
        f"snapshot_download({REPO!r}, max_workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), stderr=subprocess.DEVNULL)
    wait_until(lambda: hub_here.interrupted.is_set() or process.poll() is not None)
    assert process.poll() is None
    cache = Path(constants.HF_HUB_CACHE)
    wait_until(lambda: any(path.stat().st_size > 1000 for path in cache.rglob("*.incomplete")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub_here.heal()
    broken.undo()
    assert not list(cache.rglob("model.safetensors"))
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "is missing beside config.json. HF_HUB_OFFLINE=1 is set: load it once" in message(load_encoder, REPO)
    assert equal(load_encoder(REPO), model)
    (snapshot,) = cache.rglob("snapshots/*")
    assert snapshot.name == commit
    assert (snapshot / "model.safetensors").stat().st_size > 30000
