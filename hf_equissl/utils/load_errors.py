"""Errors of loading from a folder or from the Hub, in plain words.

huggingface_hub, transformers, safetensors and torch each raise errors of their own, wrap each other's, and cannot know
what was meant: ``explain_load_errors`` looks at the whole chain and at the files, and raises one ``LoadError``.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .hostile import check_config_sizes
from .hub_waits import limit_waiting
from .suggestions import find_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CONFIG, _ADAPTER, _INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
# What transformers says of a config that none of its classes, or of those registered with it, is made for.
_UNKNOWN_KIND = (
    "does not recognize this architecture",
    "Unrecognized configuration class",
    "Should have a `model_type` key",
)
# What may have been meant, best first: a run's export, a published repository's parts, what training left.
_FOLDERS = ("encoder", "native", "pretraining", "checkpoint-*")


class LoadError(ValueError):
    """Something cannot be loaded from a folder or from the Hub; the message says why and what to do."""


def read_config(
    source: str | Path, *, what: str = "model", trust_remote_code: bool = False, **hub_options: Any
) -> PreTrainedConfig:
    """Read the config beside some weights with ``AutoConfig``, weights untouched.

    Args:
        source: Folder with ``config.json``, or Hub id.
        what: What should be there, for the message.
        trust_remote_code: Whether code stored beside the config may run.
        **hub_options: ``revision``, ``subfolder``, ``cache_dir``, ``token``, ... as in ``AutoConfig.from_pretrained``.

    Raises:
        LoadError: There is no config, or it is damaged or of a kind that no class here is made for.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if hub_options.get("revision") and Path(source).is_dir():
        raise LoadError(
            f"{str(source)!r} is a folder, which has no revision (--revision {hub_options['revision']}): leave it out, "
            "or give the Hub id."
        )
    with explain_load_errors(source, what, **hub_options):
        raw, _ = PreTrainedConfig.get_config_dict(str(source), **hub_options)
    try:
        check_config_sizes(raw, source)
    except ValueError as error:
        raise LoadError(str(error)) from error
    with explain_load_errors(source, what, **hub_options):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub_options)


def check_place(source: str | Path, what: str = "encoder") -> None:
    """Refuse a path at which nothing lies, without importing what would load it. A name of the Hub passes.

    Raises:
        LoadError: It says what ``explain_load_errors`` would say.
    """
    place = _Place(str(source), what, _CONFIG)
    if problem := _say_absent(place):
        raise LoadError(f"No {what} at {place}: {problem}")


@contextmanager
def explain_load_errors(
    source: str | Path, what: str = "encoder", *, config_name: str = "config.json", **hub_options: Any
) -> Iterator[None]:
    """Turn errors of the loading libraries inside the block into one ``LoadError``.

    Other failures (memory that runs out, a bug, an interruption) pass as they are.

    Args:
        source: Folder or Hub id that is being loaded.
        what: What should be there, for the message.
        config_name: The file that every such thing has, e.g. "adapter_config.json" of a PEFT adapter.
        **hub_options: The options of the call inside the block; ``revision``, ``subfolder``, ``cache_dir``, ``token``
            are read to say more, the rest is ignored.

    Raises:
        LoadError: It says in one paragraph what is wrong; the original error is its cause.
    """
    limit_waiting()
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        names = ("revision", "subfolder", "cache_dir", "token")  # token=False says something, None and "" do not
        known = {name: hub_options[name] for name in names if hub_options.get(name) not in (None, "")}
        message = _explain(error, _Place(str(source), what, config_name, **known))
        if message is None:
            raise
        raise LoadError(message) from error


