"""Pictures of a pretraining run: loss curves and a grid of images. R2 charts are ``hf_equissl.evaluation.plot_r2``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["denormalize", "plot_image_grid", "plot_losses"]

DPI = 150
CELL_INCHES = 1.05


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels in [0, 1] of normalised images.

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
) -> Figure:
    """Curves of logged numbers over training steps, one panel per number and one line per run.

    Args:
        histories: Name of the run -> its ``log_history``, as in ``trainer_state.json``.
        panels: Key in the history, e.g. "loss_ssl" -> title of its panel. A run without the key has no line there.
        path: Where to save the figure; its suffix gives the format.

    Returns:
        The figure.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If no run has logged one of the keys.
    """
    figure = _new_figure((4.6 * len(panels), 3.4))
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (run, history) in enumerate(histories.items()):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=1.6, label=run)
        if not axes.lines:
            raise ValueError(f"No run has logged {key!r}. Logged are: {', '.join(_keys(histories))}.")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("training step")
        axes.margins(x=0.02)
        axes.legend(fontsize="small", frameon=False)
        _tidy(axes)
    return _saved(figure, path)


def plot_image_grid(
    groups: Mapping[str, Mapping[str, Tensor]],
    row_labels: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Images side by side, one row per sample.

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
    figure = _new_figure((CELL_INCHES * (len(columns) + 0.5), CELL_INCHES * count + 0.6))
    # wspace belongs to the outer grid: the columns of a group stay close together.
    outer = figure.subfigures(1, len(groups), width_ratios=[len(group) for group in groups.values()], wspace=0.02)
    for number, (part, (heading, group)) in enumerate(zip(_as_list(outer), groups.items(), strict=True)):
        part.suptitle(heading, fontsize="medium", fontweight="bold")
        grid = part.subplots(count, len(group), squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
        for column, (title, images) in enumerate(group.items()):
            grid[0][column].set_title(title, fontsize="small")
            for row in range(count):
                _show(grid[row][column], images[row])
        if number == 0 and row_labels is not None:
            for row, text in enumerate(row_labels):
                grid[row][0].set_ylabel(text, fontsize="small", rotation=0, ha="right", va="center")
    return _saved(figure, path)


def _new_figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'hf-equissl[plots]'.") from error
    return Figure(figsize=size, layout="constrained")


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure


def _show(axes: Any, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _as_list(parts: Any) -> list[Any]:
    return list(parts) if hasattr(parts, "__len__") else [parts]


def _keys(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    return sorted({key for history in histories.values() for entry in history for key in entry})
