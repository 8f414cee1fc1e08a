"""Check a folder, tensor by tensor, before anything of it is sent to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor

from .contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    CONFIG,
    INDEX,
    PROCESSOR,
    WEIGHTS,
    PublishError,
    check_secrets,
    list_files,
    model_folders,
    read_json,
)
from .terms import UNKNOWN

_PROCESSOR_SAYS = ("image_processor_type", "size", "image_mean", "image_std")
_PRETRAINING = "equissl_pretraining"
# Pickles run code when they are opened, and hold optimizer states that nobody loads.
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
_STATES = re.compile(r"(optimizer|scheduler|scaler|rng_state)([._-].*)?")
_PLACEHOLDERS = {
    "a template's field": r"\{\{\s*[\w.]+\s*(?:\|[^}]*)?\}\}|\{%.*?%\}",
    "'More Information Needed'": r"\[?More Information Needed\]?",
    "a note to do something": r"\b(?:TODO|FIXME|TBD)\b",
    "an invented name": (
        r"(?<![\w./-])org/[\w<{-]+|\byour[-_]?(?:user)?(?:name|org)\w*/[\w.<{-]+|(?<![\w./-])username/[\w<{-]+"
        r"|<(?:repo_id|org|name|model)>"
    ),
}
_BIBTEX = re.compile(r"^@\w+\{.*?^\}", re.MULTILINE | re.DOTALL)  # which writes titles in {{double braces}}
_SHOWN = 3


def check_publishable(directory: str | Path) -> None:
    """Refuse a folder that should not be on the Hub. Every tensor is read, one at a time.

    Refused: no weights, weights that do not open or are not finite, a config that is not readable, an encoder without a
    working image processor, a missing card or one with placeholders or broken metadata. And although only what
    ``list_published`` lists is uploaded: links that lead out of the folder, pickles, optimizer states, passwords, keys
    and tokens anywhere in it, since whoever publishes a folder does not know of them.

    Args:
        directory: A built repository: ``hf_equissl.hub.build_repository``, ``save_encoder``, ``save_pretrained``, or
            an adapter. The root and each folder below it may hold a model.

    Raises:
        PublishError: It names the file, what is wrong with it and what to do.
    """
    root = Path(directory)
    if not root.is_dir():
        raise PublishError(f"{root} is not a folder. Give one with a model and its card.")
    files = list_files(root)
    _check_names(files)
    models = [root / folder for folder in model_folders(files)]
    weights = {path for path in files.values() if path.suffix == ".safetensors"}
    if lonely := sorted(path for path in weights if path.parent not in models):
        raise PublishError(
            f"{lonely[0]} has no {CONFIG} beside it, so nobody could load it. Save the whole model there."
        )
    if not weights:
        raise PublishError(f"{root} holds no weights (*.safetensors). Save the model there with save_pretrained.")
    _check_card(root)
    check_secrets(files)
    for folder in models:
        _check_model(folder)
    for path in sorted(weights):
        _check_weights(path)


def _check_names(files: dict[str, Path]) -> None:
    for name, path in files.items():
        if path.suffix.lower() in _PICKLES:
            raise PublishError(
                f"{name} must not be uploaded: files of this kind can run code when they are opened, or hold training "
                "state that nobody loads. Delete it; weights are published as safetensors."
            )
        if _STATES.fullmatch(path.name) or path.name == "trainer_state.json":
            raise PublishError(f"{name} is state of a training run, not of a model. Delete it from the folder.")


def _check_model(folder: Path) -> None:
    """Check config, weight files and, of a model that sees pictures, the image processor of one folder."""
    if (folder / ADAPTER_CONFIG).is_file():
        read_json(folder / ADAPTER_CONFIG)
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise PublishError(f"{folder / ADAPTER_WEIGHTS} is missing. Save the adapter again.")
        return
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise PublishError(f"{folder / CONFIG} has no model_type, so no one can load it. Save the model again.")
    if (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        missing = sorted(name for name in shards if not (folder / name).is_file()) if shards else [WEIGHTS]
    else:
        missing = [] if (folder / WEIGHTS).is_file() else [WEIGHTS]
    if missing:
        raise PublishError(f"{folder / missing[0]} is missing: the model in {folder} has no (or not all) weights.")
    if config["model_type"] != _PRETRAINING:
        _check_processor(folder)


def _check_processor(folder: Path) -> None:
    how = "Write it with hf_equissl.encoders.save_encoder, or image_processor(...).save_pretrained(folder)."
    if not (folder / PROCESSOR).is_file():
        raise PublishError(
            f"{folder / PROCESSOR} is missing: without the image processor everyone has to guess size and "
            f"normalisation. {how}"
        )
    # For what the file does not say transformers takes the defaults of the model's type.
    if unsaid := [name for name in _PROCESSOR_SAYS if not read_json(folder / PROCESSOR).get(name)]:
        raise PublishError(f"{folder / PROCESSOR} does not say {', '.join(unsaid)}. {how}")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        numbers = [*processor.image_mean, *processor.image_std]
        broken = not all(torch.isfinite(torch.tensor(numbers))) or min(processor.image_std) <= 0
    except Exception as error:  # whatever a broken file makes transformers raise
        raise PublishError(f"{folder / PROCESSOR} does not load as an image processor ({error}). {how}") from error
    if broken:
        raise PublishError(f"{folder / PROCESSOR} has image_mean or image_std that cannot be: {numbers}. {how}")


def _check_weights(path: Path) -> None:
    bad: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not _is_finite(tensor):
                    bad.append(name)
    except SafetensorError as error:
        raise PublishError(f"{path} is cut short or damaged ({error}). Save or copy it again.") from error
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise PublishError(
            f"{path} has values that are not finite (NaN or infinity) in {', '.join(bad[:_SHOWN])}{more}. "
            "Publish an earlier checkpoint."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
    return bool(torch.isfinite(wide).all())


def _check_card(root: Path) -> None:
    """Check that there is a card, that its metadata parse and that nothing in it is left to fill in."""
    path = root / CARD
    if not path.is_file():
        raise PublishError(f"{path} is missing. hf_equissl.hub.build_repository writes the card of a run.")
    text = path.read_text(encoding="utf-8")
    for kind, pattern in _PLACEHOLDERS.items():
        searched = _BIBTEX.sub("", text) if kind == "a template's field" else text
        if found := re.search(pattern, searched, re.IGNORECASE if "'" in kind else 0):
            line = searched[: found.start()].count("\n") + 1
            raise PublishError(f"{path} has a placeholder, {kind}: {found[0]!r} (line {line}). Fill it in.")
    try:
        metadata = ModelCard(text).data.to_dict()
    except Exception as error:  # YAML errors and what huggingface_hub says of a model-index
        raise PublishError(f"The metadata at the head of {path} do not parse ({error}). Correct the YAML.") from error
    if not metadata:
        raise PublishError(f"{path} has no metadata. Begin it with a YAML block: ---, license: ..., tags: ..., ---.")


def check_licence(directory: str | Path) -> None:
    """Refuse a repository whose card does not say its licence: nobody else can, and nobody could use it.

    Raises:
        PublishError: It says how to say it.
    """
    path = Path(directory) / CARD
    if ModelCard(path.read_text(encoding="utf-8")).data.to_dict().get("license") in (None, "", UNKNOWN):
        raise PublishError(
            f"{path} does not say under which licence this is published, because base weights or data do not say it, "
            "or do not allow everything: see its section Licence. Build it with --license (license=...), or write "
            "license: ... into its head."
        )
