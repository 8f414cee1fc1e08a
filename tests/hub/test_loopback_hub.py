"""The loopback Hub against the real client: what other tests may rely on."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests.processes import limit, wait_until

from .loopback_hub import LoopbackHub

REPO = "maker/encoder"
WEIGHTS = os.urandom(300_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A card, weights and a picture in a sub-folder."""
    folder = tmp_path / "to upload"
    (folder / "figures").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "figures" / "a.png").write_bytes(b"\x89PNG\r\n\x00" + WEIGHTS[:1000])
    return folder


@pytest.fixture
def filled(api: HfApi, folder: Path) -> str:
    """The id of the commit that uploaded ``folder`` into ``REPO``."""
    api.create_repo(REPO)
    return api.upload_folder(repo_id=REPO, folder_path=folder).oid


def test_create(api: HfApi, hub_here: LoopbackHub) -> None:
    """Names, organisations, existing repositories and data sets."""
    assert api.whoami()["name"] == hub_here.user
    assert api.create_repo("encoder").repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    assert api.create_repo("lab/encoder").repo_id == "lab/encoder"
    assert api.create_repo(REPO, repo_type="dataset").repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        api.create_repo("stranger/encoder")
    assert api.list_repo_files(REPO) == [".gitattributes"]
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    assert api.repo_exists(REPO, repo_type="dataset")


def test_upload_list_and_download(api: HfApi, hub_here: LoopbackHub, filled: str, folder: Path, tmp_path: Path) -> None:
    """One commit; weights and pictures go through LFS; what comes back is what was sent."""
    listed = {file.path: file for file in api.list_repo_tree(REPO, recursive=True)}
    assert set(listed) == {".gitattributes", "README.md", "figures", "figures/a.png", "model.safetensors"}
    weights = hashlib.sha256(WEIGHTS).hexdigest()
    assert listed["model.safetensors"].lfs.sha256 == weights
    assert listed["README.md"].lfs is None
    assert hub_here.count("POST", "/commit/") == 1
    assert sorted(hub_here.uploads) == sorted([weights, listed["figures/a.png"].lfs.sha256])
    assert [file.path for file in api.list_repo_tree(REPO, "figures")] == ["figures/a.png"]
    assert [file.path for file in api.get_paths_info(REPO, ["README.md", "none"])] == ["README.md"]
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == filled
    assert {file.rfilename: file.size for file in info.siblings}["model.safetensors"] == len(WEIGHTS)
    copy = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    for path in folder.rglob("*.*"):
        assert (copy / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_metadata_and_ranges(api: HfApi, hub_here: LoopbackHub, filled: str) -> None:
    """ETags and sizes as the client reads them; the storage, another host, serves parts without a token."""
    url = hf_hub_url(REPO, "model.safetensors", endpoint=hub_here.endpoint)
    metadata = get_hf_file_metadata(url)
    assert (metadata.commit_hash, metadata.etag, metadata.size) == (
        filled,
        hashlib.sha256(WEIGHTS).hexdigest(),
        300_000,
    )
    assert metadata.location.startswith(hub_here.storage)
    part = get_session().get(metadata.location, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, WEIGHTS[100:200])
    assert part.headers["Content-Range"] == "bytes 100-199/300000"
    assert get_session().get(metadata.location, headers={"Range": "bytes=-5"}).content == WEIGHTS[-5:]
    assert get_session().get(metadata.location, headers={"Range": "bytes=300000-"}).status_code == 416
    assert get_session().get(hub_here.storage + "/" + metadata.etag).status_code == 403
    card = get_hf_file_metadata(hf_hub_url(REPO, "README.md", endpoint=hub_here.endpoint))
    assert card.etag == api.get_paths_info(REPO, "README.md")[0].blob_id


def test_revisions(api: HfApi, hub_here: LoopbackHub, filled: str, tmp_path: Path) -> None:
    """Tags and branches keep what they were put on; commits on them are apart; the history is a list."""
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="try/out")
    card = [CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# New\n")]
    new = api.create_commit(REPO, card, commit_message="New card", revision="try/out").oid
    gone = [CommitOperationDelete("figures/", is_folder=True)]
    api.create_commit(REPO, gone, commit_message="No figures")
    assert api.model_info(REPO, revision="v1").sha == filled
    assert api.model_info(REPO, revision="try/out").sha == new
    assert "figures/a.png" in api.list_repo_files(REPO, revision=filled)
    assert "figures/a.png" not in api.list_repo_files(REPO)
    assert next(commit.title for commit in api.list_repo_commits(REPO)) == "No figures"
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "try/out"}
    path = api.hf_hub_download(REPO, "README.md", revision="try/out", cache_dir=tmp_path)
    assert Path(path).read_text().endswith("# New\n")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v2")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="Late", parent_commit=filled)
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("none")], commit_message="Gone already")


