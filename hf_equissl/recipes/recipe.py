"""Recipes: one YAML file says what is trained, on which views, with which data and arguments.

```yaml
name: my_run                     # optional, the file's name otherwise
description: One line.           # optional
extends: other.yaml              # optional: start from another recipe, then apply what stands here
num_processes: 16                # optional: how many processes the batch arithmetic was written for
imports: [my_objectives]         # optional: modules of your own that register what is named below
model: {preset: vit_small_patch16, feature_size: 512, equivariant_size: 256}     # preset, any EquiSSLConfig field
objectives:
  invariance: {name: vicreg}                                                     # key and keyword arguments
  equivariance: [{name: reconstruction, weight: 1.0}]          # each with its lambda; {weight: 0, views: keep}: control
views:
  pipeline: {name: vicreg}                                                       # preset and its settings
  transformation: {name: rotation, max_degrees: 45}                              # the family g, or null
  image_mean: [0.485, 0.456, 0.406]                                              # and image_std; ImageNet's otherwise
data: {source: ./photos}                       # arguments of load_images; num_images: for plans without the data set
training: {max_steps: 1000}                                                      # any EquiSSLTrainingArguments field
monitor: {every_steps: 500}                # optional: kNN accuracy and effective rank during training, MonitorSettings
```

``model: {init_from: facebook/dinov2-small}`` starts from an encoder that exists, with ``init_revision`` and
``init_subfolder`` beside it. Its architecture takes the place of the fields that say what to train from scratch.

Mappings merge key by key, lists are replaced. A mapping whose ``name`` changes is replaced too: the settings of one
transformation mean nothing to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data import Decoding, Subset, load_images
from ..modeling import EquiSSLConfig
from ..objectives import EQUIVARIANCE_OBJECTIVES, FILLED_IN, INVARIANCE_OBJECTIVES, Objective, takes_facts, weight_of
from ..pretraining.argument_checks import check_effect
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLPreTrainingConfig
from ..utils.coercion import check_arguments, coerce, hints_of, parameters_of
from ..utils.files import write_text
from ..utils.plain_values import check_plain
from ..utils.redaction import redact_values
from ..utils.strict_yaml import dump_yaml
from ..utils.suggestions import RecipeError, check_keys, check_known
from ..utils.versions import __version__
from ..views import SPECIAL_TRANSFORMATIONS, TRANSFORMATIONS, build_transformation
from ..views.facts import ViewFacts
from ..views.pipelines import PIPELINES, build_pipeline
from .imports import import_modules
from .monitor_settings import MonitorSettings
from .overrides import INIT_KEYS, TOP_KEYS, as_mapping, check_processes, expand_paths, resolve_recipe

if TYPE_CHECKING:
    from ..data import ImageSource
    from ..views.base import TransformationFamily
    from ..views.facts import ViewFacts
    from ..views.needs import Needs
from ..views.pipelines import ViewPipeline

# Keys of the section `data` beside the arguments of `load_images`.
_DATA_KEYS = {"max_bad_share": float, "shuffle_buffer": int, "num_images": int}
# Keys of the section `model` beside the fields of the encoder's config; the last one is not stored with the encoder.
_MODEL_KEYS = {**dict.fromkeys(INIT_KEYS, str | None), "preset": str, "attn_implementation": str}
_HUB_STRATEGIES = ("end", "every_save")
# How the recipe begins that a run keeps in its folder.
KEPT_RECIPE = "# As run by hf_equissl"
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


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every key is known and every value has its type. The module shows the shape of the file.

    Raises:
        RecipeError: ``load`` and ``from_dict`` raise it for unknown keys, wrong types, missing files and ``extends`` in
            a circle; ``build_*`` for values that contradict each other.
    """

    name: str
    model: dict[str, Any]
    objectives: ObjectivesSection
    views: ViewsSection
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    num_processes: int | None = None
    imports: list[str] = field(default_factory=list)
    given: frozenset[str] = field(default=frozenset(), compare=False)  # dotted keys that were set over the file

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        search: Sequence[str | Path] = (),
    ) -> Recipe:
        """Read a recipe with everything it extends, then apply ``overrides``.

        Args:
            path: YAML file.
            overrides: Dotted key -> value, e.g. ``{"training.max_steps": 100, "objectives.equivariance.0.weight": 0}``.
            search: Further folders in which ``extends`` may find a file.
        """
        overrides = overrides or {}
        raw = resolve_recipe(Path(path), overrides, [Path(folder) for folder in search])
        return cls.from_dict(raw, str(path), overrides)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = "recipe", given: Iterable[str] = ()) -> Recipe:
        """Check plain data, as YAML gives it.

        Args:
            raw: Section -> its mapping.
            origin: Where the data are from, for messages.
            given: Dotted keys that were set over the file.
        """
        check_plain(raw, "")
        check_keys(raw, TOP_KEYS, origin)
        imports = coerce(raw.get("imports") or [], list[str], "imports")
        import_modules(imports)
        raw = expand_paths(raw)
        for section in ("model", "objectives", "views"):
            if section not in raw:
                raise RecipeError(f"{origin}: the section {section!r} is missing.")
        hints = get_type_hints(cls)
        top = {key: coerce(raw[key], hints[key], key) for key in ("name", "description", "num_processes") if key in raw}
        if (processes := top.get("num_processes")) is not None:
            check_processes(processes, "num_processes", f", got {processes}")
        recipe = cls(
            **{"name": "recipe", **top},
            imports=imports,
            model=_check_model(as_mapping(raw["model"], "model")),
            objectives=_check_objectives(as_mapping(raw["objectives"], "objectives")),
            views=_check_views(as_mapping(raw["views"], "views")),
            data=_check_data(as_mapping(raw.get("data"), "data")),
            training=_check_training(as_mapping(raw.get("training"), "training")),
            monitor=_check_monitor(as_mapping(raw.get("monitor"), "monitor")),
            given=frozenset(given),
        )
        if "init_from" not in recipe.model:  # the sizes of an encoder to start from are not known yet
            recipe.build_pretraining_config()  # values that contradict each other fail here, not minutes later
        recipe.build_transformation()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Turn the recipe into plain data that ``from_dict`` reads back."""
        plain = {
            "name": self.name,
            "description": self.description,
            "num_processes": self.num_processes,
            "imports": self.imports or None,
            "model": self.model,
            "objectives": vars(self.objectives),
            "views": vars(self.views),
            "data": self.data,
            "training": self.training,
            "monitor": self.monitor or None,
        }
        return _plain({key: value for key, value in plain.items() if value not in ("", None)})

    def to_yaml(self) -> str:
        """Write the recipe as YAML, with ``extends`` and overrides resolved, and without secrets."""
        return dump_yaml(redact_values(self.to_dict()))

    def save(self, directory: str | Path, remarks: Sequence[str] = ()) -> Path:
        """Write ``recipe.yaml`` into ``directory``, headed by ``remarks``; returns its path."""
        path = Path(directory) / "recipe.yaml"
        head = "".join(f"# {line}\n" for line in remarks)
        write_text(path, f"{KEPT_RECIPE} {__version__}.\n{head}{self.to_yaml()}")
        return path

    def build_encoder_config(self) -> EquiSSLConfig:
        """Build the encoder's configuration; with ``init_from`` of a recipe that ``adopt_encoder`` returned."""
        values = {key: value for key, value in self.model.items() if key not in INIT_KEYS}
        preset = values.pop("preset", None)
        with naming_section("model"):
            return EquiSSLConfig.from_preset(preset, **values) if preset else EquiSSLConfig(**values)

    @property
    def objective_classes(self) -> dict[str, type[Objective]]:
        """Class by name of each objective that is built, or whose views are kept."""
        section = self.objectives
        used = [entry["name"] for entry in section.equivariance if entry["weight"] or "views" in entry]
        name = section.invariance["name"]
        return {name: INVARIANCE_OBJECTIVES[name], **{name: EQUIVARIANCE_OBJECTIVES[name] for name in used}}

    @property
    def reads_num_classes(self) -> tuple[str, ...]:
        """Names of the objectives that are built from the number of classes in the data set."""
        return tuple(name for name, cls in self.objective_classes.items() if cls.reads_num_classes)

    def build_pretraining_config(self, num_classes: int | None = None) -> EquiSSLPreTrainingConfig:
        """Build the configuration of encoder and objectives.

        Args:
            num_classes: Of the data set, for objectives that are built from it.
        """
        encoder = self.build_encoder_config()
        run: dict[str, Any] = {"attn_implementation": self.model.get("attn_implementation")}
        if any(map(takes_facts, self.objective_classes.values())):
            settings = dict(self.views.pipeline)
            spec = PIPELINES[settings.pop("name")].override(settings)
            run["facts"] = ViewFacts.of(spec, self.build_transformation(), num_classes).to_dict()
        with naming_section("objectives"):
            return EquiSSLPreTrainingConfig(
                encoder=encoder,
                invariance=deepcopy(self.objectives.invariance),
                equivariance=deepcopy(self.objectives.equivariance),
                **run,
            )

    def build_transformation(self) -> TransformationFamily | None:
        """Build the family g; ``None`` where the recipe has none."""
        if self.views.transformation is None:
            return None
        with naming_section("views.transformation"):
            return build_transformation(**self.views.transformation)

    def build_pipeline(self, needs: Needs) -> ViewPipeline:
        """Build the pipeline that makes what ``needs`` asks for, at the encoder's image size."""
        encoder = self.build_encoder_config()
        size: Any = encoder.image_size  # a pair is refused by the pipeline: crops are squares
        with naming_section("views.pipeline"):
            pipeline = build_pipeline(
                image_size=size,
                transformation=self.build_transformation(),
                needs=needs,
                image_mean=self.views.image_mean,
                image_std=self.views.image_std,
                patch_size=encoder.patch_side,
                **self.views.pipeline,
            )
        local = pipeline.local
        if local is not None and (local.size % encoder.patch_side or local.size > size):
            raise RecipeError(
                f"views.pipeline.local.size: expected a multiple of model.patch_size, {encoder.patch_side}, and no "
                f"more than model.image_size, {size}, got {local.size}."
            )
        return pipeline

    def build_source(self) -> ImageSource:
        """Open the data set, whose own errors say what is wrong with it."""
        if not self.data.get("source"):
            raise RecipeError("data.source: no data set is named. Give one with --data (a folder, a file, a Hub id).")
        return load_images(**self.source_arguments)

    @property
    def source_arguments(self) -> dict[str, Any]:
        """Arguments of ``load_images``: the section ``data`` without what it says beside them."""
        return {key: value for key, value in self.data.items() if key not in _DATA_KEYS}

    @property
    def expected_images(self) -> int | None:
        """Number of images that the recipe was written for, which plans without a data set use."""
        return self.data.get("num_images")

    @property
    def max_bad_share(self) -> float:
        """Share of images that may fail to decode before the run stops."""
        return self.data.get("max_bad_share", 0.01)

    def build_training_arguments(self, output_dir: str | Path, **extra: Any) -> EquiSSLTrainingArguments:
        """Build the arguments of the run, with ``extra`` in place of the recipe's."""
        with naming_section("training"):
            return EquiSSLTrainingArguments(output_dir=str(output_dir), **{**deepcopy(self.training), **extra})


