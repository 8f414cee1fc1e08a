"""EquiSSL: reconstruct images on the way from one view to its transformed version."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling import EquiSSLConvDecoder, EquiSSLStem, build_decoder
from ..views.needs import Needs
from .base import Features, LossOutput, Objective

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views

__all__ = ["ReconstructionObjective", "decoder_config", "image_errors", "outer_patches"]


class ReconstructionObjective(Objective):
    r"""Reconstruct the intermediate images between u and v2 = g(u) from the equivariant parts of v1 and v2.

    .. math::
        L = \frac{1}{K} \sum_{k=1}^{K} \mathrm{MSE}\left( D_k([e_1 ; e_2]),\, u_k \right),
        \quad u_k = g_{k \theta / (K+1)}(u)

    L_recon of "Self-Supervised Learning based on Transformed Image Reconstruction for Equivariance-Coherent Feature
    Representation" (https://arxiv.org/abs/2503.18753; theta_k is spelled out in its second version). The
    transformation's parameters theta are never given to the network: to place u_k it must read them off the features.
    No code of the authors is public. Left open by the paper and chosen here: the student's features of both views
    (masked, where the base method masks), MSE as the mean over B, C, H and W of normalised pixels in fp32, no mask for
    the pixels that g fills, and the widths of the decoders.

    e_1, e_2 (B, N, d_equi) are the last d_equi dimensions of the stem's output for the patch rows of the first and
    the last global crop; K independent decoders, each a linear layer and convolutions, predict (B, C, H, W).

    Args:
        config: The encoder's configuration, with ``feature_size`` and ``equivariant_size``.
        num_intermediate_images: K.
        reconstruct_final: A further decoder whose target is v2 itself ("2+final" in the paper's Table 7).
        decoder_widths: Channels of the decoders; ``None`` keeps those of ``config``.

    Attributes:
        decoder: The K (+ 1) decoders.
        decoder_config: ``config`` with the decoders' fields.

    Logs:
        ``loss_recon``: the loss; ``mse_1`` ... ``mse_K`` (and ``mse_final``): its parts before averaging.

    Raises:
        ValueError: Without an equivariant part or K < 1; in ``forward``, if targets are absent or do not fit.
    """

    purpose: ClassVar[str] = (
        "The reconstruction asks the features to keep how an image is transformed, beside what it shows; the "
        "parameters of the transformation are never shown to the network."
    )
    citation: ClassVar[str] = """@inproceedings{wang2026equissl,
  title     = {Self-Supervised Learning Based on Transformed Image Reconstruction for Equivariance-Coherent Feature
               Representation},
  author    = {Wang, Qin and Bruns, Benjamin and Scharr, Hanno and Krajsek, Kai},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2026},
  doi       = {10.1609/aaai.v40i31.39849},
  url       = {https://arxiv.org/abs/2503.18753}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        num_intermediate_images: int = 2,
        reconstruct_final: bool = False,
        decoder_widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(config)
        if num_intermediate_images < 1:
            raise ValueError(
                f"`num_intermediate_images` is {num_intermediate_images}, expected at least 1. To train without "
                "reconstruction, leave this objective out of the recipe or give it weight 0."
            )
        self.num_intermediate_images = num_intermediate_images
        self.reconstruct_final = reconstruct_final
        self.decoder_config = decoder_config(
            config,
            decoder_type="conv",
            num_intermediate_images=num_intermediate_images,
            decoder_reconstructs_final=reconstruct_final,
            **({} if decoder_widths is None else {"decoder_widths": list(decoder_widths)}),
        )
        self.decoder = cast(EquiSSLConvDecoder, build_decoder(self.decoder_config))

    @property
    def needs(self) -> Needs:
        """Ask for the images at fractions k / (K + 1) of g."""
        steps = self.num_intermediate_images + 1
        return Needs(fractions=tuple(k / steps for k in range(1, steps)))

    def reconstruct(self, student: Features, views: Views) -> Tensor:
        """Predict images, (B, K, C, H, W), or (B, K + 1, C, H, W) with ``reconstruct_final``, normalised."""
        first, last = outer_patches(student)  # (B, N, D)
        stem = student.stem
        if isinstance(stem, EquiSSLStem) and stem.is_fold_cheaper(
            first[..., 0].numel(), self.decoder.projection.out_features, "equivariant"
        ):
            return self.decoder.paint(self.decoder.project_tokens(first, last, stem), student.grid)
        return self.decoder(student.equivariant(first), student.equivariant(last), student.grid)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the mean squared error of the reconstructions; ``teacher`` is not used."""
        targets = self._targets(views)
        painted = self.reconstruct(student, views)
        errors = image_errors(painted, targets)  # (K,) or (K + 1,)
        loss = errors.mean()
        names = [f"mse_{k}" for k in range(1, self.num_intermediate_images + 1)]
        names += ["mse_final"] if self.reconstruct_final else []
        logs = dict(zip(names, errors.detach().unbind(), strict=True))
        steps = [f"{k}/{self.num_intermediate_images + 1} g" for k in range(1, self.num_intermediate_images + 2)]
        steps[-1] = "g"
        pictures = partial(name_pictures, steps, targets, painted)
        return LossOutput(loss=loss, logs={"loss_recon": loss.detach(), **logs}, pictures=pictures)

    def _targets(self, views: Views) -> list[Tensor]:
        """Return the K or K + 1 images to reconstruct, (B, C, H, W) each."""
        images = views.intermediate_images
        expected = self.num_intermediate_images
        if images is None or images.shape[1] != expected:
            raise ValueError(
                f"The views carry {0 if images is None else images.shape[1]} intermediate images per sample, expected "
                f"{expected}. Build the view pipeline with this objective's `needs` and a transformation family."
            )
        return [*images.unbind(dim=1), views.global_crops[-1]] if self.reconstruct_final else list(images.unbind(dim=1))


def name_pictures(names: Sequence[str], targets: Sequence[Tensor], painted: Tensor) -> dict[str, Tensor]:
    """Name what a loss compares for people: all targets, then what was painted, (B, K, C, H, W), in their order."""
    images = painted.detach().unbind(dim=1)
    goals = {f"target {name}": target.detach() for name, target in zip(names, targets, strict=False)}
    return {**goals, **{f"painted {name}": image for name, image in zip(names, images, strict=False)}}


def decoder_config(config: EquiSSLConfig, **fields: Any) -> EquiSSLConfig:
    """Copy an encoder's configuration, with a decoder's ``fields``.

    Raises:
        ValueError: If the encoder has no equivariant part.
    """
    if config.feature_size is None or not config.equivariant_size:
        raise ValueError(
            "Reconstruction reads the equivariant part of the features, and this encoder has none: `feature_size` is "
            f"{config.feature_size}, `equivariant_size` is {config.equivariant_size}. Set both in the recipe's model "
            "section, e.g. feature_size: 512 and equivariant_size: 256."
        )
    return type(config).from_dict({**config.to_dict(), **fields})


def outer_patches(student: Features) -> tuple[Tensor, Tensor]:
    """Take the patch rows of the first and the last global crop, (B, N, D) each: those of v1 and v2 = g(u).

    Raises:
        ValueError: With fewer than two global crops.
    """
    patches = student.patches  # (V, B, N, D)
    if len(patches) < 2:
        raise ValueError(f"Reconstruction needs at least two global crops, v1 and v2 = g(u), got {len(patches)}.")
    return patches[0], patches[-1]


def image_errors(predictions: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Compute the mean squared error of each of K images over batch, channels and pixels, in fp32.

    Args:
        predictions: (B, K, C, H, W), any floating dtype.
        targets: K tensors (B, C, H, W), without gradient.

    Returns:
        (K,).

    Raises:
        ValueError: If the shapes differ.
    """
    shapes = [tuple(target.shape) for target in targets]
    if shapes != [tuple(predictions[:, 0].shape)] * predictions.shape[1]:
        raise ValueError(
            f"Reconstructions have shape {tuple(predictions.shape)} (B, K, C, H, W), their targets {shapes}. "
            "The encoder's image_size, patch_size and num_channels must fit the view pipeline's crops."
        )
    # One image at a time: nothing is kept for backward but what exists already, and the fp32 form of bf16 predictions.
    pairs = zip(predictions.unbind(dim=1), targets, strict=True)
    return torch.stack([F.mse_loss(image.float(), target.detach().float()) for image, target in pairs])
