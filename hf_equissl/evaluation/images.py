"""The images that evaluators look at: fixed subsets, base images, and features that are computed once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import Decoding, decode_image
from ..data.decoding import AS_STORED
from ..data.subsets import choose_rows
from ..distributed.signals import guard_workers
from ..encoders.base_image import base_image
from ..encoders.frozen import FrozenEncoder
from ..utils.suggestions import check_known
from .feature_store import STORED, FeatureStore

logger = logging.getLogger(__name__)

# How many bad files an error message lists at most.
_LISTED = 10


class _BaseImages(Dataset[tuple[int, Tensor | str]]):
    def __init__(self, images: Sequence[Any], size: int, decoding: Decoding) -> None:
        self.images, self.size, self.decoding = images, size, decoding

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        try:
            return row, base_image(decode_image(self.images[row], self.decoding), self.size)
        except (OSError, ValueError) as error:  # ImageDecodeError is one of them; the caller counts and names them
            return row, str(error)


class _Part(Sequence[Any]):
    """Some rows of a sequence, read when they are asked for."""

    def __init__(self, images: Sequence[Any], rows: list[int]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        return self.images[self.rows[position]]

    def item_name(self, position: int) -> str | None:
        return _item_name(self.images, self.rows[position])


def _item_name(images: Sequence[Any], row: int) -> str | None:
    """Return the path of an image, or what its source calls it; ``None`` where it has no name."""
    if hasattr(images, "item_name"):
        return images.item_name(row)
    value = images[row]
    path = value.get("path") if isinstance(value, Mapping) else value
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) and path else None


def _identity(samples: list[tuple[int, Tensor | str]]) -> list[tuple[int, Tensor | str]]:
    return samples


@dataclass(eq=False)
class ImageSet:
    """A fixed list of images with or without labels, and the features of them that were computed so far.

    Images that do not decode are left out, each with one warning; more than ``max_bad_share`` of them is an error.

    Attributes:
        images: Rows that ``decode_image`` reads: encoded bytes, paths, PIL images, arrays.
        labels: (n,) int64, or ``None``.
        dataset: Name of the data set, for records.
        split: Name of the split, for records.
        cache_bytes: Base images are kept in memory (uint8) up to this size, and decoded on every pass above it.
        num_workers: Processes that decode.
        max_bad_share: Share of images that may fail to decode.
        progress: Whether passes of an encoder show a bar.
        feature_storage: In which type features are kept: "fp32", or in half the memory "bf16" or "fp16".
        decoding: How images become RGB where files leave a choice.
        label_hint: Why there are no labels although something looks like them, and what to do.
    """

    images: Sequence[Any] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    dataset: str = "images"
    split: str = "test"
    cache_bytes: int = 4 << 30
    num_workers: int = 0
    max_bad_share: float = 0.01
    progress: bool = True
    feature_storage: str = "fp32"
    decoding: Decoding = AS_STORED
    label_hint: str = ""
    _pixels: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False)
    _features: WeakKeyDictionary[FrozenEncoder, dict[str, Any]] = field(default_factory=WeakKeyDictionary, repr=False)
    # Names of bad files that were logged; shared with subsets, so that none is logged twice.
    _logged: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share (--max_bad_share) must be a share from 0 to 1, got {self.max_bad_share}.")
        check_known(self.feature_storage, STORED, "feature_storage (--feature_storage)")
        if not len(self.images):
            raise ValueError(f"The {self.split} split of {self.dataset!r} has no images.")
        if self.labels is not None:
            self.labels = torch.as_tensor(self.labels, dtype=torch.int64)
            if len(self.labels) != len(self.images):
                raise ValueError(f"{len(self.labels)} labels for {len(self.images)} images.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def is_labelled(self) -> bool:
        """Whether every image has a class."""
        return self.labels is not None and bool((self.labels >= 0).all())

    def subset(self, limit: int | None, seed: int = 0) -> ImageSet:
        """Draw ``limit`` fixed random images; return itself if it has no more."""
        if limit is None or limit >= len(self):
            return self
        return self.part(torch.from_numpy(choose_rows(len(self), limit, seed)))

    def part(self, rows: Tensor) -> ImageSet:
        """Select the images of some ``rows`` (m,), ascending."""
        return replace(
            self,
            images=_Part(self.images, rows.tolist()),
            labels=None if self.labels is None else self.labels[rows],
            _pixels={},
            _features=WeakKeyDictionary(),
        )

    def require_labels(self, who: str) -> Tensor:
        """Return the labels (n,), or raise a ``ValueError`` that says what to do."""
        if self.labels is None:
            raise ValueError(
                f"{who} needs labels, and the {self.split} split of {self.dataset!r} has none. "
                + (self.label_hint or "Name the column (label_column=..., --label_column), use class folders.")
                + " Or leave this evaluator out."
            )
        known = self.labels >= 0
        if not bool(known.all()):
            raise ValueError(
                f"{who} needs labels, and {int((~known).sum())} of {len(self)} images in the {self.split} split of "
                f"{self.dataset!r} are unlabelled (-1). Give a split that is labelled throughout."
            )
        return self.labels

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows (b,) and base images (b, 3, size, size) uint8, in order, without those that do not decode."""
        if size in self._pixels:
            yield from self._pixels[size]
            return
        keep = len(self) * 3 * size * size <= self.cache_bytes
        loader = DataLoader(
            _BaseImages(self.images, size, self.decoding),
            batch_size=512,
            num_workers=self.num_workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # otherwise every pass would take a number from the caller's generator
        )
        kept: list[tuple[Tensor, Tensor]] = []
        bad: dict[int, str] = {}
        for samples in guard_workers(loader):
            good = [(row, pixels) for row, pixels in samples if isinstance(pixels, Tensor)]
            bad.update((row, reason) for row, reason in samples if isinstance(reason, str))
            if good:
                batch = torch.tensor([row for row, _ in good]), torch.stack([pixels for _, pixels in good])
                if keep:
                    kept.append(batch)
                yield batch
        self._report(bad)
        if keep:
            self._pixels[size] = kept

    def _report(self, bad: Mapping[int, str]) -> None:
        """Name the images that do not decode (row -> reason), or raise where there are too many."""
        unnamed = f"{self.dataset} ({self.split})"
        named = [(_item_name(self.images, row) or f"{unnamed}, row {row}", reason) for row, reason in bad.items()]
        if len(bad) == len(self) or len(bad) > self.max_bad_share * len(self):
            listed = "".join(f"\n  {name}: {reason}" for name, reason in named[:_LISTED])
            remedy = (
                "Check that the column and the files hold images."
                if len(bad) == len(self)
                else "Repair or remove these files, or raise max_bad_share (--max_bad_share)."
            )
            raise ValueError(
                f"{len(bad)} of {len(self)} images in the {self.split} split of {self.dataset!r} do not decode; "
                f"{self.max_bad_share:.1%} are allowed. The first:{listed}\n{remedy}"
            )
        new = [(name, reason) for name, reason in named if name not in self._logged]
        for name, reason in new:
            self._logged.add(name)
            logger.warning("Skipped %s: %s", name, reason)
        if new:
            logger.warning("%d of %d images of %s do not decode: left out.", len(bad), len(self), unnamed)

    def encode(
        self, encoder: FrozenEncoder, names: Sequence[str], change: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the encoder once over all images.

        Args:
            encoder: The encoder.
            names: Names of the features.
            change: ``change(images (b, 3, S, S) in [0, 1], rows (b,)) -> images``, on the encoder's device.

        Returns:
            Rows (m,) of the images that decode, and name -> (m, .) float32 on the CPU.
        """
        rows, store = self._collect(encoder, _list_needed(encoder, names), torch.float32, change)
        return rows, _compose(encoder, [store], names)

    def features(self, encoder: FrozenEncoder, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``encode`` of the images as they are, computed once per encoder, and again when its weights change.

        They are float32, of the precision in which they are kept (``feature_storage``).
        """
        rows, stored = self.stored_features(encoder, names)
        return rows, {name: value.float() for name, value in stored.items()}

    def stored_features(self, encoder: FrozenEncoder, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``features`` as they are kept, in the type of ``feature_storage``, to be read in pieces."""
        stored = self._features.get(encoder)
        if stored is None or stored["version"] != encoder.version:
            stored = self._features[encoder] = {"version": encoder.version, "stores": []}
        missing = [
            name for name in _list_needed(encoder, names) if not any(name in store for store in stored["stores"])
        ]
        if missing:
            stored["rows"], store = self._collect(encoder, missing, STORED[self.feature_storage])
            stored["stores"].append(store)
        return stored["rows"], _compose(encoder, stored["stores"], names)

    def _collect(
        self,
        encoder: FrozenEncoder,
        needed: Sequence[str],
        dtype: torch.dtype,
        change: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, FeatureStore]:
        rows: list[Tensor] = []
        store = FeatureStore(needed, len(self), dtype)
        with tqdm(total=len(self), unit="img", leave=False, disable=not self.progress, desc=self.split) as bar:
            for index, pixels in self.batches(encoder.image_size):
                rows.append(index)
                for chunk, chunk_rows in zip(
                    pixels.split(encoder.batch_size), index.split(encoder.batch_size), strict=True
                ):
                    if change is not None:
                        chunk = change(chunk.to(encoder.device).float() / 255, chunk_rows)
                    store.add(encoder.encode(chunk, store.names))
                    bar.update(len(chunk))
        return torch.cat(rows), store


def _list_needed(encoder: FrozenEncoder, names: Sequence[str]) -> list[str]:
    """List what is computed and kept for ``names``: "backbone" is put together from its parts when it is asked for."""
    return list(dict.fromkeys(part for name in names for part in _parts(encoder, name)))


def _parts(encoder: FrozenEncoder, name: str) -> tuple[str, ...]:
    return encoder.backbone_parts if name == "backbone" else (name,)


def _compose(encoder: FrozenEncoder, stores: Sequence[FeatureStore], names: Sequence[str]) -> dict[str, Tensor]:
    """Put together what was asked for; parts that were computed together already lie side by side."""

    def find(parts: Sequence[str]) -> Tensor | None:
        return next((found for store in stores if (found := store.join(parts)) is not None), None)

    composed = {}
    for name in names:
        parts = _parts(encoder, name)
        whole = find(parts)
        composed[name] = torch.cat([find([part]) for part in parts], 1) if whole is None else whole  # type: ignore[misc]
    return composed
