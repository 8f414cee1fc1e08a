"""How long a Hub that accepts a connection and never answers is waited for. Its client would wait for ever."""

from __future__ import annotations

import functools

SECONDS = 60.0


@functools.cache
def limit_waiting() -> None:
    """Let each request to the Hub fail that gets no byte within ``SECONDS``, or ``HF_HUB_DOWNLOAD_TIMEOUT`` if longer.

    Called where this package goes to the Hub, and not at import: it concerns all requests of the process. A client
    that somebody else has set stays as it is.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    def client() -> object:
        made = _http.default_client_factory()
        made.timeout = max(SECONDS, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        return made

    if _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory:
        set_client_factory(client)  # type: ignore[arg-type]
