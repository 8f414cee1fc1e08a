"""Data sets that encoders are compared on, by name: where they are, how they are read, and by what they are judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..utils.files import expand_home
from ..utils.suggestions import check_known

# "--data set:pets"
PREFIX = "set:"


@dataclass(frozen=True)
class NamedSet:
    """A public data set with the reading that published numbers use.

    Attributes:
        title: What papers call it.
        source: Hub id of a copy that ``datasets`` reads without code; "" where there is none with the official splits:
            then the folder has to be named (``set:inat18=/data/inat18``).
        train_split: What probes are fitted on; "" for sets that are only judged on.
        test_split: What they are judged by.
        column, label_column: Columns of the images and of the classes; "" leaves them to be found by type.
        metric: The number that papers quote, "top1" or "mean_per_class".
        note: What to know before comparing with published numbers.
    """

    title: str
    source: str
    train_split: str
    test_split: str
    column: str = ""
    label_column: str = ""
    metric: str = "top1"
    note: str = ""

    def columns(self) -> dict[str, Any]:
        """Return what ``load_images`` is told of the columns."""
        found = {name: getattr(self, name) for name in ("column", "label_column")}
        return {name: value for name, value in found.items() if value}


# Splits: CIFAR and Food as published; DTD and SUN397 their first partitions; Pets trainval (3,680) and test; Aircraft
# variants; Flowers the 1,020 training images and the 6,149 test images (many papers add the 1,020 validation images).
# Mean per class as in the transfer benchmark of https://arxiv.org/abs/1805.08974.
NAMED_SETS: dict[str, NamedSet] = {
    "cifar10": NamedSet("CIFAR-10", "uoft-cs/cifar10", "train", "test", "img", "label"),
    "cifar100": NamedSet("CIFAR-100", "uoft-cs/cifar100", "train", "test", "img", "fine_label"),
    "aircraft": NamedSet(
        "FGVC Aircraft",
        "clip-benchmark/wds_fgvc_aircraft",
        "train",
        "test",
        label_column="cls",
        metric="mean_per_class",
    ),
    "pets": NamedSet(
        "Oxford-IIIT Pet", "timm/oxford-iiit-pet", "train", "test", "image", "label", metric="mean_per_class"
    ),
    "food101": NamedSet("Food-101", "ethz/food101", "train", "validation", "image", "label"),
    "flowers": NamedSet(
        "Oxford 102 Flowers",
        "dpdl-benchmark/oxford_flowers102",
        "train",
        "test",
        "image",
        "label",
        metric="mean_per_class",
        note="fitted on 1,020 images; papers that add the validation images report more",
    ),
    "sun397": NamedSet("SUN397", "tanganke/sun397", "train", "test", "image", "label"),
    "dtd": NamedSet("Describable Textures", "tanganke/dtd", "train", "test", "image", "label"),
    "inat18": NamedSet(
        "iNaturalist 2018", "", "train", "validation", note="folders train/ and val/ with one sub-folder per species"
    ),
    "imagenet": NamedSet("ImageNet-1k", "ILSVRC/imagenet-1k", "train", "validation", "image", "label"),
    "imagenet-v2": NamedSet(
        "ImageNet-V2",
        "clip-benchmark/wds_imagenetv2",
        "",
        "test",
        label_column="cls",
        note="matched frequency, the variant of the original paper's headline",
    ),
    "imagenet-sketch": NamedSet(
        "ImageNet-Sketch", "clip-benchmark/wds_imagenet_sketch", "", "test", label_column="cls"
    ),
    "imagenet-r": NamedSet(
        "ImageNet-R",
        "",
        "",
        "test",
        note="200 of the 1,000 classes, folders named by WordNet id; scored among all 1,000",
    ),
    "imagenet-c": NamedSet(
        "ImageNet-C", "", "", "test", note="one folder per corruption and severity, images of 224 pixels"
    ),
    "imagenet-p": NamedSet("ImageNet-P", "", "", "test", note="accuracy on the perturbed frames, not the flip rate"),
}


def is_named(source: str) -> bool:
    """Return whether ``source`` names a set, as ``set:pets`` does."""
    return source.startswith(PREFIX)


def find_set(source: str, *, fitted: bool = False) -> tuple[str, NamedSet]:
    """Read ``set:NAME`` or ``set:NAME=FOLDER_OR_ID``: where the images are, and the set.

    Args:
        source: The name.
        fitted: Whether probes are to be fitted on it.

    Raises:
        ValueError: there is no such set; it has no copy on the Hub and no folder was named; or probes are to be fitted
            on a set that is only judged on.
    """
    name, _, place = source.removeprefix(PREFIX).partition("=")
    check_known(name, NAMED_SETS, "set")
    chosen = NAMED_SETS[name]
    if fitted and not chosen.train_split:
        raise ValueError(
            f"{source}: {chosen.title} is only judged on. Fit on ImageNet: --data {PREFIX}imagenet --further_test "
            f"{source}."
        )
    if place:
        # A folder has columns and splits of its own: classes are its sub-folders.
        return expand_home(place), replace(chosen, column="", label_column="", test_split="")
    if not chosen.source:
        raise ValueError(
            f"{source}: {chosen.title} has no copy on the Hub that can be read without code. Download it, and give its "
            f"folder: {PREFIX}{name}=/path/to/{name} ({chosen.note})."
        )
    return chosen.source, chosen
