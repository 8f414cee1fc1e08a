"""How long a Hub that accepts a connection and never answers is waited for. Its client would wait for ever."""

from __future__ import annotations

import functools

SECONDS = 60.0


@functools.cache
def limit_waiting() -> None:
    """Let each request to the Hub fail that gets no byte within ``SECONDS``, or ``HF_HUB_DOWNLOAD_TIMEOUT`` if longer.

    Called where this package goes to the Hub, and not at import: it concerns all requests of the process.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> object:
        made = default_client_factory()
        made.timeout = max(SECONDS, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        return made

    set_client_factory(client)  # type: ignore[arg-type]
