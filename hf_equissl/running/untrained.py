"""The encoder of a recipe before its first step: what numbers of trained encoders are held against."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from ..encoders import save_encoder
from ..modeling import EquiSSLModel
from ..recipes.recipe import Recipe


def save_untrained(recipe: Recipe, seed: int, folder: str | Path) -> Path:
    """Write the recipe's encoder with random weights of ``seed`` into ``folder``; an older one there is replaced.

    Raises:
        ValueError: As ``save_encoder``.
    """
    set_seed(seed)
    encoder = EquiSSLModel(recipe.build_encoder_config())
    return save_encoder(encoder, folder, recipe.views.image_mean, recipe.views.image_std)
