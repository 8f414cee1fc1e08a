"""The demo without a browser: pictures and a page that says what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..evaluation.metrics import r2_mean
from ..utils.figures import make_figure, picture_sheet, save_figure
from ..utils.files import replacing, write_text
from ..utils.markdown import code, plain
from .analysis import Analyst, to_picture
from .change import LIMITS, Change
from .lens import PARTS, Lens

PAGE = "demo.md"
SHOWN_ANGLE = 40.0
ROWS = 8
ANGLES = tuple(range(-45, 46, 15))
SHIFT = 3.0  # per cent, right and down, in the pictures of images on the way


def run_demo(analyst: Analyst, output_dir: str | Path) -> list[Path]:
    """Write pictures and a page about what turning does to the images of the gallery, as the encoders see them.

    Args:
        analyst: Encoders and gallery.
        output_dir: Folder, made where it does not exist; files of an earlier demo are replaced.

    Returns:
        The files, the page first. Charts are drawn where matplotlib is installed; their numbers are on the page.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    parts = [_head(analyst)]
    for section in (_way, _patches, _cosines, _angles):
        lines = [*section(analyst, folder, pictures)]
        parts.append("\n".join(lines))
    write_text(folder / PAGE, "\n\n".join(part for part in parts if part) + "\n")
    return [folder / PAGE, *pictures]


def _head(analyst: Analyst) -> str:
    lines = ["# What turning an image does to its features", ""]
    for lens in analyst.lenses.values():
        decoders = "with decoders" if lens.can_paint else "without decoders"
        lines.append(f"- **{plain(lens.name)}**: {code(Path(lens.encoder.name).name)}, {decoders}")
    names = ", ".join(plain(name) for name in list(analyst.gallery)[:ROWS])
    lines += ["", f"Images: {names}. What turning leaves empty at an image's edges is filled by mirroring it."]
    return "\n".join(lines)


def _way(analyst: Analyst, folder: Path, pictures: list[Path]) -> Iterator[str]:
    """Show what decoders paint on the way from an image to its changed version."""
    change = Change(angle=SHOWN_ANGLE, shift_right=SHIFT, shift_down=SHIFT)
    for lens in analyst.lenses.values():
        if not lens.can_paint:
            continue
        first = analyst.pixels(lens)[:ROWS].float() / 255
        second = change.apply(first)
        painted = lens.paint(first, second)
        truth = change.path(first, list(painted)).unbind(1)
        columns = [("image", first)]
        columns += [(f"true {fraction:.2f}", images) for fraction, images in zip(painted, truth, strict=True)]
        columns += [(f"painted {fraction:.2f}", images) for fraction, images in painted.items()]
        columns += [("changed", second)]
        _save_sheet(columns, folder / "reconstructions.png", pictures)
        errors = [(images - true).square().mean().item() for images, true in zip(painted.values(), truth, strict=True)]
        still = [(first - true).square().mean().item() for true in truth]
        listed = ", ".join(
            f"{fraction:.2f} of the way {error:.4f} (the image itself: {other:.4f})"
            for fraction, error, other in zip(painted, errors, still, strict=True)
        )
        yield "## Images on the way"
        yield "\n![Images on the way](reconstructions.png)\n"
        yield (
            f"The encoder *{plain(lens.name)}* sees the image and the changed one (turned by {SHOWN_ANGLE:g} degrees, "
            f"shifted by {SHIFT:g} % right and down). From the equivariant features of both, decoders paint the images "
            "between them; how the image was changed is not told. **Look at** where things are, not at how sharp they "
            "are: a painted image should be turned as far as the true one. Mean squared error of pixels in [0, 1]: "
            f"{listed}."
        )
        return


