"""Adapters: made on a classifier, saved alone with what they belong to, loaded onto their base, merged into it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..encoders.places import BASE_FILE
from ..hub.places import FINETUNED_FILE
from ..hub.privacy import is_hub_id, public_source
from ..utils.files import write_text
from ..utils.load_errors import LoadError, explain_load_errors, read_config
from .settings import FineTuningSettings
from .tasks import Task, make_task
from .weights import architecture_of, encoder_digest, head_names

if TYPE_CHECKING:
    from peft import PeftModel


_BLOCK_LAYERS = r"(attention\.[qkvo]_proj|mlp\.fc[12])"
_DINOV2 = rf"(.*\.)?encoder\.layer\.\d+\.{_BLOCK_LAYERS}"
_VIT = rf"(.*\.)?layers\.\d+\.{_BLOCK_LAYERS}"

# model_type -> regular expression for the full name of a module, as ``LoraConfig.target_modules`` takes it.
LORA_TARGETS: dict[str, str] = {
    "equissl": _DINOV2,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "vit": _VIT,
    "ijepa": _VIT,
}


def register_lora_targets() -> None:
    """Make PEFT's ``LoraConfig()`` without ``target_modules`` work for the model types of ``LORA_TARGETS``.

    For code that uses PEFT itself; our own functions name the modules. PEFT's choice stays where it has one, and
    calling this again changes nothing.

    Raises:
        ImportError: without PEFT.
    """
    from peft.utils import constants

    for model_type, pattern in LORA_TARGETS.items():
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, pattern)


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a fine-tuned model or adapter is, beside its weights.

    Attributes:
        method: Key of ``METHODS``.
        base: Encoder that it started from: a Hub id, or the folder as it was given; of what was loaded, its name.
        revision: Commit of the base on the Hub, where it came from there.
        subfolder: Folder of the base in its repository.
        digest: SHA-256 of the base encoder's weights.
        architecture: Type and sizes of the base encoder.
        pooling: What the head reads.
        classes: Names, in the order of the labels.
        image_size: Side of the images in pixels.
        task: Key of ``TASKS``.
        task_options: What makes an equal task.
    """

    method: str
    base: str
    revision: str | None
    subfolder: str
    digest: str
    architecture: dict[str, Any]
    pooling: str
    classes: list[str]
    image_size: int
    task: str = "classification"
    task_options: dict[str, Any] = field(default_factory=dict)

    def make_task(self) -> Task:
        """Make the task that the model was trained for.

        Raises:
            ValueError: it is not registered here.
        """
        return make_task(self.task, self.task_options)

    def save(self, folder: Path) -> None:
        """Write ``finetuning.json`` into ``folder``, where the base is called as others know it.

        The way to the base on this machine stands in a hidden file, which is not published: an adapter needs it, and
        whoever asks for the terms of what a model was made of.
        """
        base = public_source(self.base)
        content = {"format": FORMAT_VERSION, **asdict(self), "base": base}
        write_text(folder / FINETUNED_FILE, json.dumps(content, indent=2) + "\n")
        config = folder / "adapter_config.json"
        if config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            settings["base_model_name_or_path"] = base if base == self.base and is_hub_id(base) else None
            write_text(config, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if base != self.base:
            write_text(folder / BASE_FILE, f"{self.base}\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}).") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT_VERSION:
            raise ValueError(f"{path} is not a description of a fine-tuned model of format {FORMAT_VERSION}.")
        names = {item.name for item in fields(cls)}
        later = {"task", "task_options"}  # absent from what was written before there were tasks
        if wrong := (names - later - content.keys()) | (content.keys() - names):
            raise ValueError(f"{path} has other entries than expected: {sorted(wrong)}.")
        return cls(**content)


def describe(
    task: Task, model: nn.Module, settings: FineTuningSettings, commit: str | None, classes: list[str]
) -> Description:
    """Describe a model that was just loaded, at ``commit`` of the Hub, and is not trained yet."""
    encoder: Any = task.encoder(model)
    return Description(
        method=settings.method,
        base=settings.base,
        revision=commit,
        subfolder=settings.subfolder,
        digest=encoder_digest(encoder),
        architecture=architecture_of(encoder.config),
        pooling=task.reads(model),
        classes=classes,
        image_size=task.inputs.image_size,
        task=task.name,
        task_options=task.options(),
    )


class PeftMissingError(ImportError):
    """Adapters were asked for, and PEFT is not installed."""


def check_peft() -> None:
    """Raise ``PeftMissingError`` with a remedy where PEFT is not installed."""
    if find_spec("peft") is None:
        raise PeftMissingError("Adapters (lora, dora) need PEFT: pip install 'hf-equissl[peft]'.")


def add_adapters(model: nn.Module, encoder_name: str, settings: FineTuningSettings) -> PeftModel:
    """Freeze a model and put LoRA or DoRA adapters into its encoder; the head is trained and saved with them.

    Raises:
        PeftMissingError: without PEFT.
        ValueError: no default for this model type and no ``target_modules``, or they match nothing.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    model_type: str = model.get_submodule(encoder_name).config.model_type  # type: ignore[union-attr, assignment]
    if settings.target_modules is None and model_type not in LORA_TARGETS:
        raise ValueError(
            f"There are no default target modules for {model_type} models. Name the layers with --target_modules, a "
            "regular expression for their full names; or use --method full or linear."
        )
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_dora=settings.method == "dora",
        target_modules=settings.target_modules or LORA_TARGETS[model_type],
        modules_to_save=head_names(model, encoder_name),
        base_model_name_or_path=settings.base,
    )
    try:
        with _silence_deprecation():
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--target_modules {config.target_modules}: {error}") from error
    return adapted


@contextmanager
def _silence_deprecation() -> Iterator[None]:
    """Silence the warning about a name that PEFT still uses and transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def load_finetuned(
    source: str | Path,
    base: str | Path | None = None,
    *,
    merge: bool = False,
    subfolder: str = "",
    trust_remote_code: bool = False,
    **hub_options: Any,
) -> nn.Module:
    """Load what fine-tuning left: a whole model, or an adapter onto its base encoder.

    Args:
        source: Folder or Hub id of a fine-tuned model or adapter.
        base: Folder or Hub id of an adapter's base encoder; ``None``: the one that it was trained on.
        merge: Add an adapter into the encoder's weights and return the plain model.
        subfolder: Folder of ``source`` in its repository.
        trust_remote_code: Whether code stored beside the encoder may run.
        **hub_options: ``revision`` (of ``source``), ``cache_dir``, ``token``.

    Returns:
        In evaluation mode; classifiers and other models of transformers with class names in ``config.id2label``.

    Raises:
        ValueError: nothing of the kind there, an encoder without a trained head, the base of an adapter is not found,
            or ``base`` is another encoder.
        PeftMissingError: an adapter, and PEFT is not installed.
    """
    source = str(source)
    place = {**hub_options, **({"subfolder": subfolder} if subfolder else {})}
    with explain_load_errors(source, "fine-tuned model", **hub_options):
        adapter = is_adapter(source, subfolder=subfolder, **hub_options)
    if not adapter:
        if base is not None:
            raise ValueError(f"{source} is a whole model, not an adapter: leave base out.")
        path = find_beside(source, FINETUNED_FILE, subfolder=subfolder, **hub_options)
        task = make_task("classification", {}) if path is None else Description.load(path).make_task()
        model = task.load_trained(source, trust_remote_code=trust_remote_code, **place).eval()
        _check_finite(model, source)
        return model
    check_peft()
    description = read_description(source, subfolder=subfolder, **hub_options)
    network: Any = _load_base(source, description, base, trust_remote_code, hub_options)
    from peft import PeftModel

    with explain_load_errors(source, "adapter", config_name="adapter_config.json", **place), _silence_deprecation():
        adapted: Any = PeftModel.from_pretrained(network, source, **place)
    _check_finite(adapted, source)
    return (adapted.merge_and_unload() if merge else adapted).eval()


def is_adapter(source: str, *, subfolder: str = "", **hub_options: Any) -> bool:
    """Return whether a folder or repository holds an adapter."""
    return find_adapter_config_file(source, subfolder=subfolder, **hub_options) is not None


def read_description(source: str, *, subfolder: str = "", **hub_options: Any) -> Description:
    """Read the description beside an adapter or a fine-tuned model.

    Raises:
        LoadError: there is none.
    """
    path = find_beside(source, FINETUNED_FILE, subfolder=subfolder, **hub_options)
    if path is None:
        raise LoadError(
            f"{source} holds no {FINETUNED_FILE}, which says what the adapter belongs to: it was not made by "
            "hf_equissl's fine-tuning. Load it with peft.PeftModel.from_pretrained(base, adapter)."
        )
    return Description.load(path)


def find_beside(source: str, name: str, **place: Any) -> str | None:
    """Find a file beside the weights of a folder or repository; ``None`` where there is none or it is out of reach."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **place,
    )


def way_to_base(source: str, description: Description) -> str:
    """Return where the base of an adapter lies: on the machine of its training, the folder from then."""
    hidden = Path(source, BASE_FILE)
    way = hidden.read_text(encoding="utf-8").strip() if hidden.is_file() else description.base
    return way if public_source(way) == description.base else description.base


def _check_finite(model: nn.Module, source: str) -> None:
    """Refuse weights with values that nothing can be computed with.

    Raises:
        LoadError: It names the first of them.
    """
    bad = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise LoadError(
            f"{source} has values that are not finite (NaN or infinity) in {bad[0]}{more}: its training had diverged. "
            "Load an earlier one, or train again with a lower learning rate."
        )


def _load_base(
    source: str,
    description: Description,
    base: str | Path | None,
    trust_remote_code: bool,
    hub_options: dict[str, Any],
) -> nn.Module:
    """Load what an adapter was trained on, and check that it is that."""
    place: dict[str, Any] = {}
    if base is None:
        place = {"revision": description.revision, "subfolder": description.subfolder}
    options = {name: value for name, value in hub_options.items() if name != "revision"}
    options |= {name: value for name, value in place.items() if value}
    name = str(base if base is not None else way_to_base(source, description))
    try:
        config = read_config(name, what="base encoder", trust_remote_code=trust_remote_code, **options)
    except LoadError as error:
        raise LoadError(
            f"The base of the adapter {source} cannot be loaded. {error} Say where it is: "
            "load_finetuned(adapter, base=<folder or Hub id>)."
        ) from error
    wanted = description.architecture
    if (found := architecture_of(config)) != wanted:
        pairs = ((key, value, wanted.get(key)) for key, value in found.items())
        different = [f"{key} {ours} instead of {theirs}" for key, ours, theirs in pairs if ours != theirs]
        raise ValueError(
            f"The adapter {source} was trained on {description.base}; {name} is another encoder: "
            f"{', '.join(different)}. Give the base that it was trained on."
        )
    pooling = description.pooling if hasattr(config, "pooling") else None
    task = description.make_task()
    model = task.load_model(name, description.classes, pooling=pooling, trust_remote_code=trust_remote_code, **options)
    if (digest := encoder_digest(task.encoder(model))) != description.digest:
        raise ValueError(
            f"The adapter {source} was trained on {description.base} (weights {description.digest[:12]}); {name} has "
            f"the same shapes and other weights ({digest[:12]}). On those it means nothing: give the base that it was "
            "trained on."
        )
    return model
