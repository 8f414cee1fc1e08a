"""Fixtures of the tests about the Hub."""

import pytest

pytest.register_assert_rewrite("tests.hub.fixtures")  # before the import: modules elsewhere name it as their plugin

from .fixtures import api, hub, hub_here  # noqa: E402

__all__ = ["api", "hub", "hub_here"]
