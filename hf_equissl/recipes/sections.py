"""The sections of a recipe, each checked by itself: every key is known and every value has its type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data import Decoding, Subset, load_images
from ..modeling import EquiSSLConfig
from ..objectives import EQUIVARIANCE_OBJECTIVES, FILLED_IN, INVARIANCE_OBJECTIVES, weight_of
from ..pretraining.argument_checks import check_effect
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..utils.coercion import check_arguments, coerce, hints_of, parameters_of
from ..utils.suggestions import RecipeError, check_keys, check_known
from ..views import SPECIAL_TRANSFORMATIONS, TRANSFORMATIONS
from ..views.pipelines import PIPELINES
from .monitor_settings import MonitorSettings
from .overrides import INIT_KEYS, as_mapping

# Keys of the section `data` beside the arguments of `load_images`.
DATA_KEYS = {"max_bad_share": float, "shuffle_buffer": int, "num_images": int}
# Keys of the section `model` beside the fields of the encoder's config; the last one is not stored with the encoder.
_MODEL_KEYS = {**dict.fromkeys(INIT_KEYS, str | None), "preset": str, "attn_implementation": str}
_HUB_STRATEGIES = ("end", "every_save")
_NOT_IN_RECIPES = {
    "hub_always_push": "A save during a running upload is left to the next one.",
    "output_dir": "Give the folder with --output_dir.",
    "resume_from_checkpoint": "Use --resume.",
    "hub_token": "A recipe is stored with each run and must hold no secret. Log in with `hf auth login`.",
    "learning_rate_and_base": "`learning_rate` would be replaced by `base_learning_rate`. Set one of them to null.",
}


@dataclass(frozen=True)
class ObjectivesSection:
    """One invariance objective and any number of equivariance objectives, each ``{"name", **keyword arguments}``."""

    invariance: dict[str, Any]
    equivariance: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ViewsSection:
    """The base method's augmentation pipeline, the transformation family g (``None``: no g), the normalisation."""

    pipeline: dict[str, Any]
    transformation: dict[str, Any] | None = None
    image_mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)


@contextmanager
def name_section(where: str) -> Iterator[None]:
    """Let errors of constructors name the section that they come from."""
    try:
        yield
    except RecipeError:
        raise
    except StrictDataclassError as error:  # wraps what a check raised in a second sentence about the check's name
        raise RecipeError(f"{where}: {error.__cause__ or error}") from error
    except Exception as error:  # libraries raise what they like
        said = str(error) if isinstance(error, ValueError | TypeError | ImportError) else repr(error)
        raise RecipeError(f"{where}: {said}") from error


def check_model(raw: dict[str, Any]) -> dict[str, Any]:
    """Check the fields of the encoder, and where it starts from."""
    hints = encoder_fields() | _MODEL_KEYS
    check_keys(raw, hints, "model")
    model = {key: coerce(value, hints[key], f"model.{key}") for key, value in raw.items()}
    model = {key: value for key, value in model.items() if key not in INIT_KEYS or value not in (None, "")}
    if (alone := model.keys() & set(INIT_KEYS)) and "init_from" not in model:
        raise RecipeError(f"model.{min(alone)}: there is no model.init_from (--init_from) that it would belong to.")
    return model


def encoder_fields() -> dict[str, Any]:
    """List the fields of an encoder's config that a recipe may set, with their types.

    Left out are decoders, which belong to the objectives, and what only classifiers and backbones read.
    """
    others = ("decoder_", "num_intermediate_images", "pooling", "apply_layernorm", "reshape_", "equissl_version", "_")
    return {key: kind for key, kind in hints_of(EquiSSLConfig).items() if not key.startswith(others)}


