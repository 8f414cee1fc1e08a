"""What of a folder is published: the files that its models, its card and its results name, and no others."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import get_token
from pyarrow import ArrowException
from safetensors import SafetensorError, safe_open

from ..utils.redaction import find_secret, find_secret_in, read_json_lines

logger = logging.getLogger(__name__)
CARD, RESULTS = "README.md", "results.json"
# Where the Hub looks for results on its benchmarks, and how ours are called: others may have added theirs.
EVAL_RESULTS, OWN_EVAL_RESULTS = ".eval_results", "equissl"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROCESSOR = "preprocessor_config.json"
_OF_ROOT = (CARD, RESULTS, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_OF_MODEL = (CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROCESSOR, "finetuning.json", "recipe.yaml", "README.md")
_PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}
_IMPORTS = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|\bsrc=[\"']([^\"']+)")
# Files that hold secrets by their nature.
_KEYS = re.compile(r"id_(?:rsa|dsa|ecdsa|ed25519)|.*\.(?:pem|key|p12|pfx|keystore)|credentials|netrc|htpasswd")
# How many bytes of a file, packed and unpacked, are looked through; texts of our own are far smaller.
_LOOKED_AT = 16 * 2**20


class PublishError(ValueError):
    """Something must not, or cannot, be published; the message says what and what to do."""


def list_files(directory: str | Path) -> dict[str, Path]:
    """List the files of a folder: path in the repository -> file, in order; of hidden ones only results on benchmarks.

    Raises:
        PublishError: A link leads out of the folder.
    """
    root = Path(directory)
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if any(part.startswith(".") for part in name.split("/")) and not _is_eval_result(name):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise PublishError(
                f"{name} is a link that leads out of {root}: what lies behind it would become public. Delete the link, "
                "or put a copy of the file in its place."
            )
        if path.is_file():
            files[name] = path
    return files


def _is_eval_result(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == EVAL_RESULTS and file.endswith(".yaml") and not file.startswith(".")


def list_published(directory: str | Path) -> dict[str, Path]:
    """List what is uploaded: path in the repository -> file, in order.

    That is the card with its pictures (those that it shows, and figures), results, also those on benchmarks, and
    licence; and of each model, at the root or in a folder, what its config names: weights, code, image processor,
    description, recipe. Other files stay.

    Raises:
        PublishError: As ``list_files``; or a config is not readable.
    """
    files = list_files(directory)
    named = set(_OF_ROOT)
    if CARD in files:
        named |= set(_pictures(files[CARD].read_text(encoding="utf-8", errors="replace")))
    named |= set(filter(_is_eval_result, files))
    named |= {name for name in files if name.startswith("figures/") and PurePosixPath(name).suffix in _PICTURES}
    for folder in model_folders(files):
        named |= {f"{folder}/{name}".lstrip("/") for name in _list_model_files(files, folder)}
    return {name: path for name, path in files.items() if name in named}


def list_left_behind(directory: str | Path) -> list[str]:
    """List the files of a folder, hidden ones aside, that a publication leaves there."""
    return sorted(list_files(directory).keys() - list_published(directory).keys())


def model_folders(files: Mapping[str, Path]) -> list[str]:
    """Name the folders of a repository that hold a model, the root as "": a config, and what shows that it is one."""
    found = []
    for folder in sorted({name.rpartition("/")[0] for name in files}):
        here = {name.rpartition("/")[2]: path for name, path in files.items() if name.rpartition("/")[0] == folder}
        has_weights = any(name.endswith(".safetensors") for name in here)
        if ADAPTER_CONFIG in here or (CONFIG in here and (not folder or has_weights or _has_type(here[CONFIG]))):
            found.append(folder)
    return found


def _has_type(config: Path) -> bool:
    with suppress(PublishError):
        return "model_type" in read_json(config)
    return False


def _list_model_files(files: Mapping[str, Path], folder: str) -> Iterator[str]:
    """Name the files of one model: those that all models have, its weights, its code."""
    here = {name.rpartition("/")[2]: path for name, path in files.items() if name.rpartition("/")[0] == folder}
    yield from _OF_MODEL
    yield WEIGHTS
    if INDEX in here:
        yield INDEX
        shards = read_json(here[INDEX]).get("weight_map", {})
        yield from map(str, shards.values() if isinstance(shards, dict) else ())
    entries = read_json(here[CONFIG]).get("auto_map") if CONFIG in here else None
    modules = [str(name).partition(".")[0] for name in entries.values()] if isinstance(entries, dict) else []
    while modules:
        module = f"{modules.pop()}.py"
        if path := here.pop(module, None):
            yield module
            modules += _IMPORTS.findall(path.read_text(encoding="utf-8", errors="replace"))


def _pictures(card: str) -> Iterator[str]:
    for link in _LINK.finditer(card):
        path = PurePosixPath(link[1] or link[2])
        if path.suffix.lower() in _PICTURES:
            yield str(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PublishError: It is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} cannot be read as JSON ({error}). Save the model again.") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} is not a JSON object. Save the model again.")
    return content


def check_secrets(files: Mapping[str, Path | bytes]) -> None:
    """Refuse files that hold a secret, also in compressed files and in the texts of tables and weights.

    Args:
        files: Name in the repository -> file, or its content.

    Raises:
        PublishError: It names the file and the kind of secret; the secret itself is not repeated.
    """
    own = get_token()
    for name, file in files.items():
        if _KEYS.fullmatch(name.rpartition("/")[2].lower()):
            raise PublishError(f"{name} is called as files with keys or passwords are. Move it out of the folder.")
        for text in _texts(name, file):
            kind = "a Hub token" if own and own in text else find_secret(text)
            if kind is None and (values := read_json_lines(text)) is not None:
                kind = "a Hub token" if own and own in str(values) else find_secret_in(values)
            if kind is not None:
                raise PublishError(
                    f"{name} holds what looks like {kind}. Delete it from the file; if it was ever shared, revoke it"
                    + (": https://huggingface.co/settings/tokens." if "Hub" in kind else ".")
                )


def _texts(name: str, file: Path | bytes) -> Iterator[str]:
    """Read the texts of a file, whatever its kind; none of pictures."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _PICTURES - {".svg"}:
        return
    if suffix == ".safetensors" and isinstance(file, Path):
        with suppress(SafetensorError), safe_open(file, framework="numpy") as weights:  # what is damaged is found later
            yield json.dumps(weights.metadata() or {})
    elif suffix == ".parquet" and isinstance(file, Path):
        with suppress(ArrowException):
            yield from _texts_of_table(file)
    else:
        with file.open("rb") if isinstance(file, Path) else BytesIO(file) as content:
            data = content.read(_LOOKED_AT)
        data = _unpack(data)
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        if wide or b"\0" not in data[:1024]:
            yield data.decode("utf-16" if wide else "utf-8", errors="ignore")


def _texts_of_table(file: Path) -> Iterator[str]:
    """Read what a table says of itself, and those of its texts that are addresses."""
    table = pq.ParquetFile(file)
    yield "\n".join(value.decode(errors="ignore") for value in (table.schema_arrow.metadata or {}).values())
    texts = [field.name for field in table.schema_arrow if field.type in ("string", "large_string")]
    for batch in table.iter_batches(columns=texts) if texts else ():
        for column in batch.columns:
            yield "\n".join(column.filter(pc.match_substring(column, "://")).to_pylist())


def _unpack(data: bytes) -> bytes:
    with suppress(zlib.error):  # what does not unpack is looked through as it is
        while data.startswith(b"\x1f\x8b"):  # gzip, perhaps in itself
            data = zlib.decompressobj(wbits=31).decompress(data, _LOOKED_AT)
    return data
