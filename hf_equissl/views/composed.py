"""Families made of others: all of them at once, or one of them per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .augmentation import apply_where
from .base import TransformationFamily
from .uniform import as_float_images, check_draws


class JointFamily(TransformationFamily):
    """Several families on one image, in the order in which they are named; parameters side by side.

    "SIE(all)" of "Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via Image
    Reconstruction" (https://arxiv.org/abs/2412.03314). At fraction t each member is at t of its own way; every member
    resamples once.

    Args:
        families: Each ``{"name": key of TRANSFORMATIONS, **its arguments}``, or a family.

    Parameters (B, p): those of the members, ``<family>_<parameter>``.

    Raises:
        ValueError: Fewer than two families, one twice, or one that cannot be a member.
    """

    def __init__(self, families: Sequence[Mapping[str, Any] | TransformationFamily]) -> None:
        self.families = _build_members(families)
        names = [_short_name(family) for family in self.families]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"families are {names}: expected two or more, each once.")
        members = list(zip(names, self.families, strict=True))
        self.parameter_names = tuple(f"{name}_{key}" for name, family in members for key in family.parameter_names)
        self.num_draws = sum(family.num_draws for family in self.families)
        self.continuous = all(family.continuous for family in self.families)

    @property
    def identity_parameters(self) -> tuple[float, ...]:
        """The members' identity parameters, side by side."""
        return tuple(value for family in self.families for value in family.identity_parameters)

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws (B, num_draws), the members' one after the other, into parameters (B, p)."""
        parts = check_draws(draws, self.num_draws).split([family.num_draws for family in self.families], dim=1)
        return torch.cat([family.sample(own) for family, own in zip(self.families, parts, strict=True)], dim=1)

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Apply each member in turn to (B, C, H, W), with parameters (B, p), fractions (F,) -> (B, F, C, H, W)."""
        first, *others = zip(self.families, self._split(parameters), strict=True)
        steps = list(first[0].path(images, first[1], fractions).unbind(1))
        for family, own in others:
            steps = [family.path(step, own, fractions[number : number + 1])[:, 0] for number, step in enumerate(steps)]
        return torch.stack(steps, dim=1)

    def targets(self, parameters: Tensor) -> Tensor:
        """Scale parameters (B, p) to each member's own targets (B, p)."""
        parts = zip(self.families, self._split(parameters), strict=True)
        return torch.cat([family.targets(own) for family, own in parts], dim=1)

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Split parameters (B, p) into those of each member."""
        return parameters.split([family.num_parameters for family in self.families], dim=1)


class OneOfFamily(JointFamily):
    """One of several families per image, each as often; the parameters of the others are those of their identity.

    "SIE(all, single each time)" of https://arxiv.org/abs/2412.03314. Where a family is not drawn it does not touch the
    image, bit for bit.

    Args:
        families: The members, written as in ``JointFamily``.

    Parameters (B, p): those of the members, ``<family>_<parameter>``.
    """

    def __init__(self, families: Sequence[Mapping[str, Any] | TransformationFamily]) -> None:
        super().__init__(families)
        self.num_draws += 1

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws (B, num_draws), of which the first chooses, into parameters (B, p)."""
        choice, own = check_draws(draws, self.num_draws).split([1, self.num_draws - 1], dim=1)
        chosen = (choice * len(self.families)).long().clamp(max=len(self.families) - 1)  # (B, 1)
        parts = own.split([family.num_draws for family in self.families], dim=1)
        columns = []
        for number, (family, part) in enumerate(zip(self.families, parts, strict=True)):
            drawn = family.sample(part).unbind(1)
            for column, identity in zip(drawn, family.identity_parameters, strict=True):
                columns.append(torch.where(chosen[:, 0] == number, column, identity))
        return torch.stack(columns, dim=1)

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Apply the chosen member: images (B, C, H, W), parameters (B, p), fractions (F,) -> (B, F, C, H, W)."""
        path = as_float_images(images)[:, None].repeat(1, len(fractions), 1, 1, 1)  # a copy, which is changed in place
        for family, own in zip(self.families, self._split(parameters), strict=True):
            identity = zip(own.unbind(1), family.identity_parameters, strict=True)
            touched = torch.stack([column != value for column, value in identity]).any(dim=0)  # (B,)
            path = apply_where(
                touched,
                lambda part, values, family=family: family.path(part[:, 0], values, fractions),
                path,
                own,
            )
        return path


def _build_members(families: Sequence[Mapping[str, Any] | TransformationFamily]) -> tuple[TransformationFamily, ...]:
    from . import build_transformation  # the registry holds the classes of this file, too

    members = []
    for entry in families:
        if not isinstance(entry, TransformationFamily) and (not isinstance(entry, Mapping) or "name" not in entry):
            raise ValueError(f"families holds {entry!r}: expected a family by name, such as {{name: rotation}}.")
        family = entry if isinstance(entry, TransformationFamily) else build_transformation(**entry)
        if isinstance(family, JointFamily) or family.from_data:
            raise ValueError(f"families holds {type(family).__name__}: it cannot be a member of another family.")
        members.append(family)
    return tuple(members)


def _short_name(family: TransformationFamily) -> str:
    from . import TRANSFORMATIONS

    return next((name for name, cls in TRANSFORMATIONS.items() if cls is type(family)), type(family).__name__.lower())