def _check_entry(
    raw: Any, registry: Mapping[str, Any], where: str, skip: Sequence[str] = (), beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Check ``{"name": key of registry, **arguments of its constructor}``; drops the keys ``beside`` those."""
    entry = as_mapping(raw, where)
    name = _check_name(entry, registry, where)
    own = ("name", *beside)
    # With all keys, so that a misspelt `weight` finds its neighbour.
    check_keys(entry, (*own, *parameters_of(registry[name], skip=skip)), f"{where} ({name})")
    arguments = {key: value for key, value in entry.items() if key not in own}
    return {"name": name} | check_arguments(arguments, registry[name], f"{where} ({name})", skip=skip)


def _check_name(entry: dict[str, Any], registry: Mapping[str, Any], where: str) -> str:
    if "name" not in entry:
        raise RecipeError(f"{where}: `name` must be given, one of {', '.join(sorted(registry))}.")
    name: str = coerce(entry["name"], str, f"{where}.name")
    check_known(name, sorted(registry), f"{where}.name")
    return name


def check_objectives(raw: dict[str, Any]) -> ObjectivesSection:
    """Check the objectives, each with its arguments."""
    check_keys(raw, [f.name for f in fields(ObjectivesSection)], "objectives")
    entries = []
    listed = [] if raw.get("equivariance") is None else coerce(raw["equivariance"], list, "objectives.equivariance")
    for index, item in enumerate(listed):
        where = f"objectives.equivariance.{index}"
        entry = _check_entry(item, EQUIVARIANCE_OBJECTIVES, where, skip=FILLED_IN, beside=("weight", "views"))
        weight = coerce(weight_of(item), float, f"{where}.weight")
        views = {"views": coerce(item["views"], Literal["keep"], f"{where}.views")} if "views" in item else {}
        entries.append({"name": entry.pop("name"), "weight": weight, **views, **entry})
    invariance = _check_entry(raw.get("invariance"), INVARIANCE_OBJECTIVES, "objectives.invariance", skip=FILLED_IN)
    return ObjectivesSection(invariance, entries)


def check_views(raw: dict[str, Any]) -> ViewsSection:
    """Check pipeline, transformation and normalisation."""
    check_keys(raw, [f.name for f in fields(ViewsSection)], "views")
    pipeline = as_mapping(raw.get("pipeline"), "views.pipeline")
    name = _check_name(pipeline, PIPELINES, "views.pipeline")
    with name_section("views.pipeline"):
        settings = {key: value for key, value in pipeline.items() if key != "name"}
        PIPELINES[name].override(settings, where=f"The view pipeline {name!r}")
    family = raw.get("transformation")
    if family is not None:
        family = _check_entry(family, {**TRANSFORMATIONS, **SPECIAL_TRANSFORMATIONS}, "views.transformation")
    hints = get_type_hints(ViewsSection)
    numbers = {k: coerce(raw[k], hints[k], f"views.{k}") for k in ("image_mean", "image_std") if k in raw}
    return ViewsSection(pipeline, family, **numbers)


def check_data(raw: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of ``load_images`` and what stands beside them."""
    hints = {name: parameter.annotation for name, parameter in parameters_of(load_images).items()}
    hints |= {**DATA_KEYS, "source": str | None}  # a shipped recipe may leave the source to --data
    check_keys(raw, hints, "data")
    data = {key: coerce(value, hints[key], f"data.{key}") for key, value in raw.items()}
    if not 0 <= data.get("max_bad_share", 0.0) <= 1:
        raise RecipeError(f"data.max_bad_share: expected a share from 0 to 1, got {data['max_bad_share']}.")
    if data.get("shuffle_buffer", 0) < 0:
        raise RecipeError(f"data.shuffle_buffer: expected 0 (file order) or more images, got {data['shuffle_buffer']}.")
    with name_section("data"):
        Decoding(**{key: data[key] for key in ("value_range", "max_pixels") if key in data})
    if (subset := data.get("subset")) is not None:
        data["subset"] = check_arguments(subset, Subset, "data.subset")
        with name_section("data.subset"):
            Subset(**data["subset"])
    if data.get("num_images", 1) < 1:
        raise RecipeError(f"data.num_images: expected 1 or more, got {data['num_images']}.")
    return data


def check_training(raw: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of the Trainer."""
    hints = get_type_hints(EquiSSLTrainingArguments)
    for key in raw.keys() & _NOT_IN_RECIPES.keys():
        raise RecipeError(f"training: {key!r} does not belong into a recipe. {_NOT_IN_RECIPES[key]}")
    valid = [item.name for item in fields(EquiSSLTrainingArguments) if item.init and item.name not in _NOT_IN_RECIPES]
    check_keys(raw, valid, "training")
    if (strategy := raw.get("hub_strategy", "end")) not in _HUB_STRATEGIES:
        raise RecipeError(f"training.hub_strategy: expected one of {', '.join(_HUB_STRATEGIES)}, got {strategy!r}.")
    if raw.get("learning_rate") is not None and raw.get("base_learning_rate") is not None:
        raise RecipeError(f"training: {_NOT_IN_RECIPES['learning_rate_and_base']}")
    training = {key: coerce(value, hints[key], f"training.{key}") for key, value in raw.items()}
    with name_section("training"):
        check_effect(training, EquiSSLTrainingArguments)
    return training


def check_monitor(raw: dict[str, Any]) -> dict[str, Any]:
    """Check the settings of the monitor."""
    settings = check_arguments(raw, MonitorSettings, "monitor")
    with name_section("monitor"):
        MonitorSettings(**settings)
    if settings and "every_steps" not in settings:  # null is a way to switch it off
        name = min(settings)
        raise RecipeError(
            f"monitor.{name}: nothing is measured without monitor.every_steps. Set it, e.g. to 500, or leave this out."
        )
    return settings
