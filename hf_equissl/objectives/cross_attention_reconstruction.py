"""Cross-attention reconstruction: rebuild one view from the features of both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..modeling import build_decoder
from .base import Features, LossOutput, Objective
from .reconstruction import decoder_config, image_errors, name_pictures, outer_patches

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views

__all__ = ["CrossAttentionReconstructionObjective"]


class CrossAttentionReconstructionObjective(Objective):
    r"""Reconstruct the second view v2 by attending from the equivariant part of v1 to that of v2.

    .. math::
        L = \mathrm{MSE}\left( D(q = e_1,\, kv = e_2),\, v_2 \right)

    "Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via Image Reconstruction"
    (https://arxiv.org/abs/2412.03314): one cross-attention layer and L self-attention layers blend two views, one of
    which is reconstructed. No code of the authors is public; which view asks and which is rebuilt, L and the widths
    are choices made here. The query holds content and positions of v1, so whatever is special to v2, i.e. the
    transformation, has to pass through the equivariant features of v2.

    e_1, e_2 (B, N, d_equi) are the last d_equi dimensions of the stem's output for the patch rows of the first and
    the last global crop. The target is a view, so there are no intermediate images, and g need not be continuous.

    Args:
        config: The encoder's configuration, with ``feature_size`` and ``equivariant_size``.
        decoder_num_layers: L, self-attention blocks after the cross-attention.
        decoder_hidden_size: Width of the decoder.
        decoder_num_heads: Attention heads; ``None`` keeps that of ``config``.
        symmetric: Also reconstruct v1 with the roles exchanged, and average both errors.

    Attributes:
        decoder: The decoder.
        decoder_config: ``config`` with the decoder's fields.

    Logs:
        ``loss_cross_recon``: the loss; ``mse_view_2`` (and ``mse_view_1``): its parts before averaging.

    Raises:
        ValueError: Without an equivariant part; in ``forward``, with fewer than two global crops.
    """

    purpose: ClassVar[str] = (
        "The reconstruction by cross-attention asks the features to keep how an image is transformed, beside what it "
        "shows; the parameters of the transformation are never shown to the network."
    )
    citation: ClassVar[str] = """@article{wang2024equivariant,
  title   = {Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via Image
             Reconstruction},
  author  = {Wang, Qin and Krajsek, Kai and Scharr, Hanno},
  journal = {arXiv preprint arXiv:2412.03314},
  year    = {2024},
  url     = {https://arxiv.org/abs/2412.03314}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        decoder_num_layers: int = 4,
        decoder_hidden_size: int = 256,
        decoder_num_heads: int | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__(config)
        self.symmetric = symmetric
        self.decoder_config = decoder_config(
            config,
            decoder_type="cross_attention",
            decoder_num_layers=decoder_num_layers,
            decoder_hidden_size=decoder_hidden_size,
            **({} if decoder_num_heads is None else {"decoder_num_heads": decoder_num_heads}),
        )
        self.decoder = build_decoder(self.decoder_config)

    def reconstruct(self, student: Features, views: Views) -> Tensor:
        """Predict views, normalised: v2 as (B, 1, C, H, W), or v2 and v1 as (B, 2, C, H, W) if ``symmetric``."""
        first, last = (student.equivariant(patches) for patches in outer_patches(student))
        if not self.symmetric:
            return self.decoder(first, last, student.grid)
        both = self.decoder(torch.cat([first, last]), torch.cat([last, first]), student.grid)  # (2B, 1, C, H, W)
        return torch.cat(both.chunk(2), dim=1)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the mean squared error of the reconstructed view or views; ``teacher`` is not used."""
        crops = views.global_crops
        targets = [crops[-1], crops[0]] if self.symmetric else [crops[-1]]
        painted = self.reconstruct(student, views)
        errors = image_errors(painted, targets)  # (1,) or (2,)
        loss = errors.mean()
        logs = {"loss_cross_recon": loss.detach(), "mse_view_2": errors[0].detach()}
        if self.symmetric:
            logs["mse_view_1"] = errors[1].detach()
        pictures = partial(name_pictures, ["view 2", "view 1"], targets, painted)
        return LossOutput(loss=loss, logs=logs, pictures=pictures)
