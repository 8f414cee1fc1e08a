"""Renders a small data set in the layout of 3DIEBench: ``python -m tests.data.render_objects FOLDER``.

An object is a box whose six faces have colours of their own, so that every rotation shows; its class is its shape. The
angles turn it about fixed axes, the hues colour floor and light, and the two angles of the light shade its faces.
"""

from __future__ import annotations

import colorsys
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial.transform import Rotation

# Half the sides of the boxes of each class.
SHAPES = ((0.5, 0.5, 0.5), (0.8, 0.35, 0.35), (0.65, 0.65, 0.2))
LOW = np.array([-np.pi / 2] * 3 + [0.0] * 4)
HIGH = np.array([np.pi / 2] * 3 + [1.0, np.pi / 4, 2 * np.pi, 1.0])
# Corners of a cube, and the corners of each face, in a circle.
CORNERS = np.array(list(product((-1.0, 1.0), repeat=3)))
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))


def render(shape: tuple[float, ...], colors: np.ndarray, latents: np.ndarray, size: int) -> Image.Image:
    """One picture of a box.

    Args:
        shape: Half its sides.
        colors: (6, 3), of the faces, in [0, 1].
        latents: (7,), as a latent file holds them.
        size: Side of the picture.
    """
    turned = Rotation.from_euler("xyz", latents[:3]).apply(CORNERS * shape)
    floor = colorsys.hsv_to_rgb(latents[3], 0.5, 0.6)
    light = np.array(colorsys.hsv_to_rgb(latents[6], 0.6, 1.0))
    theta, phi = latents[4:6]
    direction = np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
    picture = Image.new("RGB", (size, size), tuple(round(255 * value) for value in floor))
    draw = ImageDraw.Draw(picture)
    for number in sorted(range(6), key=lambda face: turned[list(FACES[face])][:, 2].mean()):  # the farthest first
        corners = turned[list(FACES[number])]
        middle = corners.mean(axis=0)
        brightness = 0.4 + 0.6 * max(0.0, float(middle @ direction) / float(np.linalg.norm(middle)))
        places = [(size * (0.5 + 0.4 * x), size * (0.5 - 0.4 * y)) for x, y, _ in corners]
        draw.polygon(places, fill=tuple(int(255 * value) for value in brightness * colors[number] * light))
    return picture


def render_objects(
    folder: Path, objects: dict[str, int] | None = None, views: int = 4, size: int = 48, seed: int = 0
) -> Path:
    """Write the data set.

    Args:
        folder: It appears here.
        objects: Word of the split -> its number of objects; by default {"train": 9, "val": 3}.
        views: Renders of each object.
        size: Side of the pictures.
        seed: Of objects and latents.
    """
    rng = np.random.default_rng(seed)
    for split, count in (objects or {"train": 9, "val": 3}).items():
        labels = np.arange(count) % len(SHAPES)
        names = [f"/{label:08d}/{split}-{number:04d}/" for number, label in enumerate(labels)]
        for name, label in zip(names, labels, strict=True):
            place = folder / name.strip("/")
            place.mkdir(parents=True)
            colors = rng.uniform(0.2, 1.0, (6, 3))
            for view in range(views):
                latents = rng.uniform(LOW, HIGH)
                np.save(place / f"latent_{view}.npy", latents)
                render(SHAPES[label], colors, latents, size).save(place / f"image_{view}.jpg", quality=95)
        np.save(folder / f"{split}_images.npy", np.array(names))
        np.save(folder / f"{split}_labels.npy", labels.astype(np.int64))
    return folder


if __name__ == "__main__":
    render_objects(Path(sys.argv[1]), {"train": 2000, "val": 400}, views=50)