def test_rights(api: HfApi, hub_here: LoopbackHub, filled: str) -> None:
    """What is private is not there for others; what is public can be read by all and written by its owner."""
    nobody, stranger, reader, wrong = (
        HfApi(endpoint=hub_here.endpoint, token=token)
        for token in (False, hub_here.other_token, hub_here.read_token, "hf_wrong")
    )
    add = [CommitOperationAdd("a.txt", b"a")]
    assert nobody.model_info(REPO).private is False
    for client in (stranger, reader):
        with pytest.raises(HfHubHTTPError, match="403"):
            client.create_commit(REPO, add, commit_message="Mine")
    with pytest.raises(HfHubHTTPError, match="401"):
        nobody.create_commit(REPO, add, commit_message="Mine")
    api.update_repo_settings(REPO, private=True)
    for client in (nobody, stranger):
        with pytest.raises(RepositoryNotFoundError):
            client.model_info(REPO)
        with pytest.raises(RepositoryNotFoundError):
            client.get_paths_info(REPO, "README.md")
    assert reader.model_info(REPO).private is True
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        wrong.model_info(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("maker/other")


def test_dropped_connection_is_tried_again_by_the_client(api: HfApi, hub_here: LoopbackHub, folder: Path) -> None:
    """One reset connection: the client sends that object again, and only that."""
    api.create_repo(REPO)
    hub_here.interrupt_uploads(first=2)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub_here.interrupted.is_set()
    assert len(hub_here.uploads) == 2
    assert hub_here.count("PUT", status=0) == 1
    assert "model.safetensors" in api.list_repo_files(REPO)


def test_killed_upload_leaves_no_commit(api: HfApi, hub_here: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    """The client is killed in the middle of an object: objects before it stay, and no commit is made."""
    api.create_repo(REPO)
    hub_here.interrupt_uploads(first=2, kind="stall")
    code = f"from huggingface_hub import HfApi; HfApi().upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})"
    environment = {**os.environ, **hub_here.env(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    assert hub_here.interrupted.wait(limit(60.0))
    wait_until(lambda: len(hub_here.uploads) == 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub_here.heal()
    assert api.list_repo_files(REPO) == [".gitattributes"]
    sent = list(hub_here.uploads)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub_here.uploads[:1] == sent
    assert len(hub_here.uploads) == len(set(hub_here.uploads)) == 2


def test_object_must_be_what_was_announced(api: HfApi, hub_here: LoopbackHub) -> None:
    """Another content than the announced one is refused, and a pointer to nothing is not committed."""
    api.create_repo(REPO)
    oid = hashlib.sha256(b"right").hexdigest()
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 5}]}
    headers = {"Authorization": f"Bearer {hub_here.token}"}
    answer = get_session().post(f"{hub_here.endpoint}/{REPO}.git/info/lfs/objects/batch", json=batch, headers=headers)
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    assert get_session().put(href, content=b"wrong").status_code == 400
    assert get_session().put(href, content=b"right, and more").status_code == 400
    lines = '{"key": "header", "value": {"summary": "x"}}\n' + (
        f'{{"key": "lfsFile", "value": {{"path": "a.bin", "algo": "sha256", "oid": "{oid}", "size": 5}}}}'
    )
    address = f"{hub_here.endpoint}/api/models/{REPO}/commit/main"
    assert get_session().post(address, content=lines.encode(), headers=headers).status_code == 400
    assert hub_here.uploads == []
    assert get_session().put(href, content=b"right").status_code == 200
    assert get_session().post(address, content=lines.encode(), headers=headers).status_code == 200
    assert "a.bin" in api.list_repo_files(REPO)


def test_refusals_on_demand(api: HfApi, hub_here: LoopbackHub) -> None:
    """A rate limit, for as many requests as were asked for."""
    hub_here.refuse("POST /api/repos/create", 429, "Too many requests", count=1, Retry_After="1")
    with pytest.raises(HfHubHTTPError, match="429"):
        api.create_repo(REPO)
    assert api.create_repo(REPO).repo_id == REPO
