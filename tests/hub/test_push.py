"""Publishing: what is refused, what one commit does, and what an interruption leaves. Real client, real sockets."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

from hf_equissl.encoders import save_encoder, save_native
from hf_equissl.hub import PublishError, check_publishable, push_repository
from hf_equissl.hub.push import account, create_repository, describe
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.utils import hub_waits
from tests import processes

from .loopback_hub import LoopbackHub

REPO = "maker/encoder"
CARD = """---
license: apache-2.0
library_name: transformers
---
# An encoder

See https://pytorch.org/docs and `maker/encoder`.

```bibtex
@article{a,
  title = {{DINO}: {{A}}},
}
```
"""
SETTINGS = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
TINY = EquiSSLConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    feature_size=8,
    equivariant_size=4,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: encoder, native export, card, a figure, results."""
    folder = tmp_path_factory.mktemp("built") / "repository"
    torch.manual_seed(0)
    encoder = EquiSSLModel(TINY)
    save_encoder(encoder, folder, **SETTINGS)
    save_native(encoder, folder / "native", **SETTINGS)
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00" + bytes(range(256)))
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text("[]")
    return folder


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "repository"))


def _edit_card(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "README.md").write_text(CARD.replace(old, new))


def _write(name: str, text: str = "x") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def _remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def _poison(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], object]:
    def poison(folder: Path) -> None:
        state = load_file(folder / name)
        key = sorted(state)[-1]
        state[key] = state[key].to(dtype)
        state[key].view(-1)[0] = value
        save_file(state, folder / name, metadata={"format": "pt"})

    return poison


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-8])


