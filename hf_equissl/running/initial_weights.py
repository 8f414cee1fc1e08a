"""Start from an encoder that exists instead of from random weights: ``model.init_from`` of a recipe.

The encoder's architecture replaces the recipe's, which says what to train from scratch. Of the section ``model`` only
the keys that concern the training stay (``OF_TRAINING``); an architecture key that was given on the command line and
contradicts the encoder is an error. The normalisation of the views is the encoder's too, unless the command line gives
another one. ``adopt_encoder`` makes the recipe that the run then trains and keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.hub import resolve_revision

from ..encoders.convert import convert_encoder, read_normalisation
from ..encoders.places import is_upstream_file
from ..hub.pretraining_state import load_pretraining_state
from ..modeling import EquiSSLConfig, EquiSSLModel
from ..pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from ..recipes.overrides import INIT_KEYS
from ..recipes.recipe import Recipe
from ..recipes.sections import encoder_fields
from ..utils.hub_waits import limit_waiting
from ..utils.load_errors import explain_load_errors
from ..utils.suggestions import RecipeError

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
# Keys of a recipe's section `model` that hold for every encoder. Sizes of the stem are among them: an encoder that has
# no stem, or another one, gets a new one.
OF_TRAINING = (
    "image_size",
    "use_mask_token",
    "feature_size",
    "equivariant_size",
    "drop_path_rate",
    "drop_path_mode",
    "attention_probs_dropout_prob",
    "initializer_range",
    "attn_implementation",
)
_POSITIONS = "embeddings.position_embeddings"
_MASK_TOKEN = "embeddings.mask_token"


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from.

    Attributes:
        encoder: The student, in fp32.
        teacher: The teacher of a pretraining state; ``None``: the teacher starts as a copy of the student.
        objectives: Name -> objective of a pretraining state, with its heads, decoders and centers.
        normalisation: Mean and standard deviation of the images that the encoder was trained on, if anything says so.
        revision: Commit on the Hub, if the encoder is from there.
    """

    encoder: EquiSSLModel
    teacher: EquiSSLModel | None = None
    objectives: Mapping[str, nn.Module] = field(default_factory=dict)
    normalisation: Normalisation | None = None
    revision: str | None = None

    def load(self, model: EquiSSLForPreTraining) -> None:
        """Write the weights into ``model``. What they do not hold stays as its constructor made it."""
        weights, _ = self.select(model)
        model.load_state_dict(weights, strict=False)

    def select(self, model: EquiSSLForPreTraining) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Choose which tensor goes where; of ``model`` only names and shapes are read.

        Returns:
            Name in the state of ``model`` -> tensor; part of ``model`` -> what becomes of it, for people.
        """
        state, said = _select_encoder(self.encoder, model.student)
        weights = {f"student.{name}": tensor for name, tensor in state.items()}
        if model.teacher is not None:
            said["teacher"] = "a copy of the student" if self.teacher is None else "taken"
            state, _ = _select_encoder(self.teacher or self.encoder, model.teacher)
            weights |= {f"teacher.{name}": tensor for name, tensor in state.items()}
        decoder = self.encoder.decoder
        for name, prefix, objective in _objectives(model):
            source = self.objectives.get(name)
            difference = None if source is None else _difference(objective, source)
            own_decoder = getattr(objective, "decoder", None)
            said[name] = "new" if difference is None else f"new, {difference}"
            if source is not None and difference is None:
                weights |= {f"{prefix}.{key}": tensor for key, tensor in source.state_dict().items()}
                said[name] = "taken"
            elif decoder is not None and own_decoder is not None:
                if (difference := _difference(own_decoder, decoder)) is None:
                    weights |= {f"{prefix}.decoder.{key}": tensor for key, tensor in decoder.state_dict().items()}
                    decoder = None  # one objective's
                said[name] = "decoder taken" if difference is None else f"new, decoder: {difference}"
        said |= {name: "left out, the recipe has none" for name in self.objectives if name not in said}
        return weights, said

    def describe(self, model: EquiSSLForPreTraining, recipe: Recipe) -> list[str]:
        """Say in lines for people what ``model`` starts from."""
        _, said = self.select(model)
        said["normalisation"] = self._describe_normalisation(recipe)
        width = max(map(len, said))
        return [f"starting from {_name(recipe)}", *(f"  {part:<{width}}  {text}" for part, text in said.items())]

    def _describe_normalisation(self, recipe: Recipe) -> str:
        used = recipe.views.image_mean, recipe.views.image_std
        text = "mean {}, std {}".format(*map(list, used))
        if self.normalisation is None:
            return f"{text}: the recipe's, nothing says what the encoder was trained with"
        if used == self.normalisation:
            return f"{text}: the encoder's"
        return f"{text}: given; the encoder was trained with mean {{}}, std {{}}".format(*map(list, self.normalisation))


def load_initial_weights(recipe: Recipe) -> InitialWeights:
    """Read what ``model.init_from`` names: an encoder (``encoders.convert_encoder``) or a whole pretraining state.

    Raises:
        RecipeError: It cannot be read, or is not an encoder that converts; with the reason.
    """
    source, asked = recipe.model["init_from"], recipe.model.get("init_revision")
    if asked is not None and Path(source).exists():
        raise RecipeError(
            f"model.init_revision: {asked!r} is a revision on the Hub, and {source} is here. Leave it out."
        )
    limit_waiting()
    # One commit for everything that is read; a repository may change meanwhile.
    revision = getattr(resolve_revision(source, asked), "resolved", asked)
    options = {"revision": revision, "subfolder": recipe.model.get("init_subfolder", "")}
    try:
        if _is_pretraining_state(source, options):
            initial = _read_pretraining_state(source, options)
        else:
            means = read_normalisation(source, **options)
            normalisation = None if means is None else cast(Normalisation, tuple(map(tuple, means)))
            initial = InitialWeights(convert_encoder(source, **options).float(), normalisation=normalisation)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.init_from (--init_from): {error}") from error
    for module in filter(None, (initial.encoder, initial.teacher, *initial.objectives.values())):
        for name, tensor in module.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise RecipeError(f"model.init_from (--init_from): {name} of {_name(recipe)} is not finite everywhere.")
    return replace(initial, revision=revision)


def adopt_encoder(
    recipe: Recipe, encoder: EquiSSLConfig, normalisation: Normalisation | None = None, revision: str | None = None
) -> Recipe:
    """Complete the recipe of a run that starts from an encoder. Doing it again gives the same recipe.

    Args:
        recipe: It names the encoder in ``model.init_from``.
        encoder: The encoder's architecture.
        normalisation: Mean and standard deviation that take the place of the recipe's; those that were given do not.
        revision: Commit on the Hub, kept where the recipe names no revision.

    Raises:
        RecipeError: A key that was given contradicts the encoder, or the recipe's image size does not fit its patches.
    """
    fields = [key for key in encoder_fields() if key not in OF_TRAINING]
    architecture = {**{key: getattr(encoder, key) for key in fields}, "patch_size": encoder.patch_side}
    _refuse_contradictions(recipe, architecture)
    named = {"init_from": None, "init_revision": revision} | {k: v for k, v in recipe.model.items() if k in INIT_KEYS}
    kept = {key: value for key, value in recipe.model.items() if key in OF_TRAINING}
    numbers: dict[str, Any] = dict(zip(("image_mean", "image_std"), normalisation or (), strict=False))
    numbers = {key: values for key, values in numbers.items() if f"views.{key}" not in recipe.given}
    named = {key: value for key, value in named.items() if value is not None}
    adopted = replace(recipe, model={**named, **architecture, **kept}, views=replace(recipe.views, **numbers))
    try:
        adopted.build_encoder_config()
    except RecipeError as error:
        raise RecipeError(f"{error} The architecture is that of {_name(recipe)}.") from error
    return adopted


def _refuse_contradictions(recipe: Recipe, architecture: dict[str, Any]) -> None:
    """Refuse given keys that contradict the encoder; those of a file are meant for training from scratch."""
    for key in sorted(recipe.given & {f"model.{name}" for name in ("preset", *architecture)}):
        value = recipe.model[key.removeprefix("model.")]
        wanted = {key.removeprefix("model."): value}
        if key == "model.preset":
            try:
                preset = EquiSSLConfig.from_preset(value)
            except ValueError as error:
                raise RecipeError(f"model: {error}") from error
            names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
            wanted = {name: getattr(preset, name) for name in names}
        for name, number in wanted.items():
            if number != architecture[name]:
                of_preset = f" ({name} {number})" if key == "model.preset" else ""
                raise RecipeError(
                    f"--{key} {value}{of_preset} contradicts --init_from {_name(recipe)}: {name} of that encoder is "
                    f"{architecture[name]}. Leave --{key} out: the architecture is the encoder's."
                )


def _name(recipe: Recipe) -> str:
    source, *where = (recipe.model.get(key) for key in ("init_from", "init_subfolder", "init_revision"))
    places = [f"{what} {value}" for what, value in zip(("subfolder", "revision"), where, strict=True) if value]
    return f"{source} ({', '.join(places)})" if places else str(source)


def _is_pretraining_state(source: str, options: dict[str, Any]) -> bool:
    if is_upstream_file(source):
        return False
    with explain_load_errors(source, **options):
        plain, _ = PreTrainedConfig.get_config_dict(source, **options)
    return plain.get("model_type") == EquiSSLPreTrainingConfig.model_type


def _read_pretraining_state(source: str, options: dict[str, Any]) -> InitialWeights:
    with explain_load_errors(source, "pretraining state", **options):
        state = load_pretraining_state(source, dtype=torch.float32, **options)
    objectives = {name: objective for name, _, objective in _objectives(state)}
    recipe = _find_recipe(source, options)
    views = None if recipe is None else Recipe.load_kept(recipe).views
    normalisation = None if views is None else (views.image_mean, views.image_std)
    return InitialWeights(state.student, state.teacher, objectives, normalisation)


def _find_recipe(source: str, options: dict[str, Any]) -> Path | None:
    """Find the recipe beside a published state or above a run's checkpoint, neither of which has an image processor."""
    if Path(source).exists():
        folder = Path(source, options["subfolder"]).resolve()
        return next((path for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if path.is_file()), None)
    try:
        name, subfolder = "recipe.yaml", options["subfolder"] or None
        return Path(hf_hub_download(source, name, subfolder=subfolder, revision=options["revision"]))
    except EntryNotFoundError:
        return None


