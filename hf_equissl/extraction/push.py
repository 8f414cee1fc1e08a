"""Upload features to a data set repository on the Hub, in one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..hub.contents import PublishError, check_secrets
from ..hub.licences import LICENCE_FILE, Licence
from ..hub.privacy import public_command, public_source, public_values
from ..hub.push import create_repository, explain_hub_errors
from .card import write_card
from .record import CARD, RECORD
from .settings import FORMATS


def push_features(
    folder: Path, record: Mapping[str, Any], repo_id: str, *, licence: Licence, private: bool = False
) -> str:
    """Upload shards, card and record; an interruption leaves the repository as it was.

    Args:
        folder: Folder of a finished extraction.
        record: Content of its ``extraction.json``, uploaded without paths of this machine.
        repo_id: "name/features"; created if it does not exist.
        licence: That of the features.
        private: Create it as private. An existing public repository is then refused.

    Returns:
        The address of the commit.

    Raises:
        PublishError: Rights or network are missing, ...; it says what to do.
    """
    with explain_hub_errors(repo_id):
        repo_id = create_repository(repo_id, private=private or None, repo_type="dataset")
        write_card(folder, record, name=repo_id, licence=licence)
        api = HfApi(library_name="hf_equissl")
        files: dict[str, Path | bytes] = {**_shards(folder, record), CARD: folder / CARD}
        files[RECORD] = (json.dumps(_public(record), indent=2) + "\n").encode()
        if licence.copy is not None:
            files[LICENCE_FILE] = Path(licence.copy)
        check_secrets(files)
        head = api.dataset_info(repo_id).sha
        there = api.list_repo_files(repo_id, repo_type="dataset", revision=head)
        gone = [name for name in there if name.startswith(("data/", LICENCE_FILE)) and name not in files]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in gone),
                *(CommitOperationAdd(name, content) for name, content in files.items()),
            ],
            commit_message="Upload features",
            repo_type="dataset",
            parent_commit=head,
        )
    return str(commit.commit_url)


def _shards(folder: Path, record: Mapping[str, Any]) -> dict[str, Path]:
    """List the files of all finished splits, as the record counts them; what else lies beside them stays.

    Raises:
        PublishError: One is missing, or a link.
    """
    names = []
    for split, content in record["splits"].items():
        if content["complete"]:
            count, suffix = content["selection"]["shards"], FORMATS[record["encoding"]["format"]]
            names += [f"{split}-{number:05d}-of-{count:05d}{suffix}" for number in range(count)]
            names += [f"{split}.safetensors.index.json"] if suffix == ".safetensors" else []
    for name in names:
        path = folder / "data" / name
        if path.is_symlink() or not path.is_file():
            raise PublishError(f"{path} is missing or a link. Delete a link; the same command makes the shard again.")
    return {f"data/{name}": folder / "data" / name for name in names}


def _public(record: Mapping[str, Any]) -> dict[str, Any]:
    """Remove paths and secrets from the record."""
    splits = {
        name: {
            **public_values(split),
            "data": public_source(split["data"]),
            "command": public_command(split["command"]),
            "classes": split["classes"],
        }
        for name, split in record["splits"].items()
    }
    return {**public_values(record), "encoder": public_source(record["encoder"]), "splits": splits}
