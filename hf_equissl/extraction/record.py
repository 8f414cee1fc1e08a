"""Read and write ``extraction.json``, which says what a folder of features holds, and refuse to mix it with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.files import write_text
from ..utils.redaction import redact, redact_values
from ..utils.versions import library_versions
from .settings import FORMATS, ExtractionError, ExtractionSettings
from .shards import INDEX, LABEL, read_record

if TYPE_CHECKING:
    from .work import Extraction

RECORD, FORMAT_VERSION = "extraction.json", 1
# The card beside it, and how its text begins.
CARD, TITLE = "README.md", "# Features of"
# How many bad images an error message lists at most.
_LISTED = 10


def read_extraction(folder: Path) -> dict[str, Any]:
    """Read ``extraction.json`` without splits that have no shard yet; empty where there is none.

    Raises:
        ExtractionError: The file was not written by this command.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise KeyError("format_version")
        begun = {
            name: split
            for name, split in record["splits"].items()
            if any(any((folder / "data").glob(f"{name}-*-of-*{suffix}")) for suffix in FORMATS.values())
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExtractionError(
            f"{path} is not a record of this command ({error!r}). Name a new --output_dir."
        ) from error
    return {**record, "splits": begun} if begun else {}


def classes_before(settings: ExtractionSettings) -> tuple[list[str], str]:
    """Return the classes' names in another split in the output folder, and which split that is; empty without any.

    Raises:
        ExtractionError: as ``read_extraction``.
    """
    splits = read_extraction(Path(settings.output_dir)).get("splits", {})
    named = {name: split["classes"] for name, split in splits.items() if split.get("classes")}
    named.pop(settings.split_name, None)
    return next(((classes, f"split {name} in {settings.output_dir}") for name, classes in named.items()), ([], ""))


def check_own(work: Extraction) -> None:
    """Make sure that nothing is overwritten that this command has not written.

    Raises:
        ExtractionError: A link, or somebody else's card, lies where the command writes.
    """
    folder = Path(work.settings.output_dir)
    for path in (folder / CARD, folder / RECORD, work.folder, *map(work.path, work.shards)):
        if path.is_symlink():
            raise ExtractionError(f"{path} is a link, and would be replaced or followed. Delete it first.")
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if card.exists() and not (f"\n{TITLE} " in text and "- image-features" in text):
        raise ExtractionError(
            f"{card} was not written by this command, and would be overwritten. Name a new --output_dir, or move it."
        )


def keep_precision(settings: ExtractionSettings) -> ExtractionSettings:
    """Give the precision "auto" the value in which the features of the output folder were computed, if there are any.

    Raises:
        ExtractionError: as ``read_extraction``.
    """
    before = read_extraction(Path(settings.output_dir)) if settings.precision == "auto" else {}
    return replace(settings, precision=before["encoding"]["precision"]) if before else settings


def check_same(work: Extraction) -> None:
    """Refuse a folder that holds features of another encoder, other data or other options.

    Raises:
        ExtractionError: It names the first difference.
    """
    folder = Path(work.settings.output_dir)
    record = read_extraction(folder)
    if not record:
        return
    selection = record["splits"].get(work.settings.split_name, {}).get("selection", {})
    usual = {"value_range": "full"}  # the usual value is not written down
    flat_before = _flatten({**usual, **record["encoding"], **selection})
    flat_now = _flatten({**usual, **work.encoding, **{key: work.selection.get(key) for key in selection}})
    for key in flat_before | flat_now:
        if flat_before.get(key) != flat_now.get(key):
            raise ExtractionError(
                f"{folder} holds features with {key} = {flat_before.get(key)!r}, and this command says "
                f"{flat_now.get(key)!r}. Name a new --output_dir, or give the same encoder, data and options."
            )


def begin(work: Extraction, command: str) -> None:
    """Write down what is about to be done, before the first shard."""
    _write(work, {**_split(work, command), "complete": False, "runs": _runs(work)})


def finish(work: Extraction, command: str, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """Look at all shards and write down what they hold.

    Args:
        work: The extraction.
        command: The command as it was typed.
        run: Speed and settings of this command's share; ``None`` where nothing was left to do.

    Returns:
        The content of ``extraction.json``.

    Raises:
        ExtractionError: Shards are missing, or too many images do not decode.
    """
    if missing := work.list_remaining():
        raise ExtractionError(
            f"{len(missing)} of {len(work.shards)} shards are missing, the first: {work.path(missing[0]).name}. Start "
            "the same command again."
        )
    records = [read_record(work.path(shard)) for shard in work.shards]
    # In a stream, rows are numbered within their shard.
    where = [{"shard": record["shard"]} if work.images is None else {} for record in records]
    skipped = [
        {**place, "index": index, "name": name, "reason": reason}
        for place, record in zip(where, records, strict=True)
        for index, name, reason in record["skipped"]
    ]
    rows = sum(record["rows"] for record in records)
    check_bad_share(work, len(skipped), rows + len(skipped), [f"{item['name']}: {item['reason']}" for item in skipped])
    split = {
        **_split(work, command),
        "complete": True,
        "rows": rows,
        "bytes": sum(work.path(shard).stat().st_size for shard in work.shards),
        "skipped": skipped,
        "runs": [*_runs(work), *([dict(run)] if run else [])],
    }
    if work.settings.file_format == "safetensors":
        _write_index(work, records)
    return _write(work, split)


def check_bad_share(work: Extraction, bad: int, seen: int, named: list[str]) -> None:
    """Refuse an extraction in which too many images do not decode.

    Raises:
        ExtractionError: It names the first of them.
    """
    allowed = work.settings.max_bad_share
    if bad <= allowed * (work.images or seen):
        return
    listed = "".join(f"\n  {line}" for line in named[:_LISTED])
    raise ExtractionError(
        f"{bad} of {work.images or seen} images of {work.source.name} do not decode; {allowed:.1%} are allowed. The "
        f"first:{listed}\nRepair or remove these files, or raise --max_bad_share and give the command again: what is "
        "done is kept."
    )


def _split(work: Extraction, command: str) -> dict[str, Any]:
    settings = work.settings
    options = {key: value for key, value in settings.source_options.items() if value not in (None, False)}
    return {
        "data": redact(settings.data),
        "options": redact_values(options),
        "columns": {"image": work.source.image_column, "label": work.source.label_column},
        "classes": work.classes,
        "selection": work.selection,
        "digest": work.digest,
        "command": command,
        "versions": library_versions(("pyarrow", "safetensors")),
    }


def _runs(work: Extraction) -> list[dict[str, Any]]:
    """Read speed and settings of earlier commands for this split."""
    splits = read_extraction(Path(work.settings.output_dir)).get("splits", {})
    return list(splits.get(work.settings.split_name, {}).get("runs", []))


def _write(work: Extraction, split: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(work.settings.output_dir)
    splits = read_extraction(folder).get("splits", {})
    record = {
        "format_version": FORMAT_VERSION,
        "encoder": redact(work.settings.encoder),
        "encoder_options": {key: value for key, value in work.settings.load_options.items() if value},
        "encoder_commit": getattr(getattr(work.encoder.module, "config", None), "_commit_hash", None),
        "encoding": work.encoding,
        "splits": {**splits, work.settings.split_name: dict(split)},
    }
    write_text(folder / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record


def _write_index(work: Extraction, records: list[dict[str, Any]]) -> None:
    """Write which file of tensors holds which rows."""
    labels = [LABEL] if LABEL in work.columns else []
    index = {
        "metadata": {"split": work.settings.split_name, "rows": sum(record["rows"] for record in records)},
        "classes": work.classes,
        "tensors": {**{name: [] for name in (INDEX, *labels)}, **work.encoding["features"]},
        "dtype": work.settings.dtype,
        "shards": [
            {"file": work.path(shard).name, **asdict(shard), "rows": record["rows"]}
            for shard, record in zip(work.shards, records, strict=True)
        ],
    }
    write_text(work.folder / f"{work.settings.split_name}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}".lstrip(".")).items()}
