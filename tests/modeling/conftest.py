"""Tiny encoders for the tests of modeling/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_equissl.modeling import EquiSSLConfig

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
STEM = {"feature_size": 24, "equivariant_size": 8}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> Callable[..., EquiSSLConfig]:
    def build(stem: bool = False, **overrides: Any) -> EquiSSLConfig:
        return EquiSSLConfig(**{**TINY, **(STEM if stem else {}), **overrides})

    return build


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter a value of its own: zeros and ones would hide a token or a scale that is not used."""

    @torch.no_grad()
    def fill(module: nn.Module) -> nn.Module:
        for name, parameter in module.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            parameter.copy_(1 + noise if name.endswith(("norm1.weight", "norm2.weight", "lambda1")) else noise)
        return module.eval()

    return fill
