"""Gaussian blur."""

from __future__ import annotations

from torch import Tensor

from .photometric import gaussian_blur_path
from .uniform import UniformFamily, at_fractions, check_range


class GaussianBlurFamily(UniformFamily):
    """Blur with a Gaussian of standard deviation sigma.

    Default range of Table 1 of the EquiSSL paper (arXiv 2503.18753): sigma in [0.1, 2]. Identity is sigma = 0, so at
    fraction t sigma is t * sigma, which may lie below the range; below 0.05 the image is returned as it is. The kernel
    is separable and 13 long, three sigma on each side at sigma = 2; edges are reflected.

    Args:
        min_sigma: Sigma is uniform in [min_sigma, max_sigma], in pixels of the image at hand.
        max_sigma: The upper end of that range.
        kernel_size: Odd length of the kernel; images must be larger than half of it.

    Parameters (B, 1): ``sigma`` in pixels.
    """

    parameter_names = ("sigma",)
    num_draws = 1

    def __init__(self, min_sigma: float = 0.1, max_sigma: float = 2.0, kernel_size: int = 13) -> None:
        self.min_sigma, self.max_sigma = check_range("(min_sigma, max_sigma)", (min_sigma, max_sigma), low=0)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size!r}: expected an odd whole number of at least 1, such as 13.")
        self.kernel_size = kernel_size
        super().__init__([(self.min_sigma, self.max_sigma)])

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Blur images (B, C, H, W) by parameters (B, 1) at fractions (F,) -> (B, F, C, H, W)."""
        return gaussian_blur_path(images, at_fractions(parameters, fractions)[..., 0], self.kernel_size)
