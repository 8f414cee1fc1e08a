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

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..data import load_images
from ..modeling import EquiSSLConfig
from ..objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, Objective, takes_facts
from ..pretraining.argument_checks import WITHOUT_EFFECT
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLPreTrainingConfig
from ..utils.coercion import coerce
from ..utils.files import write_text
from ..utils.imports import import_modules
from ..utils.plain_values import check_plain
from ..utils.redaction import redact_values
from ..utils.strict_yaml import dump_yaml
from ..utils.suggestions import RecipeError, check_keys
from ..utils.versions import __version__
from ..views import build_transformation
from ..views.facts import ViewFacts
from ..views.pipelines import PIPELINES, build_pipeline
from .overrides import INIT_KEYS, TOP_KEYS, as_mapping, check_processes, expand_paths, resolve_recipe
from .sections import (
    DATA_KEYS,
    ObjectivesSection,
    ViewsSection,
    check_data,
    check_model,
    check_monitor,
    check_objectives,
    check_training,
    check_views,
    name_section,
)

if TYPE_CHECKING:
    from ..data import ImageSource
    from ..views.base import TransformationFamily
    from ..views.needs import Needs
    from ..views.pipelines import ViewPipeline

# How the recipe begins that a run keeps in its folder.
KEPT_RECIPE = "# As run by hf_equissl"


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
    def load_kept(cls, path: str | Path) -> Recipe:
        """Read the recipe that a run keeps, of an earlier version too: what it need not have said is passed over."""
        return cls.from_dict(drop_without_effect(resolve_recipe(Path(path), {}, [])), str(path))

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
            model=check_model(as_mapping(raw["model"], "model")),
            objectives=check_objectives(as_mapping(raw["objectives"], "objectives")),
            views=check_views(as_mapping(raw["views"], "views")),
            data=check_data(as_mapping(raw.get("data"), "data")),
            training=check_training(as_mapping(raw.get("training"), "training")),
            monitor=check_monitor(as_mapping(raw.get("monitor"), "monitor")),
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
        return _to_plain({key: value for key, value in plain.items() if value not in ("", None)})

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
        with name_section("model"):
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
            num_classes: Number of classes of the data set, for objectives that are built from it.
        """
        encoder = self.build_encoder_config()
        run: dict[str, Any] = {"attn_implementation": self.model.get("attn_implementation")}
        if any(map(takes_facts, self.objective_classes.values())):
            settings = dict(self.views.pipeline)
            spec = PIPELINES[settings.pop("name")].override(settings)
            run["facts"] = ViewFacts.of(spec, self.build_transformation(), num_classes).to_dict()
        with name_section("objectives"):
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
        with name_section("views.transformation"):
            return build_transformation(**self.views.transformation)

    def build_pipeline(self, needs: Needs) -> ViewPipeline:
        """Build the pipeline that makes what ``needs`` asks for, at the encoder's image size."""
        encoder = self.build_encoder_config()
        size: Any = encoder.image_size  # a pair is refused by the pipeline: crops are squares
        with name_section("views.pipeline"):
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
        return {key: value for key, value in self.data.items() if key not in DATA_KEYS}

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
        with name_section("training"):
            return EquiSSLTrainingArguments(output_dir=str(output_dir), **{**deepcopy(self.training), **extra})


def drop_without_effect(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out training settings without effect in a recipe's plain data: earlier versions took what is refused."""
    if not raw.get("training"):
        return dict(raw)
    training = as_mapping(raw["training"], "training")
    return {**raw, "training": {key: value for key, value in training.items() if key not in WITHOUT_EFFECT}}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value
