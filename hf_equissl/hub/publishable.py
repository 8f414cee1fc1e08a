"""Check a folder, tensor by tensor, before anything of it is sent to the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor

from ..utils.redaction import TOKEN

CARD = "README.md"
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
_PROCESSOR_SAYS = ("image_processor_type", "size", "image_mean", "image_std")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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


class PublishError(ValueError):
    """Something must not, or cannot, be published; the message says what and what to do."""


def repository_files(directory: str | Path) -> dict[str, Path]:
    """List what is uploaded: path in the repository -> file, without hidden files and folders, in order."""
    root = Path(directory)
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.split("/"))}


def check_publishable(directory: str | Path) -> None:
    """Refuse a folder that should not be on the Hub. Every tensor is read, one at a time.

    Refused: no weights, weights that do not open or are not finite, a config that is not readable, an encoder without a
    working image processor, a missing card or one with placeholders or broken metadata, pickles, optimizer states,
    access tokens.

    Args:
        directory: A built repository: ``hf_equissl.hub.build_repository``, ``save_encoder``, ``save_pretrained``, or
            an adapter. The root and each folder below it may hold a model.

    Raises:
        PublishError: It names the file, what is wrong with it and what to do.
    """
    root = Path(directory)
    if not root.is_dir():
        raise PublishError(f"{root} is not a folder. Give one with a model and its card.")
    files = repository_files(root)
    _check_names(files)
    models = sorted({path.parent for path in files.values() if path.name in (CONFIG, ADAPTER_CONFIG)} - {root})
    if any((root / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        models.insert(0, root)
    weights = {path for path in files.values() if path.suffix == ".safetensors"}
    if lonely := sorted(path for path in weights if path.parent not in models):
        raise PublishError(
            f"{lonely[0]} has no {CONFIG} beside it, so nobody could load it. Save the whole model there."
        )
    if not weights:
        raise PublishError(f"{root} holds no weights (*.safetensors). Save the model there with save_pretrained.")
    _check_card(root)
    _check_tokens(files)
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
        _read_json(folder / ADAPTER_CONFIG)
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise PublishError(f"{folder / ADAPTER_WEIGHTS} is missing. Save the adapter again.")
        return
    config = _read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise PublishError(f"{folder / CONFIG} has no model_type, so no one can load it. Save the model again.")
    if (folder / INDEX).is_file():
        shards = set(_read_json(folder / INDEX).get("weight_map", {}).values())
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
    if unsaid := [name for name in _PROCESSOR_SAYS if not _read_json(folder / PROCESSOR).get(name)]:
        raise PublishError(f"{folder / PROCESSOR} does not say {', '.join(unsaid)}. {how}")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
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
                if tensor.is_floating_point() and not _finite(tensor):
                    bad.append(name)
    except SafetensorError as error:
        raise PublishError(f"{path} is cut short or damaged ({error}). Save or copy it again.") from error
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise PublishError(
            f"{path} has values that are not finite (NaN or infinity) in {', '.join(bad[:_SHOWN])}{more}. "
            "Publish an earlier checkpoint."
        )


def _finite(tensor: torch.Tensor) -> bool:
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


def _check_tokens(files: dict[str, Path]) -> None:
    """Refuse text that holds an access token; the token itself is not repeated."""
    own = get_token()
    for name, path in files.items():
        if path.suffix in (".safetensors", ".png", ".jpg"):
            continue
        with path.open(encoding="utf-8", errors="ignore") as lines:
            found = any(TOKEN.search(line) or (own and own in line) for line in lines)
        if found:
            raise PublishError(
                f"{name} holds what looks like a Hub token. Delete it from the file; if it was ever shared, revoke it: "
                "https://huggingface.co/settings/tokens."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} cannot be read as JSON ({error}). Save the model again.") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} is not a JSON object. Save the model again.")
    return content