def _patches(analyst: Analyst, folder: Path, pictures: list[Path]) -> Iterator[str]:
    """Show patches in the colours of their principal components."""
    columns: list[tuple[str, Tensor]] = []
    letters = dict(zip(analyst.lenses, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
    for name, lens in analyst.lenses.items():
        before = analyst.pixels(lens)[:ROWS].float() / 255
        after = Change(angle=SHOWN_ANGLE).apply(before)
        columns = columns or [("image", before), ("turned", after)]
        for title, images in (("image", before), ("turned", after)):
            tiles = [to_picture(tile, images.shape[-1], smooth=False) for tile in lens.colours(lens.features(images))]
            columns.append((f"{letters[name]}: {title}", _as_tensor(tiles)))
    _save_sheet(columns, folder / "patches.png", pictures)
    listed = "; ".join(f"{letter}: {plain(name)}" for name, letter in letters.items())
    yield "## Patches"
    yield "\n![Patches of images and of turned images](patches.png)\n"
    yield (
        f"{listed}. The first three principal components of the patches' features, as red, green and blue; one set of "
        "colours per encoder. **Look at** patches of one thing, which have one colour, and at what becomes of it when "
        f"the image is turned by {SHOWN_ANGLE:g} degrees."
    )


def _cosines(analyst: Analyst, folder: Path, pictures: list[Path]) -> Iterator[str]:
    """Say how far each part of the features moves with the angle."""
    angles = [angle for angle in ANGLES if angle >= 0]
    curves: dict[str, list[float]] = {}
    for lens in analyst.lenses.values():
        pixels = analyst.pixels(lens).float() / 255
        before = lens.features(pixels)
        for angle in angles:
            found = lens.cosines(before, lens.features(Change(angle=angle).apply(pixels)))
            for part in PARTS:
                curves.setdefault(f"{lens.name}: {part}", []).append(found[part].mean().item())
    yield "## What turning does to both parts of the features\n"
    if find_spec("matplotlib") is not None:
        _draw_curves(angles, curves, folder / "cosines.png")
        pictures.append(folder / "cosines.png")
        yield "![Cosine over angle](cosines.png)\n"
    yield from _table("cosine at", angles, {name: [f"{value:.2f}" for value in row] for name, row in curves.items()})
    yield (
        "\nCosine between the features of the image and of the turned one, mean over the images: the invariant part of "
        "CLS, and the equivariant part of each patch. **Look at** both parts of one encoder: the invariant part should "
        "stay near 1, the equivariant part should move, and more the more the image is turned. (The base never trains "
        "its equivariant part, which is a random mixture of its features.)"
    )


def _angles(analyst: Analyst, folder: Path, pictures: list[Path]) -> Iterator[str]:
    """Compare the angles that probes read with the true ones."""
    probes = {lens.name: lens.probe for lens in analyst.lenses.values() if lens.probe is not None}
    read = {name: _read_angles(analyst, analyst.lenses[name]) for name in probes}
    if not read:
        return
    yield "## The angle, read off frozen features\n"
    if find_spec("matplotlib") is not None:
        _draw_angles(read, folder / "angles.png")
        pictures.append(folder / "angles.png")
        yield "![Angles read and true](angles.png)\n"
    rows = {name: [f"{mean:+.0f} ± {std:.0f}" for mean, std in _spread(found)] for name, found in read.items()}
    yield from _table("true angle", ANGLES, rows)
    yield ""
    true = torch.tensor(ANGLES, dtype=torch.float32)
    for name, found in read.items():
        facts = probes[name].facts
        error = (found - true).abs().mean().item()
        score = r2_mean(found.flatten(), true.expand_as(found).flatten())
        yield (
            f"- {plain(name)}: off by {error:.1f} degrees on average here, R² {score:.2f}; on {facts['test_pairs']} "
            f"held-out images of {code(str(facts['dataset']))} by {facts['mean_error_degrees']} degrees, R² "
            f"{facts['r2']}."
        )
    yield (
        "\nA linear probe, fitted on other images, reads the angle off the patches of the image and of the turned one; "
        f"mean and deviation over the images. **Look at** how far each row is from the true angles ({ANGLES[0]} to "
        f"{ANGLES[-1]} degrees): bricks and retinas look alike at many of them."
    )


def _read_angles(analyst: Analyst, lens: Lens) -> Tensor:
    """Predict every angle of ``ANGLES`` for every image, (G, angles)."""
    pixels = analyst.pixels(lens).float() / 255
    before = lens.features(pixels)
    found = [lens.angles(before, lens.features(Change(angle=angle).apply(pixels))) for angle in ANGLES]
    return torch.stack([column for column in found if column is not None], 1)


def _spread(found: Tensor) -> Iterator[tuple[float, float]]:
    for column in found.unbind(1):
        yield column.mean().item(), column.std().item()


def _table(head: str, columns: Sequence[float], rows: dict[str, list[str]]) -> Iterator[str]:
    yield f"| {head} | " + " | ".join(f"{column:g}°" for column in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, values in rows.items():
        yield f"| {plain(name)} | " + " | ".join(values) + " |"


def _save_sheet(columns: Sequence[tuple[str, Tensor]], path: Path, pictures: list[Path]) -> None:
    with replacing(path) as staging:
        picture_sheet(columns, ROWS).save(staging)
    pictures.append(path)


def _as_tensor(tiles: Sequence[object]) -> Tensor:
    """Stack pictures to (B, 3, S, S) in [0, 1]."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255 for tile in tiles])


def _draw_curves(angles: Sequence[float], curves: dict[str, list[float]], path: Path) -> None:
    figure = make_figure((6.4, 3.6))
    axes = figure.subplots()
    for number, (name, values) in enumerate(curves.items()):
        style = "-" if number % 2 else "--"
        axes.plot(angles, values, style, color=f"C{number // 2}", marker="o", markersize=3, label=name)
    axes.set_xlabel("turned by (degrees)")
    axes.set_ylabel("cosine")
    axes.legend(fontsize="small", frameon=False)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _draw_angles(read: dict[str, Tensor], path: Path) -> None:
    figure = make_figure((3.4 * len(read), 3.4))
    low, high = LIMITS["angle"]
    for axes, (name, found) in zip(figure.subplots(1, len(read), squeeze=False)[0], read.items(), strict=True):
        axes.plot([low, high], [low, high], color="grey", linewidth=1)
        for row in found:
            axes.plot(ANGLES, row.tolist(), ".", alpha=0.7)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("true angle (degrees)")
        axes.set_ylabel("read off the features")
        axes.set_xlim(low - 4, high + 4)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
