"""SIE: predict view 2 from view 1 and the parameters of g, by a map that a hypernetwork makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed.collectives import gather, world_size
from ..views.needs import Needs
from .base import Features, LossOutput, Objective
from .heads import HyperPredictor, PredictorStart, Projector, warn_unless_g_is_all
from .vicreg import covariance_term, variance_term

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views
    from ..views.facts import ViewFacts

__all__ = ["SIEObjective"]


class SIEObjective(Objective):
    r"""Predict the equivariant embedding of view 2 from that of view 1 and the parameters of the transformation g.

    .. math::
        L = \alpha\, \mathrm{MSE}(\hat y, y) + \mu\, [v(X) + v(Y)] / 2 + \nu\, [c(X) + c(Y)] + \pi\, v(\hat y) / 2,
        \quad \hat y = M(\theta)\, x, \quad X = [x_{inv} ; x], \quad Y = [y_{inv} ; y]

    "Self-supervised learning of Split Invariant Equivariant representations" (https://arxiv.org/abs/2302.10283), with
    the constants of facebookresearch/SIE (``SIE`` in ``src/models.py``). x and y (B, d) are the equivariant part of the
    image's representation in view 1 and in the last view, behind a projector; M is a d x d matrix that a hypernetwork
    makes of theta; v is the hinge on standard deviations and c the sum of squared off-diagonal covariances, of VICReg,
    over the batch of all processes. Nothing is detached.

    x_inv and y_inv are what the invariance objective compares, where it tells (``Features.projections``): variance and
    covariance of the concatenation also keep the two parts from saying the same. The published loss is this term with
    weight 1 on VICReg as ``{name: vicreg, invariance_weight: 10, variance_weight: 0, covariance_weight: 0}``. Over an
    objective that tells nothing, both act on the equivariant part alone.

    On natural images theta are g's parameters scaled to about [-1, 1], as "Equivariant Representation Learning for
    Augmentation-based Self-Supervised Learning via Image Reconstruction" (https://arxiv.org/abs/2412.03314) trains SIE;
    with a ``joint`` family those of all ("SIE(all)"), with ``one_of`` those of one per image. Most are 0 where g
    changes nothing, and a hypernetwork without bias would then map every embedding to 0: the constant 1 is appended.
    Quaternions, which are never 0, need none. theta is all that leads from view 1 to view 2 only where nothing else
    differs between them: with the pipeline ``center``.

    Args:
        config: The encoder's configuration, with ``feature_size`` and ``equivariant_size``.
        facts: The parameters of g.
        prediction_weight: alpha.
        variance_weight: mu.
        covariance_weight: nu.
        prediction_variance_weight: pi, which keeps the predictor from collapse; 0 is the authors' "SIENoVar".
        expander_sizes: Layer widths of the projector: the authors' 2048s for half of the features.
        hypernetwork: "linear", or "deep" for two hidden layers as wide as its input.
        append_one: Whether the constant 1 is appended to theta.
        predictor_start: "authors" is theirs, whose predictions are sqrt(d) times as large as x: the features of a small
            ViT collapsed until the maps had shrunk. "random" has them about as large as x. With "identity" the matrix
            of the constant 1 starts as the identity, so that the predictor begins at "nothing changed". Adam moves a
            weight by about the learning rate per step, so that the other two need thousands of steps to get there,
            which the authors' 2,000 epochs have and a run of minutes has not.
        pooling: "cls" or "mean", which takes the mean of the patch tokens.

    Logs:
        ``loss_prediction``, ``loss_variance``, ``loss_covariance``, ``loss_prediction_variance``: weighted, they add up
        to the loss; ``projection_std``: mean standard deviation of x and y; ``mse_without_g``: MSE(x, y), what a
        predictor that ignores g would leave.

    Raises:
        ValueError: Without an equivariant part or parameters of g, for a negative weight or an unknown word; in
            ``forward``, with fewer than two global crops.
    """

    purpose: ClassVar[str] = (
        "SIE asks one part of the features to follow the transformation of an image as a linear map that is made from "
        "the transformation's parameters, which it is told."
    )
    citation: ClassVar[str] = """@inproceedings{garrido2023sie,
  title     = {Self-Supervised Learning of Split Invariant Equivariant Representations},
  author    = {Garrido, Quentin and Najman, Laurent and LeCun, Yann},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2302.10283}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        facts: ViewFacts,
        prediction_weight: float = 4.5,
        variance_weight: float = 10.0,
        covariance_weight: float = 1.0,
        prediction_variance_weight: float = 10.0,
        expander_sizes: Sequence[int] = (1024, 1024, 1024),
        hypernetwork: Literal["linear", "deep"] = "linear",
        append_one: bool = True,
        predictor_start: PredictorStart = "random",
        pooling: Literal["cls", "mean"] = "cls",
    ) -> None:
        super().__init__(config)
        _check(config, facts)
        weights = {
            "prediction_weight": prediction_weight,
            "variance_weight": variance_weight,
            "covariance_weight": covariance_weight,
            "prediction_variance_weight": prediction_variance_weight,
        }
        if min(weights.values()) < 0:
            raise ValueError(f"SIE's weights may not be negative, got {weights}.")
        for name, word, words in (
            ("hypernetwork", hypernetwork, ("linear", "deep")),
            ("predictor_start", predictor_start, get_args(PredictorStart)),
            ("pooling", pooling, ("cls", "mean")),
        ):
            if word not in words:
                raise ValueError(f"`{name}` of SIE is {word!r}, expected one of {', '.join(map(repr, words))}.")
        if predictor_start == "identity" and (hypernetwork == "deep" or not append_one):
            raise ValueError(
                'predictor_start "identity" of SIE needs hypernetwork "linear" and append_one true, got '
                f"{hypernetwork!r} and {append_one}: only the constant 1 has a matrix of its own."
            )
        self.prediction_weight, self.variance_weight = prediction_weight, variance_weight
        self.covariance_weight, self.prediction_variance_weight = covariance_weight, prediction_variance_weight
        self.append_one = append_one
        self.pooling = pooling
        self.expander: Projector = Projector(config.equivariant_size or 0, expander_sizes)
        num_inputs = len(facts.parameter_names) + append_one
        width, is_deep = self.expander.out_features, hypernetwork == "deep"
        self.predictor = HyperPredictor(num_inputs, width, is_deep, predictor_start)

    @property
    def needs(self) -> Needs:
        """Ask for the parameters of g, which the predictor is told."""
        return Needs(parameters=True)

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a batch of one image: it has no variance."""
        if images * processes < 2:
            raise ValueError(
                f"SIE takes variances over the batch and needs at least 2 images, got {images * processes}. Raise "
                "`per_device_train_batch_size` (gradient accumulation does not help) and drop the last batch."
            )

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of first and last global crop of ``student``; ``teacher`` and pixels are not used."""
        if len(student.tokens) < 2:
            raise ValueError(f"SIE needs at least two global crops, v1 and v2 = g(u), got {len(student.tokens)}.")
        # g's parameters belong to the usual images: rows of others that join them (``Features.cls``) have none.
        outer = torch.stack([student.tokens[0], student.tokens[-1]])  # (2, B, T, D)
        pooled = outer[:, :, 0] if self.pooling == "cls" else outer[:, :, student.num_prefix_tokens :].mean(dim=2)
        h = student.equivariant(pooled)  # (2, B, d_equi)
        # One pass per view, so that batch normalisation sees one distribution at a time, as the authors do.
        x, y = self.expander(h[0]), self.expander(h[1])  # (B, d) each
        prediction = self.predictor(x, self._inputs(views))
        self.check_batch(len(x), world_size())
        with torch.autocast(x.device.type, enabled=False):  # squares and small covariances need fp32
            return self._loss(x.float(), y.float(), prediction.float(), student.projections)

    def _inputs(self, views: Views) -> Tensor:
        """Return scaled parameters of g, with the constant 1 where it is wanted: (B, q)."""
        theta = views.normalized_parameters
        if theta is None:
            raise ValueError(
                "The views carry no parameters of g. Build the view pipeline with this objective's `needs` and a "
                "transformation family."
            )
        return F.pad(theta, (0, 1), value=1.0) if self.append_one else theta

    def _loss(self, x: Tensor, y: Tensor, prediction: Tensor, projections: Tensor | None) -> LossOutput:
        both = torch.stack([x, y], dim=1)  # (B, 2, d)
        if projections is not None:
            outer = torch.stack([projections[0], projections[-1]], dim=1)[: len(x)]  # (B, 2, d_inv)
            both = torch.cat([outer.to(x.dtype), both], dim=2)
        # One exchange for all three.
        rows = gather(torch.cat([both.flatten(1), prediction], dim=1))  # (M, ...)
        all_x, all_y, all_predictions = rows.split([both.shape[2], both.shape[2], x.shape[1]], dim=1)
        parts = {
            "loss_prediction": self.prediction_weight * F.mse_loss(prediction, y),
            "loss_variance": self.variance_weight * (variance_term(all_x) + variance_term(all_y)) / 2,
            "loss_covariance": self.covariance_weight * (covariance_term(all_x) + covariance_term(all_y)),
            "loss_prediction_variance": self.prediction_variance_weight * variance_term(all_predictions) / 2,
        }
        logs = {name: part.detach() for name, part in parts.items()}
        logs["projection_std"] = torch.stack([z[:, -x.shape[1] :].detach().std(dim=0) for z in (all_x, all_y)]).mean()
        logs["mse_without_g"] = F.mse_loss(x.detach(), y.detach())
        return LossOutput(torch.stack(list(parts.values())).sum(), logs)


def _check(config: EquiSSLConfig, facts: ViewFacts) -> None:
    """Refuse an encoder without an equivariant part, and a g without parameters; warn where g is not all."""
    if not config.feature_size or not config.equivariant_size:
        raise ValueError(
            "SIE predicts the equivariant part of the features, and this encoder has none: `feature_size` is "
            f"{config.feature_size}, `equivariant_size` is {config.equivariant_size}. Set both in the recipe's model "
            "section, e.g. feature_size: 512 and equivariant_size: 256."
        )
    if not facts.parameter_names:
        raise ValueError(
            "SIE predicts view 2 from view 1 and the parameters of g, and there are none. Name a transformation that "
            "has parameters, for example views.transformation: {name: rotation}."
        )
    warn_unless_g_is_all("SIE", facts)
