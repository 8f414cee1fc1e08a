"""The contract between objectives and the pretraining model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..views.needs import Needs

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig, EquiSSLModel
    from ..views.base import Views
    from .progress import TrainingProgress


@dataclass
class TokenMap:
    """Tokens of images somewhere in an encoder.

    D is the encoder's width, T = P + N tokens: P prefix tokens (CLS first, then registers) and N patches.

    Attributes:
        tokens: (..., T, D).
        num_prefix_tokens: P; 0 before the block where CLS is inserted (``cls_insertion_layer``).
        grid: (rows, columns) of the patches of an image, rows * columns = N; where patches were not kept, N is 0.
    """

    tokens: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int]

    @property
    def cls(self) -> Tensor:
        """CLS representations h, (..., D).

        Raises:
            ValueError: There is no CLS in this layer yet.
        """
        if not self.num_prefix_tokens:
            raise ValueError(
                "This layer holds patches alone: the encoder inserts CLS after it. Read a later layer (`layer`), or "
                "insert CLS earlier (model.cls_insertion_layer)."
            )
        return self.tokens[..., 0, :]

    @property
    def patches(self) -> Tensor:
        """Patch representations, (..., N, D)."""
        return self.tokens[..., self.num_prefix_tokens :, :]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Copy these tokens, with ``function`` of each tensor in its place."""
        return type(self)(**{f.name: _map(getattr(self, f.name), function) for f in fields(self)})


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, TokenMap):
        return value.map(function)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return function(value) if isinstance(value, Tensor) else value


@dataclass
class Features(TokenMap):
    """What one network made of the views. The stem runs only on the rows and for the part that an objective asks for.

    V global and L local crops of B images. ``cls`` and ``local_cls`` also hold the n images of further views that join
    the usual ones (``ExtraViews.joins``), behind these: their length is the batch, that of ``tokens`` is not.

    Attributes:
        tokens: (V, B, T, D), final-norm tokens of the global crops. Of further views (M, T, D).
        stem: ``stem(tokens (..., D), part="invariant" | "equivariant") -> (..., d_inv | d_equi)``; ``None`` for an
            encoder without one, whose tokens are all invariant.
        local_tokens: (L, B, P, D), prefix tokens of the local crops: their patches have no use, and cost.
        projections: What the invariance objective returned as its ``LossOutput.projections``, for the equivariance
            objectives, which come after it.
        hidden: block -> tokens after that block, before any further norm, of the same images.
        extra: name -> view -> features of ``Views.extra[name][view]``, of the views that this network encodes. Where it
            stopped before its last block, ``tokens`` are that block's, without the final norm.
        joined: (V, n, D), CLS rows of the images that join the global crops.
        joined_local: (L, n, D), of those that join the local crops.
    """

    stem: Callable[..., Tensor] | None
    local_tokens: Tensor | None = None
    projections: Tensor | None = None
    hidden: dict[int, TokenMap] = field(default_factory=dict)
    extra: dict[str, dict[int, Features]] = field(default_factory=dict)
    joined: Tensor | None = None
    joined_local: Tensor | None = None

    @property
    def cls(self) -> Tensor:
        """CLS representations h of the global crops, (V, B + n, D); of further views (M, D)."""
        own = super().cls
        return own if self.joined is None else torch.cat([own, self.joined], dim=1)

    @property
    def local_cls(self) -> Tensor | None:
        """CLS representations of the local crops, (L, B + n, D); ``None`` where there are none."""
        if self.local_tokens is None:
            return None
        own = self.local_tokens[:, :, 0]
        return own if self.joined_local is None else torch.cat([own, self.joined_local], dim=1)

    def invariant(self, tokens: Tensor) -> Tensor:
        """Return the invariant part of the stem's output, (..., D) -> (..., d_inv); without a stem ``tokens``."""
        return tokens if self.stem is None else self.stem(tokens, part="invariant")

    def equivariant(self, tokens: Tensor) -> Tensor:
        """Return the equivariant part of the stem's output, (..., D) -> (..., d_equi)."""
        if self.stem is None:
            raise ValueError("This encoder has no stem, hence no equivariant part. Set `feature_size` in its config.")
        return self.stem(tokens, part="equivariant")