def _objectives(model: EquiSSLForPreTraining) -> Iterator[tuple[str, str, nn.Module]]:
    """List (name, prefix in the state, objective) of the objectives that have parameters or buffers."""
    names = [(model.config.invariance["name"], "invariance")]
    names += [(name, f"equivariance.{index}") for index, name in enumerate(model.equivariance_names)]
    for name, prefix in names:
        objective = model.get_submodule(prefix)
        if objective.state_dict():
            yield name, prefix, objective


def _select_encoder(encoder: EquiSSLModel, target: EquiSSLModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Choose what of ``encoder`` goes into ``target``, positions at its image size; also part -> what becomes of it.

    Raises:
        ValueError: The two are not of one architecture.
    """
    state, wanted = encoder.state_dict(), target.state_dict()
    before, after = encoder.embeddings.grid_size, target.embeddings.grid_size
    said = {"encoder": "taken"}
    if before != after:
        state[_POSITIONS] = _resample_positions(encoder, after)
        grids = " to ".join(f"{rows} x {columns}" for rows, columns in (before, after))
        said["encoder"] = f"taken, positions resampled from {grids} patches"
    sizes = [(e.config.feature_size, e.config.equivariant_size) for e in (encoder, target)]
    if encoder.stem is not None and target.stem is None:
        said["stem"] = "left out, the recipe has none"
    optional = {"mask token": [_MASK_TOKEN], "stem": [name for name in wanted if name.startswith("stem.")]}
    for part, names in optional.items():
        names = [name for name in names if name in wanted]
        is_there = all(name in state for name in names) and (part != "stem" or sizes[0] == sizes[1])
        if names:
            said[part] = "taken" if is_there else "new"
        if not is_there:
            wanted = {name: tensor for name, tensor in wanted.items() if name not in names}
    if wrong := [name for name, tensor in wanted.items() if name not in state or state[name].shape != tensor.shape]:
        raise ValueError(f"The encoder to start from has no {wrong[0]} of shape {tuple(wanted[wrong[0]].shape)}.")
    return {name: state[name] for name in wanted}, said


@torch.no_grad()
def _resample_positions(encoder: EquiSSLModel, grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings to ``grid`` as the encoder's own forward does, so that outputs do not change."""
    patches = encoder.embeddings.interpolate_patch_positions(grid)
    if encoder.embeddings.is_cls_late:
        return patches
    return torch.cat((encoder.embeddings.position_embeddings[:, :1], patches), dim=1)


def _difference(target: nn.Module, source: nn.Module) -> str | None:
    """Say in which name or shape two states differ first; ``None`` if one fits the other."""
    ours, theirs = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (target, source))
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key, 'absent')} here, {theirs.get(key, 'absent')} there"
    return None
