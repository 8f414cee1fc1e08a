"""Pairs of patches that a known homography leads between, and how far estimated corners are from the true ones.

Points are (x, y) in pixels of the patch: (0, 0) is its upper left corner, (S, S) its lower right one, and the middle of
the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# Width and height that images are resized to, whatever their own shape, before patches are cut.
FRAME = (320, 240)


def patch_corners(side: float) -> np.ndarray:
    """Return the corners (4, 2) of a patch: upper left, upper right, lower right, lower left."""
    return np.array([(0, 0), (side, 0), (side, side), (0, side)], dtype=np.float64)


def fit_homography(points: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Fit the homographies that lead from points to others, by least squares; exact for four points.

    The equations are linear in the eight unknowns (the ninth is 1): ``x' (g x + h y + 1) = a x + b y + c``, and the
    same for y (Hartley and Zisserman, Multiple View Geometry, section 4.1, inhomogeneous form). Coordinates are scaled
    by their size first, so that the equations are well conditioned.

    Args:
        points: (N, 2), no three of four in line.
        moved: (B, N, 2).

    Returns:
        (B, 3, 3) float64, whose last entry is 1.
    """
    centre = points.mean(0)
    scale = np.abs(points - centre).max()
    to_unit = np.array([[1, 0, -centre[0]], [0, 1, -centre[1]], [0, 0, scale]]) / scale
    from_unit = np.linalg.inv(to_unit)
    x, y = ((points - centre) / scale).T
    found = np.empty((len(moved), 3, 3))
    for number, target in enumerate((np.asarray(moved, np.float64) - centre) / scale):
        u, v = target.T
        one, nothing = np.ones_like(x), np.zeros_like(x)
        rows = np.concatenate(
            [
                np.stack([x, y, one, nothing, nothing, nothing, -u * x, -u * y], axis=1),
                np.stack([nothing, nothing, nothing, x, y, one, -v * x, -v * y], axis=1),
            ]
        )
        unknowns = np.linalg.lstsq(rows, np.concatenate([u, v]), rcond=None)[0]
        found[number] = from_unit @ np.append(unknowns, 1).reshape(3, 3) @ to_unit
    return found / found[:, 2:, 2:]


def project(homographies: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Move points (N, 2) by homographies (B, 3, 3): (B, N, 2)."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    moved = homogeneous @ homographies.transpose(0, 2, 1)
    return moved[..., :2] / moved[..., 2:]


def mean_corner_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Compute the mean distance of corners from where they should be (MCE), in pixels: (B, 4, 2), (B, 4, 2).

    Raises:
        ValueError: the shapes differ or are others, or there are no pairs.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if predicted.shape != true.shape or true.shape[1:] != (4, 2) or not len(true):
        raise ValueError(f"Corners must both be (B, 4, 2) with B > 0, got {predicted.shape} and {true.shape}.")
    return float(np.linalg.norm(predicted - true, axis=-1).mean())


def is_convex(corners: np.ndarray) -> bool:
    """Whether a quadrilateral (4, 2), its corners clockwise as in ``patch_corners``, turns right at each of them."""
    sides = np.roll(corners, -1, axis=0) - corners
    following = np.roll(sides, -1, axis=0)
    return bool((sides[:, 0] * following[:, 1] - sides[:, 1] * following[:, 0] > 0).all())


def make_pair(
    frame: Image.Image, side: int, rho: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image, np.ndarray]:
    """Cut a patch out of an image, and the patch at the same place of the image after a random homography.

    As in "Deep Image Homography Estimation" (https://arxiv.org/abs/1606.03798), with the directions of "Rethinking
    Planar Homography Estimation Using Perspective Fields": the patch lies at least ``rho`` pixels from the border, its
    corners move by whole pixels, each coordinate uniformly in [-rho, rho], the homography H takes corners to moved
    corners, and the second patch shows at p what the image shows at H p. So no pixel comes from outside the image.
    Offsets are drawn again until the moved corners make a convex quadrilateral: of others a homography folds the patch.

    Args:
        frame: Image of more than ``side + 2 rho`` pixels in both directions.
        side: Side of the patches in pixels, more than ``2 rho``: then no corner passes another in x or y.
        rho: Largest movement of a corner in each direction.
        rng: Where everything is drawn from: left, top, then the offsets, perhaps several times.

    Returns:
        Both patches, and the offsets (4, 2) of the corners of ``patch_corners``, in pixels.
    """
    left, top = (int(rng.integers(rho, length - rho - side, endpoint=True)) for length in frame.size)
    corners = patch_corners(side)
    while True:
        offsets = rng.integers(-rho, rho, (4, 2), endpoint=True).astype(np.float64)
        if is_convex(corners + offsets):
            break
    homography = fit_homography(corners, (corners + offsets)[None])[0]
    in_frame = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]]) @ homography
    second = frame.transform(
        (side, side),
        Image.Transform.PERSPECTIVE,
        tuple((in_frame / in_frame[2, 2]).ravel()[:8].tolist()),
        Image.Resampling.BILINEAR,
    )
    return frame.crop((left, top, left + side, top + side)), second, offsets
