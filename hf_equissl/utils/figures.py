"""Pictures of a pretraining run: loss curves and a grid of images. R2 charts are ``hf_equissl.evaluation.plot_r2``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["denormalize", "picture_sheet", "plot_image_grid", "plot_losses"]

DPI = 150
# Sizes in the grid of images, in inches: an image with the gap behind it, and the margins.
CELL_INCHES = 1.1
GAP_INCHES = 0.06
GROUP_GAP_INCHES = 0.16
LABEL_INCHES = 0.55
HEADING_INCHES = 0.52
# Of a sheet of pictures, in pixels; images smaller than a cell are enlarged by whole factors.
SMALLEST_CELL, HEADING, GAP = 96, 14, 2
# Small images are enlarged smoothly, so that one sees the picture and not its pixels.
INTERPOLATION = "bicubic"


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn normalised images back into pixels in [0, 1].

    Args:
        images: (..., C, H, W), normalised with ``mean`` and ``std``.
        mean: C numbers.
        std: C numbers.

    Returns:
        (..., C, H, W), float32 on the CPU.
    """
    shift, scale = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))
    return (images.detach().cpu().float() * scale + shift).clamp(0, 1)


def plot_losses(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    panels: Mapping[str, str],
    path: str | os.PathLike[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Draw logged numbers over training steps, one panel per number and one line per run.

    Args:
        histories: Name of the run -> its ``log_history``, as in ``trainer_state.json``.
        panels: Key in the history, e.g. "loss_ssl" -> title of its panel. A run without the key has no line there.
        path: Where to save the figure; its suffix gives the format.
        columns: Panels side by side; default: all of them.

    Returns:
        The figure.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If no run has logged one of the keys.
    """
    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    figure = make_figure((4.6 * columns, 3.4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, title) in zip(grid, panels.items(), strict=False):
        for number, (run, history) in enumerate(histories.items()):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                marker = "o" if len(points) == 1 else None  # one point makes no line
                axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=1.6, label=run, marker=marker)
        if not axes.lines:
            raise ValueError(f"No run has logged {key!r}. Logged are: {', '.join(_keys(histories))}.")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("training step")
        axes.margins(x=0.02)
        axes.legend(fontsize="small", frameon=False)
        _tidy(axes)
    return save_figure(figure, path)


def plot_image_grid(
    groups: Mapping[str, Mapping[str, Tensor]],
    row_labels: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw images side by side, one row per sample.

    Args:
        groups: Heading of a group -> title of a column -> images (B, 3, H, W) in [0, 1]. Groups stand apart.
        row_labels: B texts left of the rows.
        path: Where to save the figure; its suffix gives the format.

    Returns:
        The figure.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If there are no images, or columns differ in their number of images.
    """
    columns = [images for group in groups.values() for images in group.values()]
    rows = {len(images) for images in columns}
    if len(rows) != 1 or rows == {0}:
        raise ValueError(f"Every column needs the same number of images, at least one; got {sorted(rows)}.")
    count = rows.pop()
    left = LABEL_INCHES if row_labels is not None else GAP_INCHES
    width = left + len(columns) * CELL_INCHES + (len(groups) - 1) * GROUP_GAP_INCHES + GAP_INCHES
    height = HEADING_INCHES + count * CELL_INCHES + GAP_INCHES
    figure = make_figure((width, height), layout="none")
    for heading, group in groups.items():
        middle = left + (len(group) * CELL_INCHES - GAP_INCHES) / 2
        figure.text(middle / width, 1 - 0.16 / height, heading, ha="center", va="center", weight="bold", size="medium")
        for title, images in group.items():
            for row, image in enumerate(images):
                bottom = height - HEADING_INCHES - (row + 1) * CELL_INCHES + GAP_INCHES
                side = CELL_INCHES - GAP_INCHES
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                axes.imshow(image.permute(1, 2, 0).numpy(), interpolation=INTERPOLATION)
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(title, fontsize="small", pad=4)
                if row_labels is not None and images is columns[0]:
                    axes.text(
                        -0.08, 0.5, row_labels[row], transform=axes.transAxes, ha="right", va="center", size="small"
                    )
            left += CELL_INCHES
        left += GROUP_GAP_INCHES
    return save_figure(figure, path)


def picture_sheet(columns: Sequence[tuple[str, Tensor]], rows: int) -> Image.Image:
    """Lay out images in a grid, one row per sample; needs Pillow alone, and milliseconds.

    Args:
        columns: Title and images (B, 3, H, W) in [0, 1] of each.
        rows: Samples to show, at most; the first ones.
    """
    rows = min(rows, *(len(images) for _, images in columns))
    cell = max(images.shape[-1] for _, images in columns)
    cell *= max(1, -(-SMALLEST_CELL // cell))
    sheet = Image.new("RGB", (len(columns) * (cell + GAP), HEADING + rows * (cell + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns):
        pen.text((column * (cell + GAP) + 2, 1), title, fill="black")
        for row in range(rows):
            pixels = images[row].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
            tile = Image.fromarray(pixels.numpy()).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * (cell + GAP), HEADING + row * (cell + GAP)))
    return sheet


def make_figure(size: tuple[float, float], layout: str = "constrained") -> Any:
    """Make an empty figure of so many inches.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'hf-equissl[plots]'.") from error
    return Figure(figsize=size, layout=layout)  # type: ignore[arg-type]


def save_figure(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """Write a figure to ``path``, whose suffix gives the format, if there is one; returns the figure."""
    if path is not None:
        with replacing(Path(path)) as staging:
            figure.savefig(staging, dpi=DPI)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _keys(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    return sorted({key for history in histories.values() for entry in history for key in entry})
