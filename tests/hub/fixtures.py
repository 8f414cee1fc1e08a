"""The loopback Hub as fixtures. A test module outside this folder says ``pytest_plugins = ["tests.hub.fixtures"]``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub import HfApi, constants

from .loopback_hub import LoopbackHub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """An empty Hub on 127.0.0.1. A subprocess gets ``env={**os.environ, **hub.env(tmp_path / "home")}``."""
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def hub_here(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The Hub, for the client of this very process: what it read from the environment at import is read again."""
    home = tmp_path / "hub_home"
    for name, value in hub.env(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    return hub


@pytest.fixture
def api(hub_here: LoopbackHub) -> HfApi:
    """The real client, logged in as the Hub's user."""
    return HfApi(endpoint=hub_here.endpoint, token=hub_here.token)
