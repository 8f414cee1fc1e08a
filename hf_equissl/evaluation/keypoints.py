"""PCKh: the share of key points that are found within half a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["pckh"]


def pckh(
    predictions: np.ndarray,
    truth: np.ndarray,
    visible: np.ndarray,
    head_sizes: np.ndarray,
    threshold: float = 0.5,
    left_out: Sequence[int] = (),
) -> float:
    """Compute PCKh, MPII's measure (Andriluka et al., CVPR 2014, http://human-pose.mpi-inf.mpg.de).

    Args:
        predictions, truth: (N, K, 2), in pixels.
        visible: (N, K), not 0 where there is a true point; others do not count.
        head_sizes: (N,) in pixels; people of whom it is not known (not above 0) do not count.
        threshold: Distance, in head sizes, up to which a point is found.
        left_out: Key points that do not count.

    Returns:
        Found points over all that count, 0 to 1.

    Raises:
        ValueError: no point counts.
    """
    counted = np.asarray(visible) > 0
    counted &= (np.asarray(head_sizes) > 0)[:, None]
    counted[:, list(left_out)] = False
    if not counted.any():
        raise ValueError("No key point of people whose head size is known is visible: PCKh is undefined.")
    distances = np.linalg.norm(np.asarray(predictions, float) - np.asarray(truth, float), axis=2)
    found = distances <= threshold * np.asarray(head_sizes, float)[:, None]
    return float(found[counted].mean())
