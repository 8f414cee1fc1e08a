"""The settings of an extraction, checked as far as that is possible without reading anything."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..utils.files import expand_home
from ..utils.machine import usable_cores
from ..utils.suggestions import did_you_mean


class ExtractionError(RuntimeError):
    """An extraction stopped on its way; the shards that are whole are kept, and the same command goes on."""


# Format -> suffix of the files of features.
FORMATS = {"parquet": ".parquet", "safetensors": ".safetensors"}
DTYPES = ("float32", "float16")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# Processes that decode for one that computes, by default: each holds batches of its own, and they have one reader.
MOST_WORKERS = 32
# Images per shard by default, and the size above which a shard holds fewer.
SHARD_IMAGES, SHARD_BYTES = 10_000, 500 * 10**6


@dataclass(frozen=True)
class ExtractionSettings:
    """One extraction.

    Attributes:
        encoder: Folder or Hub id that ``AutoModel`` loads.
        data: Images that ``hf_equissl.data.load_images`` reads.
        output_dir: Where ``data/``, ``extraction.json`` and ``README.md`` are written. Several splits may share it.
        split: Split of the data.
        features: Names of ``FrozenEncoder.features``, also ``patch_tokens``.
        file_format: "parquet" or "safetensors".
        dtype: Type in which features are stored, "float32" or "float16".
        shard_size: Images per shard; ``None``: 10,000, fewer where a shard would exceed 500 MB. For a stream
            every shard of the source gives one shard of features.
        limit: Number of images to take, from the first on; ``None``: all.
        source_options: Further arguments of ``load_images``.
        load_options: ``revision``, ``subfolder``, ``trust_remote_code`` of the encoder.
        image_size: Side of the images in pixels, resized and cropped as for the probes; ``None``: as the image
            processor beside the encoder does it.
        precision: "fp32", or "bf16" and "fp16" for autocast; "auto": bf16 where the device has units for it, else
            fp32. A folder that has shards goes on in their precision.
        batch_size: Images per forward pass.
        num_workers: Processes that decode, for each process that computes; ``None``: by the number of cores.
        device: "cpu", "cuda", "cuda:1", ...; ``None``: CUDA if there is one. With several processes each takes its own.
        max_bad_share: Share of the images that may fail to decode; they are left out and named.
    """

    encoder: str
    data: str
    output_dir: str
    split: str = "train"
    features: tuple[str, ...] = ("cls", "patches")
    file_format: str = "parquet"
    dtype: str = "float32"
    shard_size: int | None = None
    limit: int | None = None
    source_options: dict[str, Any] = field(default_factory=dict)
    load_options: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    precision: str = "fp32"
    batch_size: int = 256
    num_workers: int | None = None
    device: str | None = None
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("encoder", "data", "output_dir"):
            object.__setattr__(self, name, expand_home(getattr(self, name)))
        object.__setattr__(self, "features", tuple(dict.fromkeys(self.features)))
        for flag, value, known in (
            ("--format", self.file_format, FORMATS),
            ("--dtype", self.dtype, DTYPES),
            ("--precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                hint = did_you_mean(value, known)
                raise ValueError(f"{flag} {value}: expected one of {', '.join(known)}.{hint}")
        for flag, number in (
            ("--shard_size", self.shard_size),
            ("--limit", self.limit),
            ("--image_size", self.image_size),
            ("--batch_size", self.batch_size),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{flag} {number}: expected 1 or more.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers}: expected 0 or more.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share {self.max_bad_share}: expected a share from 0 to 1.")
        if self.streaming and self.shard_size is not None:
            raise ValueError(
                "--shard_size: of a stream, each shard of the source gives one shard of features. Leave it out, or "
                "leave out --streaming."
            )

    @property
    def streaming(self) -> bool:
        """Whether the data are read as a stream."""
        return bool(self.source_options.get("streaming"))

    @property
    def split_name(self) -> str:
        """Name of the split in file names and in ``datasets``: "train[:10%]" becomes "train_10"."""
        return re.sub(r"\W+", "_", self.split).strip("_")

    def workers(self, local_processes: int) -> int:
        """Choose how many processes decode for one of ``local_processes`` here: its share of the cores, at most 32."""
        if self.num_workers is not None:
            return self.num_workers
        return max(1, min(MOST_WORKERS, usable_cores() // local_processes))