@dataclass(frozen=True)
class _Place:
    """The folder or repository that something is loaded from."""

    source: str
    what: str
    config_name: str
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | Path | None = None
    token: str | bool | None = None

    def __str__(self) -> str:
        parts = [f"{name} {value!r}" for name in ("revision", "subfolder") if (value := getattr(self, name))]
        return repr(self.source) + (f" ({', '.join(parts)})" if parts else "")

    @property
    def is_local(self) -> bool:
        return Path(self.source).exists()

    @property
    def folder(self) -> Path | None:
        """The folder on this machine: the local one, or that of the cached revision if its config is there."""
        if self.is_local:
            return Path(self.source, self.subfolder)
        found = self.cached_config()
        return Path(found).parent if isinstance(found, str) else None

    def cached_config(self) -> Any:
        """Find the config in the cache: its path, a marker if the repository has none, ``None`` if nothing is known."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        name = str(PurePosixPath(self.subfolder, self.config_name))
        try:
            return try_to_load_from_cache(self.source, name, cache_dir=self.cache_dir, revision=self.revision)
        except HFValidationError:
            return None


def _explain(error: Exception, place: _Place) -> str | None:
    """Say what an error means; ``None`` where it speaks for itself."""
    from huggingface_hub.errors import StrictDataclassError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if (denied := _find_denied(chain, place)) is not None:
        return (
            f"No {place.what} can be loaded from {place}: this account has no right to read {denied}. Ask its owner "
            "for it: chmod -R a+rX on the folder, and a+x on those above."
        )
    if problem := _source_problem(chain, place) or (None if place.is_local else _hub_problem(chain, place)):
        return f"No {place.what} at {place}: {problem}"
    if problem := _config_problem(chain, place):
        return f"No {place.what} can be loaded from {place}: {problem}"
    if problem := _weights_problem(chain, place):
        return f"The weights at {place} cannot be read: {problem}"
    # A config that its own class refuses, and whatever else was said well. An error of the disk is not of loading.
    if isinstance(error, (OSError, ValueError, StrictDataclassError)) and getattr(error, "errno", None) is None:
        return f"No {place.what} can be loaded from {place}: {_first_line(error)}"
    return None


def _find_denied(chain: list[BaseException], place: _Place) -> str | None:
    """Name the file or folder that may not be read; ``None`` where that is not what went wrong."""
    for link in chain:
        if isinstance(link, PermissionError) or (isinstance(link, Exception) and "Permission denied" in str(link)):
            name = getattr(link, "filename", None)
            return str(name if isinstance(name, str) else place.source)
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__


def _source_problem(chain: list[BaseException], place: _Place) -> str | None:
    """Find a folder that does not exist, or that holds something else."""
    from huggingface_hub.errors import HFValidationError

    path, wanted = Path(place.source), place.config_name
    invalid = any(isinstance(link, (HFValidationError, json.JSONDecodeError, UnicodeDecodeError)) for link in chain)
    if not place.source.strip() or not path.exists():
        return _say_absent(place, invalid)
    if path.is_file():
        return f"that is a file. Give the folder that it lies in, with {wanted}." if invalid else None
    folder = path / place.subfolder
    if (folder / wanted).is_file():
        return None
    if not folder.is_dir():
        return f"no such subfolder. With a model in them: {_join_names(_model_folders(path), path)}."
    if (folder / _ADAPTER).is_file():
        return (
            "the folder holds a PEFT adapter, not a model. Load the model that it was made for, then "
            "peft.PeftModel.from_pretrained(model, folder)."
        )
    if inside := _model_folders(folder):
        return f"the folder has no {wanted}. Did you mean {_join_names(inside)}?"
    held = _join_names(sorted(folder.iterdir()), folder)
    return f"the folder has no {wanted} (what it has: {held}). {_say_expected(place)}"


def _say_absent(place: _Place, is_no_id: bool = False) -> str | None:
    """Say that a folder does not exist; ``None`` where it does, or where the name may be one of the Hub."""
    path = Path(place.source)
    is_path = place.source.startswith((".", "~", os.sep)) or place.source.count("/") > 1
    if not (is_path or is_no_id) or (place.source.strip() and path.exists()):
        return None
    return f"there is no such folder.{_nearest_sibling(path)} {_say_expected(place)}"


def _say_expected(place: _Place) -> str:
    return f"Expected a folder with {place.config_name} and the weights, or a Hub id such as 'name/model'."


def _nearest_sibling(path: Path) -> str:
    """Hint at the folder whose name is closest to the first part of a path that does not exist."""
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    folders = [found.name for found in missing.parent.iterdir() if found.is_dir()] if missing.parent.is_dir() else []
    near = find_nearest(missing.name, folders)
    return f" Did you mean {str(missing.with_name(near) / path.relative_to(missing))!r}?" if near else ""


def _model_folders(folder: Path) -> list[Path]:
    """List the folders below ``folder`` that hold a model, the likeliest first."""
    found = [path for pattern in _FOLDERS for path in sorted(folder.glob(pattern))]
    return [path for path in dict.fromkeys([*found, *sorted(folder.glob("*/"))]) if (path / _CONFIG).is_file()]


def _join_names(paths: list[Path], base: Path | None = None) -> str:
    names = [repr(str(path.relative_to(base) if base else path)) for path in paths]
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "nothing"


def _hub_problem(chain: list[BaseException], place: _Place) -> str | None:
    """Find out why a repository cannot be read: absent, out of bounds or out of reach, or without revision or files."""
    from huggingface_hub import constants, errors, get_token

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{place.source}"
    has_token = place.token is not False and (isinstance(place.token, str) or get_token() is not None)
    statuses = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if raised(errors.GatedRepoError):
        ask = "your token's account was not granted access" if has_token else "no token is set"
        return f"the repository is gated and {ask}. Ask for access on {page}, then {log_in}."
    if raised(errors.RevisionNotFoundError):
        return (
            f"the repository has no revision {place.revision!r}. Give a branch, a tag or a full commit hash of "
            f"{page}/commits/main, or leave the revision out."
        )
    if raised(errors.RepositoryNotFoundError) or (404 in statuses and not raised(errors.RemoteEntryNotFoundError)):
        rights = "your token may not read it" if has_token else "no token is set"
        folder = "" if "/" in place.source else f" There is no folder {place.source!r} here either."
        return (
            f"{hub} has no such repository, or it is private and {rights}. Check the spelling ('name/model'); for a "
            f"private one {log_in}.{folder}"
        )
    if refused := [status for status in (401, 403) if status in statuses]:
        token = "the token was refused" if 401 in refused else "the token does not allow it"
        return f"{hub} answers {refused[0]}: {token}. For another token {log_in}."
    if raised(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reach = f"{hub} cannot be reached ({_first_line(chain[-1])})"
        reach = "HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else reach
        return (
            f"it is not in the cache ({place.cache_dir or constants.HF_HUB_CACHE}), nor a folder here, and {reach}. "
            "Load it once with network access, with the same revision and subfolder, or give a folder."
        )
    for link in chain:  # whichever HTTP library huggingface_hub is built on (httpx, httpx2)
        if any(kind.__name__ == "TransportError" for kind in type(link).__mro__):
            return f"the connection to {hub} broke off ({_first_line(link)}). Load again: what is complete is kept."
    if place.folder is None and place.cached_config() is not None:
        where = PurePosixPath(place.subfolder, _CONFIG)
        return f"the repository has no {where}. {page}/tree/{place.revision or 'main'} shows its subfolders: give one."
    return None


def _config_problem(chain: list[BaseException], place: _Place) -> str | None:
    """Find a config that is damaged or that no class here is made for."""
    folder, name, text = place.folder, place.config_name, "\n".join(str(link) for link in chain)
    if folder is None or not (folder / name).is_file():
        return None
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{name} is not JSON ({_first_line(error)}): it is cut short or damaged.{_again(place)}"
    kind = config.get("model_type") if isinstance(config, dict) else None
    if "contains custom code which must be executed" in text:
        native = " Its subfolder 'native' needs none of that." if (folder / "native" / _CONFIG).is_file() else ""
        return (
            f"its model_type {kind!r} comes with code of its own. Read that code, then pass trust_remote_code=True "
            f"(--trust_remote_code).{native}"
        )
    if not any(phrase in text for phrase in _UNKNOWN_KIND):
        return None
    if kind is None:
        return f"its {name} has no model_type, so it is not a model that transformers can build."
    if kind == "equissl_pretraining":
        return (
            "this is a whole pretraining state. Give the run's folder 'encoder' (of a repository: its root), or load "
            "the state with EquiSSLForPreTraining.from_pretrained."
        )
    return (
        f"its {name} has model_type {kind!r}, a type that transformers cannot build as this here. Give another model, "
        "or upgrade what this one needs: pip install -U transformers hf-equissl."
    )


def _weights_problem(chain: list[BaseException], place: _Place) -> str | None:
    """Find weights that are missing, damaged, or of another network than the config says."""
    from safetensors import SafetensorError

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    text = "\n".join(str(link) for link in chain)
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return (
            f"their shapes are not those of the model that {place.config_name} describes, so the two do not belong "
            "together. Copy or export both again."
        )
    damaged = raised(SafetensorError, pickle.UnpicklingError, EOFError)
    damaged = damaged or "PytorchStreamReader" in text or "Invalid magic number" in text
    absent = raised(FileNotFoundError, json.JSONDecodeError)
    absent = absent or "Error no file named" in text or "does not appear to have" in text
    found = _damaged_file(place.folder, place.config_name) if place.folder and (damaged or absent) else None
    if found is None and raised(pickle.UnpicklingError):
        found = "the file is damaged, or a pickle of more than tensors, which is never opened. Ask for safetensors."
    elif found is None and damaged:
        found = f"the file is damaged or of another kind ({_first_line(chain[0])})."
    return found and f"{found}{_again(place)}"


def _damaged_file(folder: Path, config_name: str) -> str | None:
    """Find the first weight file of a folder (or that file) that is missing or does not open, and say why."""
    if folder.is_file():
        return _damage(folder)
    present = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX).is_file():
        try:
            listed = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{_INDEX} is damaged ({_first_line(error)})."
        if missing := sorted(listed - {path.name for path in present}):
            return f"{_INDEX} lists {len(listed)} files, of which {missing[0]} is missing."
    elif not present and not list(folder.glob("*.bin")):
        return f"{config_name.replace('config.json', 'model.safetensors')} is missing beside {config_name}."
    return next((damage for path in present if (damage := _damage(path))), None)


def _damage(path: Path) -> str | None:
    """Say what is wrong with one file of weights; ``None`` if it opens or if only torch can tell."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        return f"{path.name} is empty."
    if start == _LFS_POINTER:
        return f"{path.name} is a Git LFS pointer, a text that stands for the weights. Run `git lfs pull` there."
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="numpy"):
            return None
    except SafetensorError as error:
        return f"{path.name} ({path.stat().st_size} bytes) is cut short or damaged ({_first_line(error)})."


def _again(place: _Place) -> str:
    """Say how to come by a whole file."""
    from huggingface_hub import constants

    if place.is_local:
        return " Copy or download it again, or export it again."
    if constants.HF_HUB_OFFLINE:
        return " HF_HUB_OFFLINE=1 is set: load it once with network access, which completes the cache."
    return " Download it again with force_download=True; if that does not help, what was published is damaged."
