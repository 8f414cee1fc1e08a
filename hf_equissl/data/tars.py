"""WebDataset shards: one image of each sample, whatever its type, and what is asked for beside it."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import PurePath
from typing import Any, NamedTuple

import datasets
from datasets.builder import Key
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from .columns import IMAGE_COLUMN_OPTION, IMAGE_SUFFIXES
from .errors import ImageSourceError

# Number of samples from which the columns follow.
_FIRST_SAMPLES = 32
# Samples of such members alone are papers that lie beside the data, unless samples with images have such members, too.
_PAPERS = frozenset(["md", "txt", "rst", "html", "csv", "tsv", "json", "jsonl", "yaml", "yml", "toml", "xml", "pdf"])
_LABELS = "cls"
# To be changed whenever rows are made in another way: then datasets makes anew what it has in its cache.
_VERSION = "1"


@dataclass
class TarConfig(datasets.BuilderConfig):
    """What to take of each sample.

    Attributes:
        column: The member with the image, by its name behind the first dot; ``None``: the only image that there is.
        label_column: The member with the class.
        more: Further members.
    """

    column: str | None = None
    label_column: str | None = None
    more: tuple[str, ...] = ()


class _Sample(NamedTuple):
    """The members of one key: name behind the first dot, in small letters -> whole name, content if it was read."""

    key: str
    members: dict[str, tuple[str, bytes | None]]


@dataclass(frozen=True)
class _Layout:
    """What the first samples say about all.

    Attributes:
        image: What the column of images is called.
        label: The member with the class, if there is one.
        labels_are_numbers: Whether it mostly holds integers; what is none is missing then.
        beside: Members that stand beside images.
    """

    image: str
    label: str | None
    labels_are_numbers: bool
    beside: frozenset[str] = field(default_factory=frozenset)


def tar_builder(found: WebDataset, cache_dir: Any, **wanted: Any) -> TarImages:
    """Build the rows of the files that ``datasets`` found; ``wanted`` are the fields of ``TarConfig``."""
    return TarImages(
        cache_dir=cache_dir,
        dataset_name=found.dataset_name,
        hash=f"{found.hash or 'tars'}-{_VERSION}",
        base_path=found.base_path,
        repo_id=found.repo_id,
        data_files=found.config.data_files,
        **wanted,
    )


class TarImages(WebDataset):
    """The builder of ``datasets`` for WebDataset, for samples that differ in their members.

    A member's key ends at the first dot of its name, as WebDataset has it. Of each sample the one image is taken, of
    whatever type, or the member that ``column`` names. Samples without one are rows with an empty image.
    """

    BUILDER_CONFIG_CLASS = TarConfig
    config: TarConfig

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        splits = []
        for name, paths in dl_manager.download(self.config.data_files).items():
            archives = [dl_manager.iter_archive(path) for path in paths]
            arguments = {"tar_paths": paths, "tar_iterators": archives}
            splits.append(datasets.SplitGenerator(name=name, gen_kwargs=arguments))
        first = splits[0].gen_kwargs
        samples = self._first_samples(zip(*first.values(), strict=True))
        self._layout = self._find_layout(samples, str(first["tar_paths"][0]))
        columns: dict[str, Any] = {self._layout.image: datasets.Image(decode=False)}
        if self._layout.label is not None:
            columns[self._layout.label] = datasets.Value("int64" if self._layout.labels_are_numbers else "string")
        for name in self.config.more:
            if name in self._layout.beside:
                columns[name] = datasets.Image(decode=False) if _is_image(name) else datasets.Value("binary")
        self.info.features = datasets.Features(columns)
        return splits

    def _generate_examples(self, tar_paths: Sequence[str], tar_iterators: Sequence[Any]) -> Iterator[Any]:
        for number, (path, archive) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            rows = filter(None, map(self._row, self._samples(path, archive)))
            for index, row in enumerate(rows):
                yield Key(number, index), row

    def _first_samples(self, shards: Iterable[tuple[str, Any]]) -> list[_Sample]:
        """Read the first samples. A broken shard is left to whoever reads it, unless all are broken."""
        found: list[_Sample] = []
        broken: Exception | None = None
        for path, archive in shards:
            try:
                found += islice(self._samples(path, archive), _FIRST_SAMPLES - len(found))
            except (tarfile.TarError, OSError) as error:
                broken = broken or error
            if len(found) == _FIRST_SAMPLES:
                break
        if broken is not None and not found:
            raise broken
        return found

    def _samples(self, path: str, archive: Iterable[tuple[str, Any]]) -> Iterator[_Sample]:
        """Group members by their keys; only those that are wanted are read.

        Raises:
            ValueError: A member is there twice.
        """
        sample: _Sample | None = None
        for name, file in archive:
            key, member = base_plus_ext(name)
            if key is None:
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key, {})
            member = member.lower()
            if member in sample.members:
                raise ValueError(f"{path} holds {name!r} twice in a row: which one is meant?")
            sample.members[member] = name, file.read() if self._is_wanted(member) else None
        if sample is not None:
            yield sample

    def _is_wanted(self, member: str) -> bool:
        return _is_image(member) or member in (self._label, *self.config.more, self._named)

    @property
    def _label(self) -> str:
        return self.config.label_column or _LABELS

    @property
    def _named(self) -> str | None:
        return None if self.config.column is None else self.config.column.lower()

    def _images(self, members: Iterable[str]) -> list[str]:
        """List the members of a sample that can be its image."""
        if self._named is not None:
            return [name for name in members if name == self._named]
        return [name for name in members if _is_image(name) and name not in self.config.more]

    def _find_layout(self, samples: Sequence[_Sample], path: str) -> _Layout:
        """Find the columns, from the first samples.

        Raises:
            ImageSourceError: No sample has an image, or some have several.
        """
        images = [self._images(sample.members) for sample in samples]
        for sample, found in zip(samples, images, strict=True):
            if len(found) > 1:
                raise ImageSourceError(_explain_several(path, sample, found))
        names = Counter(chain.from_iterable(images))
        if not names:
            seen = dict.fromkeys(name for sample in samples for name in sample.members)
            raise ImageSourceError(
                f"{path}: no image among the first {len(samples)} samples. Their members are "
                f"{', '.join(list(seen)[:12]) or 'none'}; expected {self._named or 'jpg, png, webp, ...'}. "
                f"Name the image: {IMAGE_COLUMN_OPTION}."
            )
        with_image = [sample for sample, found in zip(samples, images, strict=True) if found]
        beside = frozenset(chain.from_iterable(sample.members for sample in with_image)) - names.keys()
        labels = [_text(sample.members[self._label][1]) for sample in with_image if self._label in sample.members]
        return _Layout(
            image=self.config.column or (next(iter(names)) if len(names) == 1 else "image"),
            label=self._label if labels else None,
            labels_are_numbers=2 * sum(_number(label) is not None for label in labels) > len(labels),
            beside=beside,
        )

    def _row(self, sample: _Sample) -> dict[str, Any] | None:
        """Make a row of a sample; ``None`` of what is none."""
        members, layout = sample.members, self._layout
        found = self._images(members)
        if not found and members.keys() <= _PAPERS and not members.keys() & layout.beside:
            return None
        chosen = found[0] if len(found) == 1 else None
        if layout.image in found:
            chosen = layout.image
        image = {"bytes": b"", "path": f"{sample.key} ({', '.join(members)})"}
        if chosen is not None:
            name, content = members[chosen]
            image = {"bytes": content or b"", "path": name}
        row: dict[str, Any] = {layout.image: image}
        if layout.label is not None:
            label = _text(members[layout.label][1]) if layout.label in members else None
            row[layout.label] = _number(label) if layout.labels_are_numbers else label
        for name in self.config.more:
            if name in layout.beside:
                path, content = members.get(name, ("", None))
                row[name] = {"bytes": content, "path": path} if _is_image(name) else content
        return row


def _explain_several(path: str, sample: _Sample, images: Sequence[str]) -> str:
    """Say what is wrong with a sample of several images, and what to do."""
    names = [sample.members[image][0] for image in images]
    if any("." in image for image in images):
        return (
            f"{path}: {names[0]} and {names[1]} have the same key {PurePath(sample.key).name!r}, so that they count as "
            "one sample: the key of a member ends at the first dot of its name, and these names have more dots. Write "
            f"the files without the others; if a sample does hold several images, choose one: {IMAGE_COLUMN_OPTION}."
        )
    return f"{path}: several columns hold images: {', '.join(images)}. Choose one: {IMAGE_COLUMN_OPTION}."


def _is_image(member: str) -> bool:
    return "." + member.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode(errors="replace").strip()


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def choose_members(column: str | None, label_column: str | None, more: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the fields of ``TarConfig`` for the arguments of ``load_images``."""
    names = tuple(name.lower() for columns in more.values() for name in columns)
    return {"column": column, "label_column": label_column, "more": names}