def _check_model(raw: dict[str, Any]) -> dict[str, Any]:
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


def _check_objectives(raw: dict[str, Any]) -> ObjectivesSection:
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


def _check_views(raw: dict[str, Any]) -> ViewsSection:
    check_keys(raw, [f.name for f in fields(ViewsSection)], "views")
    pipeline = as_mapping(raw.get("pipeline"), "views.pipeline")
    name = _check_name(pipeline, PIPELINES, "views.pipeline")
    with naming_section("views.pipeline"):
        settings = {key: value for key, value in pipeline.items() if key != "name"}
        PIPELINES[name].override(settings, where=f"The view pipeline {name!r}")
    family = raw.get("transformation")
    if family is not None:
        family = _check_entry(family, TRANSFORMATIONS | SPECIAL_TRANSFORMATIONS, "views.transformation")
    hints = get_type_hints(ViewsSection)
    numbers = {k: coerce(raw[k], hints[k], f"views.{k}") for k in ("image_mean", "image_std") if k in raw}
    return ViewsSection(pipeline, family, **numbers)


def _check_data(raw: dict[str, Any]) -> dict[str, Any]:
    hints = {name: parameter.annotation for name, parameter in parameters_of(load_images).items()}
    hints |= {**_DATA_KEYS, "source": str | None}  # a shipped recipe may leave the source to --data
    check_keys(raw, hints, "data")
    data = {key: coerce(value, hints[key], f"data.{key}") for key, value in raw.items()}
    if not 0 <= data.get("max_bad_share", 0.0) <= 1:
        raise RecipeError(f"data.max_bad_share: expected a share from 0 to 1, got {data['max_bad_share']}.")
    if data.get("shuffle_buffer", 0) < 0:
        raise RecipeError(f"data.shuffle_buffer: expected 0 (file order) or more images, got {data['shuffle_buffer']}.")
    with naming_section("data"):
        Decoding(**{key: data[key] for key in ("value_range", "max_pixels") if key in data})
    if (subset := data.get("subset")) is not None:
        data["subset"] = check_arguments(subset, Subset, "data.subset")
        with naming_section("data.subset"):
            Subset(**data["subset"])
    if data.get("num_images", 1) < 1:
        raise RecipeError(f"data.num_images: expected 1 or more, got {data['num_images']}.")
    return data


def _check_training(raw: dict[str, Any]) -> dict[str, Any]:
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
    with naming_section("training"):
        check_effect(training, EquiSSLTrainingArguments)
    return training


def _check_monitor(raw: dict[str, Any]) -> dict[str, Any]:
    settings = check_arguments(raw, MonitorSettings, "monitor")
    with naming_section("monitor"):
        MonitorSettings(**settings)
    if settings and "every_steps" not in settings:  # null is a way to switch it off
        name = min(settings)
        raise RecipeError(
            f"monitor.{name}: nothing is measured without monitor.every_steps. Set it, e.g. to 500, or leave this out."
        )
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def naming_section(where: str) -> Iterator[None]:
    """Let errors of constructors name the section that they come from."""
    try:
        yield
    except RecipeError:
        raise
    except StrictDataclassError as error:  # wraps what a check raised in a second sentence about the check's name
        raise RecipeError(f"{where}: {error.__cause__ or error}") from error
    except Exception as error:  # of libraries, too, which raise what they like
        said = str(error) if isinstance(error, ValueError | TypeError | ImportError) else repr(error)
        raise RecipeError(f"{where}: {said}") from error
