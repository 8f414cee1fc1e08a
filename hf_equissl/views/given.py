"""A transformation that is in the data already: pairs of images with the numbers that lead from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .base import TransformationFamily
from .uniform import check_range, scale_to_unit


class GivenFamily(TransformationFamily):
    """The transformation between the images that a data set gives as one item, such as two renders of an object.

    Nothing is drawn and nothing is applied: parameters come with the item (``Item.parameters``), in its own units.

    Args:
        parameters: Which of those that the data has, by name: numbers of a column are called like it, or
            ``<column>_0``, ``<column>_1`` ... where it holds several; those of 3DIEBench ``rotation_x``,
            ``rotation_y``, ``rotation_z``, ``rotation_w``, ``floor_hue``, ``light_theta``, ``light_phi`` and
            ``light_hue``.
        ranges: (smallest, largest) of each, for targets; ``None``: they lie in [-1, 1] already, as a unit quaternion.

    Parameters (B, p): those of the data.

    Raises:
        ValueError: No parameters, or another number of ranges; and when it is asked to draw or to transform.
    """

    num_draws = 0
    continuous = False
    from_data: ClassVar[bool] = True

    def __init__(self, parameters: Sequence[str], ranges: Sequence[tuple[float, float]] | None = None) -> None:
        self.parameters = self.parameter_names = tuple(parameters)  # the first for descriptions, as an argument
        if not self.parameter_names or (ranges is not None and len(ranges) != len(self.parameter_names)):
            raise ValueError(
                f"parameters are {list(parameters)} and ranges {ranges}: expected names, and one range for each."
            )
        pairs = ranges or [(-1.0, 1.0)] * len(self.parameter_names)
        self.ranges = tuple(check_range("ranges", pair, low=float("-inf")) for pair in pairs)

    def sample(self, draws: Tensor) -> Tensor:
        """Refuse: these parameters are not drawn."""
        raise ValueError("The parameters of a given transformation come with the data; there is nothing to draw.")

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Refuse: the images are transformed already."""
        raise ValueError("A given transformation is in the data; it cannot be applied to an image.")

    def targets(self, parameters: Tensor) -> Tensor:
        """Scale the range of each of the parameters (B, p) to [-1, 1]."""
        return scale_to_unit(parameters, self.ranges)
