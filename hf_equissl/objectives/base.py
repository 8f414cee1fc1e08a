"""The contract between objectives and the pretraining model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from ..views.needs import Needs

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig, EquiSSLModel
    from ..views.base import Views
    from .progress import TrainingProgress


@dataclass
class Features:
    """What one network made of the views. The stem runs only on the rows and for the part that an objective asks for.

    D is the encoder's width, T = P + N tokens: P prefix tokens (CLS first, then registers) and N patches.

    Attributes:
        tokens: (V, B, T, D), final-norm tokens of the global crops.
        num_prefix_tokens: P.
        grid: (rows, columns) of the patches of a global crop, rows * columns = N.
        stem: ``stem(tokens (..., D), part="invariant" | "equivariant") -> (..., d_inv | d_equi)``; ``None`` for an
            encoder without one, whose tokens are all invariant.
        local_tokens: (L, B, P, D), prefix tokens of the local crops: their patches have no use, and cost.
        projections: What the invariance objective returned as its ``LossOutput.projections``, for the equivariance
            objectives, which come after it.
        hidden: block -> (V, B, T or N, D), token maps after that block, before any further norm.
        extra: name -> features of ``Views.extra[name]``, encoded in a pass of its own, as one crop (V = 1).
    """

    tokens: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int]
    stem: Callable[..., Tensor] | None
    local_tokens: Tensor | None = None
    projections: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    extra: dict[str, Features] = field(default_factory=dict)

    @property
    def cls(self) -> Tensor:
        """CLS representations h of the global crops, (V, B, D)."""
        return self.tokens[:, :, 0]

    @property
    def patches(self) -> Tensor:
        """Patch representations of the global crops, (V, B, N, D)."""
        return self.tokens[:, :, self.num_prefix_tokens :]

    def invariant(self, tokens: Tensor) -> Tensor:
        """The invariant part of the stem's output, (..., D) -> (..., d_inv); ``tokens`` themselves without a stem."""
        return tokens if self.stem is None else self.stem(tokens, part="invariant")

    def equivariant(self, tokens: Tensor) -> Tensor:
        """The equivariant part of the stem's output, (..., D) -> (..., d_equi)."""
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
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    projections: Tensor | None = None


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
        reads_num_classes: Whether the constructor needs ``facts.num_classes``: the data set is then opened before the
            model is built.
        exports: Whose weights are the result where this is the invariance objective and there is a teacher.
        decoder_config: Set by an objective that owns a ``decoder``: the encoder's config with the decoder's fields. The
            decoder of the first such objective is exported with the encoder.
    """

    citation: ClassVar[str]
    reads_num_classes: ClassVar[bool] = False
    exports: ClassVar[Literal["teacher", "student"]] = "teacher"
    decoder_config: EquiSSLConfig | None = None

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

    def prepare_encoder(self, encoder: EquiSSLModel) -> None:
        """Change the initial weights of the student in place, before the teacher becomes a copy of it.

        A run that starts from an encoder that exists, and one that goes on, load their weights over these. To freeze
        the patch embedding is an argument of the training.
        """

    @property
    def feature_config(self) -> EquiSSLConfig:
        """The sizes that equivariance objectives see: ``config``, unless this objective splits another layer."""
        return self.config

    def split(self, stem: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        """``Features.stem`` of a student with that ``stem``: itself, unless this objective splits another layer."""
        return stem

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a batch that is too small for this loss; asked before training.

        Args:
            images: Of one process in one forward pass, B.
            processes: Number of processes, W.

        Raises:
            ValueError: Says how many images there are and how many are needed.
        """

    def begin_step(self, progress: TrainingProgress) -> None:
        """Set what changes from step to step; called before the first micro-batch of each optimizer step."""

    def scheduled(self, progress: TrainingProgress) -> dict[str, float]:
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
        """Pairs (student head, teacher head): the second follows the first by exponential moving average."""
        yield from ()

    @abstractmethod
    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Loss of one batch, in fp32."""
