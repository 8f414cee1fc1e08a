"""Build an encoder from a state dict in our names, or list what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from ..modeling import EquiSSLConfig, EquiSSLModel

# Fields that have the same name and meaning in our configuration and in those of the stock ViTs.
SAME_NAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
    "qkv_bias",
)
_LISTED = 20


@contextmanager
def without_load_report() -> Iterator[None]:
    """Silence transformers' list of missing and unexpected weights, for callers that check them themselves."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def join_names(names: Iterable[str]) -> str:
    """Join names in order with commas; beyond 20 only their number is given."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more


def count_groups(names: Iterable[str]) -> str:
    """Count names by their first part, e.g. ``"classifier (2), pooler (2)"``."""
    counts: dict[str, int] = {}
    for name in sorted(names):
        group = name.split(".")[0]
        counts[group] = counts.get(group, 0) + 1
    return ", ".join(f"{group} ({count})" for group, count in counts.items())


def build_encoder(fields: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> EquiSSLModel:
    """Build an encoder with exactly these weights, in float32 and eval mode. The tensors are copied.

    Args:
        fields: Fields of ``EquiSSLConfig``.
        state: Weights under the names of ``EquiSSLModel``.
        source: Where they come from, for the error.

    Raises:
        ValueError: Weights are missing, left over or of another shape; the message lists them.
    """
    with no_init_weights():
        encoder = EquiSSLModel(EquiSSLConfig(**fields))
    expected = encoder.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    problems = {
        "missing": expected.keys() - state.keys(),
        "unknown": state.keys() - expected.keys(),
        "of another shape": shapes,
    }
    found = [f"{len(names)} {problem}: {join_names(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(
            f"The weights of {source!r} do not fit its architecture ({'; '.join(found)}). "
            "Give the complete checkpoint of a plain ViT encoder."
        )
    encoder.load_state_dict(dict(state))
    return encoder.eval()
