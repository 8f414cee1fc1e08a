"""``README.md`` beside the features: the card of a data set, from ``extraction.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from ..hub.card.licence import describe_licence
from ..hub.card.writer import write
from ..hub.licences import Licence
from ..hub.privacy import is_hub_id, public_command, public_source, public_text, public_values
from ..utils.files import readable_size, write_text
from ..utils.strict_yaml import dump_yaml
from .record import CARD

# How many images that were left out the card names at most.
_SHOWN = 10
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_MEANING = {
    "cls": "CLS token after the final norm",
    "patches": "mean of the patch tokens after the final norm",
    "backbone": "`[cls ; patches]`",
    "patch_tokens": "all patch tokens after the final norm, row by row",
    "invariant": "`[CLS ; mean patch]` of the stem's invariant part",
    "equivariant": "`[CLS ; mean patch]` of the stem's equivariant part",
    "invariant_cls": "CLS of the stem's invariant part",
    "invariant_patches": "mean patch of the stem's invariant part",
    "equivariant_cls": "CLS of the stem's equivariant part",
    "equivariant_patches": "mean patch of the stem's equivariant part",
}


def write_card(
    folder: Path, record: Mapping[str, Any], name: str | None = None, licence: Licence | None = None
) -> None:
    """Write ``README.md``: what the features are of, how they were made, how to read them. No path of this machine.

    Args:
        folder: Folder of ``extraction.json``.
        record: What that file says.
        name: Hub id under which the features will be found; default: the folder's name.
        licence: That of the features, once they are published.
    """
    splits = {name: split for name, split in record["splits"].items() if split["complete"]}
    data = sorted({split["data"] for split in splits.values()})
    parquet = record["encoding"]["format"] == "parquet"
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    rows = sum(split["rows"] for split in splits.values())
    terms: dict[str, Any] = {} if licence is None else licence.card_fields()
    head = DatasetCardData(
        pretty_name=f"Features of {', '.join(map(public_source, data))} by {public_source(record['encoder'])}",
        task_categories=["image-feature-extraction"],
        size_categories=next((size for most, size in _SIZES.items() if rows < most), "n>10M"),
        source_datasets=[source for source in data if _on_hub(source)] or None,
        base_model=record["encoder"] if _on_hub(record["encoder"]) else None,
        tags=["image-features", "embeddings", record["encoding"]["encoder_class"]],
        **terms,
        configs=[{"config_name": "default", "data_files": files}] if parquet else None,
    )
    context = _context(record, splits, name or folder.resolve().name)
    context["licence"] = "" if licence is None else describe_licence(licence, "Features")
    write_text(folder / CARD, write("features.md", head, context))


def _on_hub(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists()


def _context(record: Mapping[str, Any], splits: Mapping[str, Any], name: str) -> dict[str, Any]:
    encoding = record["encoding"]
    skipped = [(key, item) for key, split in splits.items() for item in split["skipped"]]
    return {
        "sources": sorted({public_source(split["data"]) for split in splits.values()}),
        "encoder": public_source(record["encoder"]),
        "encoding": encoding,
        "revision": record["encoder_commit"] or record["encoder_options"].get("revision"),
        "labelled": any(split["columns"]["label"] for split in splits.values()),
        "meaning": _MEANING,
        "name": name,
        "first": next(iter(splits)),
        "splits": [
            (
                key,
                f"{public_source(split['data'])} ({split['selection']['split']})",
                f"{split['rows']:,}",
                str(len(split["skipped"])),
                f"{readable_size(split['bytes'])} in {split['selection']['shards']} shards",
            )
            for key, split in splits.items()
        ],
        "left_out": [
            {
                "split": key,
                "index": item["index"],
                "name": public_source(item["name"]),
                "reason": public_text(item["reason"].splitlines()[0]),
            }
            for key, item in skipped[:_SHOWN]
        ],
        "more": max(0, len(skipped) - _SHOWN),
        "preprocessing": dump_yaml(public_values(encoding["preprocessing"])),
        "commands": [public_command(split["command"]) for split in splits.values()],
        "made": [_describe_making(key, split) for key, split in splits.items()],
    }


def _describe_making(key: str, split: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in split["versions"].items())
    run = split["runs"][-1] if split["runs"] else None
    speed = f" {run['images_per_second']:.4g} images/s on {run['processes']} x {run['device']}." if run else ""
    return f"{key}:{speed} {versions}."
