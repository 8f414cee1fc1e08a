"""Parameter regression: tell the parameters of g from both views, the baseline that is told all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..views.needs import Needs
from .base import Features, LossOutput, Objective
from .heads import warn_unless_g_is_all

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views
    from ..views.facts import ViewFacts

__all__ = ["ParameterRegressionObjective"]


class ParameterRegressionObjective(Objective):
    r"""Regress the parameters of the transformation g from the invariant part of both views' CLS representations.

    .. math::
        L = \frac{1}{B p} \sum_{b=1}^{B} \left\| \phi([h_1 ; h_2])_b - \theta_b \right\|^2

    The supervised row of the experiment with unknown transformations in "Equivariant Representation Learning for
    Augmentation-based Self-Supervised Learning via Image Reconstruction" (https://arxiv.org/abs/2412.03314), which says
    no more of it: it is trained by nothing but the parameters, of those images that have them. The head is that of the
    usual probe (facebookresearch/SIE), here with the encoder behind it.

    h_1 and h_2 (B, D) are CLS rows of the first and the last global crop, of which the stem takes d_inv dimensions;
    theta (B, p) are g's parameters scaled to about [-1, 1], phi is an MLP with ReLU. Nothing is exchanged between
    processes. As with SIE, theta is all that leads from view 1 to view 2 only with the pipeline ``center``.

    Args:
        config: The encoder's configuration.
        facts: The parameters of g.
        hidden_sizes: Widths of the hidden layers of phi.

    Logs:
        ``loss_parameters``: the loss; ``parameter_std``: root mean square deviation of theta from its mean in the
        batch, whose square a guess of the mean would lose.

    Raises:
        ValueError: There are no parameters of g; in ``forward``, the views carry none, or fewer than two global crops.
    """

    purpose: ClassVar[str] = (
        "The regression asks the features of two views to tell the parameters of the transformation between them, "
        "which it is told in training."
    )
    citation: ClassVar[str] = """@article{wang2024equivariant,
  title   = {Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via Image
             Reconstruction},
  author  = {Wang, Qin and Krajsek, Kai and Scharr, Hanno},
  journal = {arXiv preprint arXiv:2412.03314},
  year    = {2024},
  url     = {https://arxiv.org/abs/2412.03314}
}"""

    def __init__(self, config: EquiSSLConfig, facts: ViewFacts, hidden_sizes: Sequence[int] = (1024, 1024)) -> None:
        super().__init__(config)
        if not facts.parameter_names:
            raise ValueError(
                "The regression learns the parameters of g, and there are none. Name a transformation that has "
                "parameters, for example views.transformation: {name: rotation}."
            )
        warn_unless_g_is_all("The regression", facts)
        sizes = (2 * (config.invariant_size or config.hidden_size), *hidden_sizes)
        layers = [layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
        self.regressor = nn.Sequential(*layers, nn.Linear(sizes[-1], len(facts.parameter_names)))

    @property
    def needs(self) -> Needs:
        """Ask for the parameters of g, which are learnt."""
        return Needs(parameters=True)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the mean squared error of the parameters; ``teacher`` and pixels are not used."""
        if len(student.tokens) < 2:
            raise ValueError(f"The regression needs two global crops, v1 and v2 = g(u), got {len(student.tokens)}.")
        theta = views.normalized_parameters
        if theta is None:
            raise ValueError(
                "The views carry no parameters of g. Build the view pipeline with this objective's `needs` and a "
                "transformation family."
            )
        # Rows of images that join the usual ones (``Features.cls``) have no parameters.
        h = student.invariant(torch.stack([student.tokens[0, :, 0], student.tokens[-1, :, 0]], dim=1))  # (B, 2, d_inv)
        predicted = self.regressor(h.flatten(1)).float()
        with torch.autocast(theta.device.type, enabled=False):
            loss = F.mse_loss(predicted, theta)
        spread = (theta - theta.mean(dim=0)).square().mean().sqrt()
        return LossOutput(loss, {"loss_parameters": loss.detach(), "parameter_std": spread})