@dataclass
class LossOutput:
    """A loss and its named parts.

    Attributes:
        loss: Scalar, fp32, with gradient.
        logs: Detached scalars. Those called ``loss_*`` are the weighted parts and add up to ``loss``; others monitor.
        projections: (V, B, d), with gradient: what an invariance objective's loss compares, where equivariance
            objectives may read it.
        pictures: Gives what an objective paints, beside its targets: title -> images (B, C, H, W), normalised and
            detached, in the order in which people see them. Asked in steps that are shown, before the step goes on.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    projections: Tensor | None = None
    pictures: Callable[[], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Reach:
    """Which parts of the encoder the gradient of a loss reaches.

    Attributes:
        blocks: How many blocks, counted from the first; ``None``: all.
        norm: The final norm.
        stem: The stem, where the encoder has one.
    """

    blocks: int | None = None
    norm: bool = True
    stem: bool = True


class Objective(nn.Module, ABC):
    """A term of L = L_inv + sum_j lambda_j L_equi,j with its heads. It owns its heads, never the encoder.

    Subclasses set ``citation`` (BibTeX) and implement ``forward``; everything else has a default. Whatever the rest of
    the package has to know about an objective, the objective says itself. The constructor takes the encoder's config
    first and the recipe's keyword arguments after it. One that has a parameter ``facts`` is given the ``ViewFacts`` of
    the run, from which the size of a head may follow.

    Attributes:
        citation: BibTeX of the paper.
        purpose: What it asks of the features, as a sentence for cards.
        reads_num_classes: Whether the constructor needs ``facts.num_classes``: the data set is then opened before the
            model is built, and cards say that the encoder was told the classes.
        batch_multiple: Images of one process come in multiples of this.
        exports: Whose weights are the result where this is the invariance objective and asks for a teacher.
        decoder_config: Set by an objective that owns a ``decoder``: the encoder's config with the decoder's fields. The
            decoder of the first such objective is exported with the encoder.
    """

    citation: ClassVar[str]
    reads_num_classes: ClassVar[bool] = False
    batch_multiple: ClassVar[int] = 1
    exports: ClassVar[Literal["teacher", "student"]] = "teacher"
    decoder_config: EquiSSLConfig | None = None
    purpose: ClassVar[str] = ""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def needs(self) -> Needs:
        """What this objective asks of views and encoder."""
        return Needs()

    @property
    def trains(self) -> Reach:
        """What this loss trains of the encoder."""
        return Reach()

    @property
    def reads_joining_rows(self) -> bool:
        """Whether this loss, as the invariance objective, takes in images that join by CLS (``ExtraViews.joins``)."""
        return True

    def prepare_encoder(self, encoder: EquiSSLModel) -> None:
        """Change the initial weights of the student in place, before the teacher becomes a copy of it.

        A run that starts from an encoder that exists, and one that goes on, load their weights over these. Freezing
        the patch embedding is an argument of the training.
        """

    @property
    def feature_config(self) -> EquiSSLConfig:
        """The sizes that equivariance objectives see: ``config``, unless this objective splits another layer."""
        return self.config

    def split(self, stem: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        """Return ``Features.stem`` of a student with that ``stem``: itself, unless this splits another layer."""
        return stem

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a batch that is too small for this loss; asked before training.

        Args:
            images: Images of one process in one forward pass, B.
            processes: Number of processes, W.

        Raises:
            ValueError: Says how many images there are and how many are needed.
        """

    def begin_step(self, progress: TrainingProgress) -> None:
        """Set what changes from step to step; called before the first micro-batch of each optimizer step."""

    def read_schedules(self, progress: TrainingProgress) -> dict[str, float]:
        """Return by name the values that ``begin_step`` would set; dry runs show them.

        Raises:
            ValueError: A schedule is stated in epochs, and the length of an epoch is not known.
        """
        return {}

    def is_last_layer(self, name: str) -> bool:
        """Return whether the own parameter ``name`` is held during the first ``freeze_last_layer_epochs``."""
        return False

    def clipping_part(self, name: str) -> str | None:
        """Return the part in which the own parameter ``name`` is clipped by the rule "module".

        ``None`` means all of this objective together.
        """
        return None

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Return pairs (student head, teacher head): the second follows the first by moving average."""
        yield from ()

    @abstractmethod
    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of one batch, in fp32."""
