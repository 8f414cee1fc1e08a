"""Pictures and tables of the documentation, made from the code that they show. Run it after a change of either.

python docs/draw.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))


RECIPES_HEAD = """\
# Recipes

All that ship, in `training/recipes/`. Each file names the source of its values and the command that runs it. The table
is made from the files by `python docs/draw.py`.

"""


def main() -> None:
    """Write every picture and table into the folder of this file."""
    (HERE / "recipes.md").write_text(list_recipes())
    (HERE / "results.md").write_text(fill_tables((HERE / "results.md").read_text()))
    (HERE / "pictures").mkdir(exist_ok=True)
    draw_paths(HERE / "pictures" / "paths.png")
    draw_house(HERE / "pictures" / "house.png")


def list_recipes() -> str:
    """Make a page with one row per shipped recipe: name, what it is, objectives and transformation."""
    from hf_equissl.recipes.overrides import read_recipe

    lines = ["| recipe | what it is | objectives | transformation |", "|---|---|---|---|"]
    for file in sorted((ROOT / "training/recipes").glob("*.yaml")):
        raw = yaml.safe_load(file.read_text())
        if "sweep" in raw:
            lines.append(f"| `{file.stem}` | {raw['description']} | sweep | |")
            continue
        values = read_recipe(file, [file.parent])
        objectives = values["objectives"]
        terms = [objectives["invariance"]["name"], *(term["name"] for term in objectives.get("equivariance") or [])]
        lines.append(f"| `{file.stem}` | {values['description']} | {' + '.join(terms)} | {_transformation(values)} |")
    return RECIPES_HEAD + "\n".join(lines) + "\n"


def _transformation(values: dict[str, Any]) -> str:
    chosen = values["views"].get("transformation")
    if not chosen:
        return ""
    return str(chosen["name"]) + "".join(f", {family['name']}" for family in chosen.get("families", ()))


PAIR = {  # encoder of the records -> its row
    "raw_pixels": "raw pixels",
    "untrained:cifar10_equissl/encoder": "untrained",
    "hf-equissl/equissl-cifar10-base": "λ = 0 (VICReg)",
    "hf-equissl/equissl-cifar10-reconstruction": "λ = 10, target all four",
}
FAMILIES = {"rotation": "rotation", "color_jitter": "colour", "gaussian_blur": "blur", "translation": "translation"}


def fill_tables(page: str) -> str:
    """Write the tables of stored records anew between their marks, ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    makers = {"pair": tabulate_pair, "systems": tabulate_systems}

    def table(match: re.Match[str]) -> str:
        made = makers[match[1]](HERE / "records" / match[1])
        return f"<!-- table: {match[1]} -->\n{made}<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def tabulate_systems(folder: Path) -> str:
    """Make the tables of training/compare.py from files of records, ``SYSTEM_seed-N.json``, in the sweep's order."""
    from hf_equissl.evaluation import comparison, load_records

    sweep = yaml.safe_load((ROOT / f"training/recipes/cifar10_{folder.name}.yaml").read_text())["sweep"]
    rows = ["raw_pixels", "untrained", *(grid["name"].partition("_seed-")[0] for grid in sweep)]
    measured = []
    for file in sorted(folder.glob("*.json")):
        system, _, seed = file.stem.partition("_seed-")
        measured.append(comparison.Measured(system, int(seed or 0), load_records(file)))
    return comparison.comparison_text(comparison.merge_systems(measured), rows)


def tabulate_pair(folder: Path) -> str:
    """Make a table of R2 by MLP, linear probe and linear probe on 100 pairs, and of accuracies, backbone features."""
    from hf_equissl.evaluation import load_records

    files = [*(ROOT / "model_cards").glob("equissl-cifar10-*/results.json"), *folder.glob("*")]
    records = [record for file in sorted(files) for record in load_records(file)]
    values = {
        (
            r.encoder,
            r.evaluator if r.task == "classification" else r.task,
            r.metric,
            r.protocol.get("family", {}).get("fill"),
        ): r.value
        for r in records
        if r.features == "backbone" or r.encoder == "raw_pixels"
    }
    edged = ("rotation", "translation")  # what fills the image counts for these alone
    columns: list[tuple[str, str | None]] = [(family, "reflect" if family in edged else None) for family in FAMILIES]
    columns += [(family, "zeros") for family in edged]
    heads = [FAMILIES[family] + (f", {fill}" if fill else "") for family, fill in columns]
    lines = [f"| | {' | '.join(heads)} | linear % | kNN % |", "|---" * (len(heads) + 3) + "|"]
    for encoder, row in PAIR.items():
        cells = []
        for family, fill in columns:
            found = [values.get((encoder, family, metric, fill)) for metric in ("r2", "r2_linear", "r2_few_shot")]
            cells.append(" / ".join("" if value is None else f"{value:.3f}" for value in found))
        for task in ("linear", "knn"):
            value = values.get((encoder, task, "top1", None))
            cells.append("" if value is None else f"{100 * value:.1f}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def photograph(side: int = 160) -> torch.Tensor:
    """Load scikit-image's cat as (1, 3, side, side) in [0, 1]."""
    from skimage import data

    image = Image.fromarray(data.chelsea()).crop((75, 0, 375, 300)).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def draw_paths(path: Path) -> None:
    """Draw the images between u and g(u) for four families: what the decoders have to paint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from hf_equissl.views import ColorJitterFamily, GaussianBlurFamily, RotationFamily, TranslationFamily

    rows = {
        "rotation, 36°": (RotationFamily(), [36.0]),
        "colour jitter": (ColorJitterFamily(), [0.3, -0.2, 0.3, 0.08]),
        "blur, sigma 2": (GaussianBlurFamily(), [2.0]),
        "translation": (TranslationFamily(max_shift=10), [10.0, -8.0]),
    }
    titles = ("u", "1/3 of the way", "2/3 of the way", "view 2 = g(u)")
    figure, axes = pyplot.subplots(len(rows), 4, figsize=(7, 7.2))
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=10)
    for row, (name, (family, parameters)) in zip(axes, rows.items(), strict=True):
        images = family.path(photograph(), torch.tensor([parameters]), torch.tensor([0, 1 / 3, 2 / 3, 1]))[0]
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_house(path: Path) -> None:
    """Draw the rooms on their floors; whoever stands higher may import what stands lower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from tests.test_architecture import FLOORS

    figure, axis = pyplot.subplots(figsize=(7, 4.6))
    for level, rooms in enumerate(FLOORS):
        for place, room in enumerate(rooms):
            x = (place + 0.5) / len(rooms)
            axis.text(
                x, level, room, ha="center", va="center", fontsize=10, family="monospace",
                bbox={"boxstyle": "round,pad=0.35", "facecolor": "#e8eef7", "edgecolor": "#4a6fa5"},
            )  # fmt: skip
    axis.annotate("", xy=(-0.03, -0.3), xytext=(-0.03, len(FLOORS) - 0.7), arrowprops={"arrowstyle": "->"})
    axis.text(-0.05, (len(FLOORS) - 1) / 2, "may import", rotation=90, ha="right", va="center", fontsize=9)
    axis.set_xlim(-0.1, 1.02)
    axis.set_ylim(-0.6, len(FLOORS) - 0.4)
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