def _change_json(name: str, **values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (_remove("model.safetensors", "native/model.safetensors"), "no weights"),
    "no weights at the root": (_remove("model.safetensors"), r"/model.safetensors is missing"),
    "no config": (_remove("native/config.json"), r"native/model.safetensors has no config.json beside it"),
    "broken config": (_write("config.json", "{"), r"/config.json cannot be read as JSON"),
    "config of nothing": (_write("config.json", "{}"), "has no model_type"),
    "missing shard": (
        _write("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "model-00001-of-00002.safetensors is missing",
    ),
    "nan": (_poison("model.safetensors", float("nan")), r"/model.safetensors has values that are not finite.* in \w"),
    "infinity, bf16": (_poison("native/model.safetensors", float("inf"), torch.bfloat16), "native/model.safetensors"),
    "nan, 8 bits": (_poison("native/model.safetensors", float("nan"), torch.float8_e5m2), "not finite"),
    "truncated": (_cut("native/model.safetensors"), r"native/model.safetensors is cut short or damaged"),
    "no processor": (_remove("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "no native processor": (_remove("native/preprocessor_config.json"), "native/preprocessor_config.json is missing"),
    "processor of nothing": (_write("preprocessor_config.json", "{}"), "does not say image_processor_type, size"),
    "unknown processor": (
        _change_json("preprocessor_config.json", image_processor_type="NoImageProcessor"),
        "does not load as an image processor",
    ),
    "processor that divides by 0": (_change_json("preprocessor_config.json", image_std=[0.0] * 3), "image_std"),
    "no card": (_remove("README.md"), r"README.md is missing"),
    "field": (_edit_card("An encoder", "{{ name }}"), r"\{\{ name \}\}.*line 5"),
    "more information": (_edit_card("An encoder", "[More Information Needed]"), "More Information Needed"),
    "to do": (_edit_card("An encoder", "TODO: a name"), "a note to do something"),
    "invented name": (_edit_card("maker/encoder", "org/encoder"), "an invented name: 'org/encoder'"),
    "invented user": (_edit_card("maker/encoder", "your-username/encoder"), "invented"),
    "card without metadata": (_edit_card("---\n", ""), "has no metadata"),
    "broken yaml": (_edit_card("license: ", "license: ["), "do not parse"),
    "broken model-index": (_edit_card("license:", "model-index: 3\nlicense:"), "do not parse"),
    "pickle": (_write("pretraining/pytorch_model.bin"), "pretraining/pytorch_model.bin must not be uploaded"),
    "optimizer": (_write("pretraining/optimizer.safetensors"), "state of a training run"),
    "token": (_write("results.json", '["hf_' + "aB3" * 11 + '"]'), "results.json holds what looks like a Hub token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(repository: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    check_publishable(repository)
    spoil(repository)
    with pytest.raises(PublishError, match=message) as caught:
        check_publishable(repository)
    assert "aB3aB3" not in str(caught.value)


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="is not a folder"):
        check_publishable(tmp_path / "none")
    with pytest.raises(PublishError, match="no weights"):
        check_publishable(tmp_path)


def test_own_token_is_found(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of another form than the usual one, if it is the one that is in use."""
    monkeypatch.setenv("HF_TOKEN", "my-secret")
    _write("recipe.yaml", "note: my-secret")(repository)
    with pytest.raises(PublishError, match=r"recipe\.yaml") as caught:
        check_publishable(repository)
    assert "my-secret" not in str(caught.value)


def test_parts_alone(repository: Path) -> None:
    """A repository without an encoder at its root, and one with an adapter."""
    shutil.copytree(repository / "native", repository / "adapter")
    for path in [*repository.glob("*.py"), *repository.glob("*.json"), repository / "model.safetensors"]:
        path.unlink()
    (repository / "adapter" / "model.safetensors").rename(repository / "adapter" / "adapter_model.safetensors")
    (repository / "adapter" / "config.json").rename(repository / "adapter" / "adapter_config.json")
    check_publishable(repository)


LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
pixels = torch.full((1, 3, 16, 16), 0.3)
other = AutoModel.from_pretrained("maker/encoder", trust_remote_code=True)
native = AutoModel.from_pretrained("maker/encoder", subfolder="native")
assert "hf_equissl" not in sys.modules
import hf_equissl
ours = AutoModel.from_pretrained("maker/encoder")
assert type(ours).__module__.startswith("hf_equissl"), type(ours)
assert list(AutoImageProcessor.from_pretrained("maker/encoder").image_std) == [0.25] * 3
for model in (other, native, ours):
    print(model(pixels).last_hidden_state.double().sum().item())
"""


def test_push_and_load(hub_here: LoopbackHub, api: HfApi, repository: Path, tmp_path: Path) -> None:
    """One commit; whoever has this endpoint loads it in three ways, with the outputs of the folder."""
    commit = push_repository(repository, REPO, commit_message="First")
    assert hub_here.count("POST", "/commit/") == 1
    assert api.model_info(REPO).sha == commit.oid
    assert not api.model_info(REPO).private
    names = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert set(api.list_repo_files(REPO)) == names | {".gitattributes"}
    words, env = [sys.executable, "-c", LOAD], processes.environment(**hub_here.env(tmp_path / "home"))
    done = processes.run(words, env=env, preloaded=processes.WITHOUT_US)
    assert done.returncode == 0, done.stderr
    expected = EquiSSLModel.from_pretrained(repository)(torch.full((1, 3, 16, 16), 0.3)).last_hidden_state
    assert [float(line) for line in done.stdout.split()] == pytest.approx(
        [expected.double().sum().item()] * 3, abs=1e-4
    )

    sent, requests = list(hub_here.uploads), hub_here.count("POST", "/commit/")
    again = push_repository(repository, REPO)
    assert again.oid == commit.oid
    assert (hub_here.uploads, hub_here.count("POST", "/commit/")) == (sent, requests)


def test_interrupted_upload(
    hub_here: LoopbackHub, api: HfApi, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks for good in the middle of the second object; what is published stays what it was."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # the client waits 23 s in all
    hub_here.interrupt_uploads(first=2, count=None)
    with pytest.raises(PublishError, match="cannot be reached, or the connection broke") as caught:
        push_repository(repository, REPO)
    assert "only what has not arrived is sent then" in str(caught.value)
    arrived = list(hub_here.uploads)
    assert len(arrived) == 1
    assert api.list_repo_files(REPO) == [".gitattributes"]

    hub_here.heal()
    first = push_repository(repository, REPO).oid
    assert hub_here.uploads[:1] == arrived
    assert len(set(hub_here.uploads)) == len(hub_here.uploads) == 3
    assert api.model_info(REPO).sha == first

    _poison("model.safetensors", 2.0)(repository)
    hub_here.interrupt_uploads(first=1, count=None)
    with pytest.raises(PublishError):
        push_repository(repository, REPO)
    assert api.model_info(REPO).sha == first
    hub_here.heal()
    assert push_repository(repository, REPO).oid == api.model_info(REPO).sha != first
    assert len(hub_here.uploads) == 4


def test_lost_before_the_commit(hub_here: LoopbackHub, api: HfApi, repository: Path) -> None:
    """Everything has arrived and the commit fails: the second call sends no object at all."""
    hub_here.refuse("POST .*/commit/", 503, "Service unavailable", count=1)
    with pytest.raises(PublishError, match="trouble of its own"):
        push_repository(repository, REPO)
    assert api.list_repo_files(REPO) == [".gitattributes"]
    sent = list(hub_here.uploads)
    push_repository(repository, REPO)
    assert hub_here.uploads == sent
    assert "model.safetensors" in api.list_repo_files(REPO)


def test_publishing_again(
    hub_here: LoopbackHub, api: HfApi, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What vanished from the parts is deleted in the same commit; what others put there, and absent parts, stay."""
    EquiSSLModel.from_pretrained(repository).save_pretrained(repository, max_shard_size="2KB")
    (repository / "model.safetensors").unlink(missing_ok=True)
    push_repository(repository, REPO)
    assert any(name.startswith("model-00001-of") for name in api.list_repo_files(REPO))
    mine = [CommitOperationAdd("notes/mine.md", b"mine"), CommitOperationAdd("LICENSE", b"free")]
    api.create_commit(REPO, mine, commit_message="Mine")

    for path in [*repository.glob("model-*"), repository / "model.safetensors.index.json", repository / "results.json"]:
        path.unlink()
    save_file({"a": torch.ones(3)}, repository / "model.safetensors")
    shutil.rmtree(repository / "native")
    (repository / "figures" / "loss.png").rename(repository / "figures" / "other.png")
    commits = hub_here.count("POST", "/commit/")
    with caplog.at_level(logging.WARNING, logger="hf_equissl"):
        push_repository(repository, REPO)
    assert hub_here.count("POST", "/commit/") == commits + 1
    there = set(api.list_repo_files(REPO))
    assert {"notes/mine.md", "LICENSE", "model.safetensors", "figures/other.png", "native/config.json"} <= there
    assert not {"results.json", "figures/loss.png", "model.safetensors.index.json"} & there
    assert not any(name.startswith("model-0") for name in there)
    assert "native/ on the Hub is of an earlier publication" in caplog.text


def test_revision(hub_here: LoopbackHub, api: HfApi, repository: Path) -> None:
    """A branch is created, and main stays as it is."""
    main = push_repository(repository, REPO).oid
    _edit_card("An encoder", "Another encoder")(repository)
    other = push_repository(repository, REPO, revision="v2").oid
    assert (api.model_info(REPO).sha, api.model_info(REPO, revision="v2").sha) == (main, other)
    with pytest.raises(PublishError, match="The Hub refused"):
        push_repository(repository, REPO, revision="no good")


def test_somebody_else_commits_meanwhile(hub_here: LoopbackHub, api: HfApi, repository: Path) -> None:
    """The commit is made on the state that was looked at, or not at all; the next call looks again."""
    push_repository(repository, REPO)
    _poison("model.safetensors", 2.0)(repository)
    hub_here.interrupt_uploads(kind="stall")
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(push_repository, repository, REPO)
        assert hub_here.interrupted.wait(30)
        theirs = api.create_commit(REPO, [CommitOperationAdd("LICENSE", b"free")], commit_message="Theirs").oid
        hub_here.heal()
        with pytest.raises(PublishError, match="has changed meanwhile"):
            publishing.result()
    assert api.model_info(REPO).sha == theirs
    push_repository(repository, REPO)
    assert [commit.title for commit in api.list_repo_commits(REPO)][:2] == ["Upload encoder", "Theirs"]


def test_private(hub_here: LoopbackHub, repository: Path) -> None:
    push_repository(repository, REPO, private=True)
    assert hub_here.repo(REPO).private
    push_repository(repository, REPO)
    assert hub_here.repo(REPO).private
    push_repository(repository, "lab/open")
    with pytest.raises(PublishError, match="lab/open exists and is public"):
        push_repository(repository, "lab/open", private=True)


def test_no_rights(hub_here: LoopbackHub, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose fault it is and what to do; no token in any message, and nothing is created or changed."""
    push_repository(repository, REPO)
    push_repository(repository, "maker/secret", private=True)
    state = {name: repo.branches["main"] for name, repo in hub_here.repos.items()}
    _edit_card("An encoder", "Mine now")(repository)
    wrong = "hf_" + "wrongWRONG12" * 3
    attempts: list[tuple[str, str | None, str]] = [
        (REPO, hub_here.other_token, "no right to write"),
        (REPO, hub_here.read_token, "no right to write"),
        ("maker/secret", hub_here.other_token, "no right to write"),
        ("stranger/encoder", hub_here.token, "no right to write there .*namespace"),
        (REPO, wrong, "token is missing, wrong or expired"),
        ("maker/a b", hub_here.token, "'maker/a b' is not the name of a repository"),
        ("a/b/c", hub_here.token, "is not the name of a repository"),
    ]
    for repo_id, token, message in attempts:
        with pytest.raises(PublishError, match=message) as caught:
            push_repository(repository, repo_id, token=token)
        assert "hf_" not in str(caught.value).replace("hf_equissl", "").replace("hf_...", "")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"not logged in.*hf auth login"):
        push_repository(repository, REPO)
    assert state == {name: repo.branches["main"] for name, repo in hub_here.repos.items()}


def test_no_hub(hub_here: LoopbackHub, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_here.refuse("POST /api/repos/create", 429, "Too many requests", count=1, Retry_After="30")
    with pytest.raises(PublishError, match=r"rate limit.*30 s"):
        push_repository(repository, REPO)
    hub_here.refuse("POST /api/validate-yaml", 400, "Invalid metadata", count=1)
    with pytest.raises(PublishError, match="does not accept the card"):
        push_repository(repository, REPO)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(PublishError, match="HF_HUB_OFFLINE=1 is set"):
            create_repository(REPO)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        with pytest.raises(PublishError, match=r"has no Xet storage.*HF_HUB_DISABLE_XET=1"):
            push_repository(repository, REPO)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(PublishError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
            create_repository(REPO)


def test_describe(repository: Path) -> None:
    text = describe(repository)
    assert "native/model.safetensors" in text
    assert text.endswith(CARD)
    size = (repository / "figures" / "loss.png").stat().st_size
    assert f"{size} bytes  figures/loss.png" in text


def test_a_client_that_somebody_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _http.default_client_factory
    for factory in (default, lambda: default()):
        monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", factory)
        hub_waits.limit_waiting.__wrapped__()
        assert (_http._GLOBAL_CLIENT_FACTORY is factory) == (factory is not default)


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection; one sentence follows after a time that has an end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0)
        monkeypatch.setattr(hub_waits, "SECONDS", 0.3)
        close_session()  # the client is made anew, by what limits it
        try:
            with pytest.raises(PublishError, match=rf"{endpoint} cannot be reached.*timed out"):
                account("me/model", token="hf_" + "a" * 34)
        finally:
            close_session()
