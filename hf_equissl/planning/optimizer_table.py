"""How the optimizer treats every parameter, in few lines: parameters that are treated alike share one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..pretraining.optimizer import ParameterRule

Row = tuple[str, str, str, str, str]


def optimizer_rows(rules: Sequence[ParameterRule]) -> list[Row]:
    """Build a table with a heading: learning-rate multiplier, decay, tensors, parameters, names.

    Args:
        rules: One per trained parameter, as ``pretraining.optimizer.parameter_rules`` gives them.

    Returns:
        One line per optimizer group and module, in the order of the model. Expanding the braces of its names as a shell
        does gives each parameter once. Layers that are held for the first epochs are marked in the second column.
    """
    lines: dict[tuple[int, str], list[ParameterRule]] = {}
    for rule in rules:
        lines.setdefault((rule.number, rule.module), []).append(rule)
    rows: list[Row] = [("lr x", "decay", "tensors", "parameters", "names")]
    for members in lines.values():
        group = members[0].group
        decay = ("yes" if group.decayed else "no") + (", held first" if group.last_layer else "")
        count = sum(math.prod(rule.shape) for rule in members)
        names = fold_names(rule.name for rule in members)
        rows.append((f"{group.lr_multiplier:.4g}", decay, str(len(members)), f"{count:,}", names))
    return rows


def fold_names(names: Iterable[str]) -> str:
    """Fold names as a shell would expand them: ``["a.0.w", "a.0.b", "a.1.w", "a.1.b"]`` -> ``a.{0,1}.{w,b}``."""
    return _fold([tuple(name.split(".")) for name in names])


def _fold(names: Sequence[tuple[str, ...]]) -> str:
    tails: dict[str, list[tuple[str, ...]]] = {}
    for head, *tail in names:
        tails.setdefault(head, []).append(tuple(tail))
    heads: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for head, rest in tails.items():
        heads.setdefault(tuple(rest), []).append(head)
    parts = [f"{_braces(group)}.{_fold(rest)}" if rest != ((),) else _braces(group) for rest, group in heads.items()]
    return _braces(parts)


def _braces(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}"
