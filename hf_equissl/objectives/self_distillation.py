"""Self-distillation between a student and its EMA teacher over prototypes: what DINO, iBOT and DINOv2 share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..distributed.collectives import all_reduce_sum
from ..views.needs import Needs
from .base import Features, LossOutput, Objective
from .centering import centered_softmax, sinkhorn_knopp
from .masked_patches import MaskedPatches, masked_patches, tokens_at
from .progress import TeacherTemperature
from .prototypes import PatchHead, PrototypeHead, multiply, prototype_cross_entropy

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views
    from .progress import TrainingProgress

__all__ = ["Centering", "SelfDistillationObjective", "TeacherRows", "cls_loss"]

Centering = Literal["centering", "sinkhorn"]
Precision = Literal["fp32", "autocast"]


class TeacherRows(NamedTuple):
    """Unit bottleneck rows of the teacher: CLS (V, B, d), masked patches (M, d), and the means for the centers (d,)."""

    cls: Tensor
    patches: Tensor | None
    means: list[Tensor | None]


class SelfDistillationObjective(Objective):
    """What these objectives have in common. Subclasses build the heads and may add terms (``_regularizers``), or change
    which patches the center averages (``_teacher_rows``).

    Args:
        config: The encoder's configuration.
        num_prototypes: K.
        head_hidden_size: Width of the head's MLP.
        bottleneck_size: Width of its L2-normalised output, which meets the prototypes.
        head_layers: Linear layers of the MLP.
        freeze_gain: Keep the gain of each prototype at 1 (``norm_last_layer`` of the authors).
        student_temperature: tau_s, of the student's softmax.
        teacher_temperature: tau_t after the warm-up.
        warmup_teacher_temperature: tau_t at the start.
        teacher_temperature_warmup_epochs: Length of the warm-up, 0 for none.
        center_momentum: Share of the old centers in the new ones. Centers are buffers that move after the loss, in
            training mode: with gradient accumulation after each micro-batch, since the authors have none.
        centering: "centering", or "sinkhorn" with 3 iterations, which needs no centers (SwAV, DINOv2).
        local_crops: Whether the student sees local crops, too.
        equivariant_logits: Logit split: this many of the K logits, the last ones, are left to equivariance objectives.
            0 splits the encoder's stem; more needs an encoder without one.
        prototype_precision: Precision of the products of rows and prototypes, and of their gradients. "fp32"; or
            "autocast", bf16 in a step under bf16 (as the authors of DINOv2 have it) and fp32 in any other. Softmax,
            centers, Sinkhorn-Knopp and loss are in fp32 whatever it is.

    Attributes:
        clock: When temperatures change, "epoch" or "step" (``TeacherTemperature``).

    Raises:
        ValueError: For values out of range; a logit split of an encoder with a stem. In ``forward``: no teacher, fewer
            than two global crops, or no masks where there is a patch loss.
    """

    clock: ClassVar[Literal["epoch", "step"]] = "epoch"
    cls_center: Tensor
    patch_center: Tensor
    head: PrototypeHead

    def __init__(
        self,
        config: EquiSSLConfig,
        num_prototypes: int = 65536,
        head_hidden_size: int = 2048,
        bottleneck_size: int = 256,
        head_layers: int = 3,
        freeze_gain: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature_warmup_epochs: float = 30,
        center_momentum: float = 0.9,
        centering: Centering = "centering",
        local_crops: bool = True,
        equivariant_logits: int = 0,
        prototype_precision: Precision = "fp32",
    ) -> None:
        super().__init__(config)
        _check_arguments(config, num_prototypes, equivariant_logits, student_temperature, centering)
        self.prototype_precision = prototype_precision
        if not 0 <= center_momentum < 1:
            raise ValueError(f"`center_momentum` is {center_momentum}, expected a value in [0, 1).")
        self.head_sizes: dict[str, Any] = {
            "num_prototypes": num_prototypes,
            "hidden_size": head_hidden_size,
            "bottleneck_size": bottleneck_size,
            "num_layers": head_layers,
            "freeze_gain": freeze_gain,
        }
        self.student_temperature = student_temperature
        self.cls_schedule = TeacherTemperature(
            teacher_temperature, warmup_teacher_temperature, teacher_temperature_warmup_epochs, self.clock
        )
        self.cls_temperature = self.cls_schedule.start
        self.center_momentum, self.centering = center_momentum, centering
        self.local_crops = local_crops
        self.equivariant_logits = equivariant_logits
        self.num_logits = num_prototypes - equivariant_logits  # those that the loss sees

    def _build_heads(
        self,
        patches: PatchHead = "shared",
        patch_schedule: TeacherTemperature | None = None,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
    ) -> None:
        """Build the student's head, the teacher's and the centers: the end of a subclass's constructor.

        Args:
            patches: What patches have of their own in the head.
            patch_schedule: Temperature of the teacher's patch targets; ``None`` has no patch loss and no masks.
            cls_weight: Factor of the CLS loss.
            patch_weight: Factor of the patch loss.
        """
        if min(cls_weight, patch_weight) < 0:
            raise ValueError(f"Weights must be 0 or more, got {cls_weight} and {patch_weight}.")
        self.cls_weight, self.patch_weight = cls_weight, patch_weight
        self.patch_schedule = patch_schedule
        self.patch_temperature = None if patch_schedule is None else patch_schedule.start
        width = self.config.invariant_size or self.config.hidden_size
        self.head = PrototypeHead(width, **self.head_sizes, patches=patches)
        self.teacher_head = deepcopy(self.head).requires_grad_(False)
        if self.centering == "centering":
            self.register_buffer("cls_center", torch.zeros(self.num_logits))
            if patch_schedule is not None:
                self.register_buffer("patch_center", torch.zeros(self.num_logits))

    # ---- the contract with the pretraining model ----

    @property
    def needs(self) -> Needs:
        """Ask for a teacher, and for local crops and masks where the loss uses them."""
        return Needs(teacher=True, local_crops=self.local_crops, masks=self.patch_schedule is not None)

    @property
    def feature_config(self) -> EquiSSLConfig:
        """``config``; with a logit split its features are the K logits, the last ones equivariant."""
        if not self.equivariant_logits:
            return self.config
        sizes = {
            "feature_size": self.num_logits + self.equivariant_logits,
            "equivariant_size": self.equivariant_logits,
        }
        return type(self.config).from_dict({**self.config.to_dict(), **sizes})

    def split(self, stem: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        """Return the stem; with a logit split the student's head, whose last logits of patches are equivariant."""
        return self._split_logits if self.equivariant_logits else stem

    def _split_logits(self, tokens: Tensor, part: str) -> Tensor:
        if part == "invariant":
            return tokens
        # The head is that of the patches: only their rows enter decoders.
        features = Features(tokens=tokens, num_prefix_tokens=0, grid=(0, 0), stem=None)
        flat = tokens.flatten(0, -2)
        _, rows = self.head(features, flat[:0], flat)
        weight = self.head.weights()[1][self.num_logits :]
        with torch.autocast(rows.device.type, enabled=False):
            return (rows @ weight.T).unflatten(0, tokens.shape[:-1])

    def begin_step(self, progress: TrainingProgress) -> None:
        """Set the teacher's temperatures."""
        self.cls_temperature = self.cls_schedule.at(progress)
        if self.patch_schedule is not None:
            self.patch_temperature = self.patch_schedule.at(progress)

    def read_schedules(self, progress: TrainingProgress) -> dict[str, float]:
        """Return the temperature of the teacher's CLS targets."""
        return {"teacher_temperature": self.cls_schedule.at(progress)}

    def is_last_layer(self, name: str) -> bool:
        """Return whether ``name`` belongs to the student's prototypes."""
        return name.startswith(("head.prototypes.", "head.patch_prototypes."))

    def clipping_part(self, name: str) -> str | None:
        """Return "patches" for what patches have of their own: DINOv2 clips its second head apart."""
        return "patches" if name.startswith(("head.patch_mlp.", "head.patch_prototypes.")) else None

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield the head and its copy."""
        yield self.head, self.teacher_head

    # ---- loss ----

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Add up CLS loss, patch loss and what the subclass adds; then move the centers."""
        if teacher is None or len(student.tokens) < 2:
            raise ValueError(
                f"Self-distillation needs a teacher and at least 2 global crops, got {len(student.tokens)} crops and "
                f"{'no' if teacher is None else 'a'} teacher."
            )
        masked = None if self.patch_schedule is None else masked_patches(views, student)
        with torch.no_grad():
            taught = self._teacher_rows(teacher, masked)
            teacher_weights = [weight[: self.num_logits] for weight in self.teacher_head.weights()]
        cls_rows, patch_rows = self.head(student, _cls_of_all_crops(student), tokens_at(student, masked))
        weights = [weight[: self.num_logits] for weight in self.head.weights()]
        precision = self._choose_precision(cls_rows.device.type)
        with torch.autocast(cls_rows.device.type, enabled=False):  # temperatures of 0.04 need fp32
            targets = self._cls_targets(taught.cls, teacher_weights[0], precision)  # (V, B, K)
            cls = cls_loss(cls_rows, weights[0], targets, self.student_temperature, precision)
            parts = {"loss_cls": self.cls_weight * cls}
            if masked is not None and patch_rows is not None:
                patch_targets = self._patch_targets(taught, teacher_weights[1], precision)
                parts["loss_patch"] = self.patch_weight * prototype_cross_entropy(
                    patch_rows, weights[1], patch_targets, masked.weights, self.student_temperature, precision
                )
            parts |= self._regularizers(student)
            self._update_centers(taught.means, teacher_weights)
            loss = torch.stack(list(parts.values())).sum()
            logs = {name: part.detach() for name, part in parts.items()}
            logs |= self._monitors(targets, cls.detach())
        return LossOutput(loss=loss, logs=logs)

    def _choose_precision(self, device: str) -> torch.dtype | None:
        """Return bf16 where products with prototypes follow a step under bf16, else ``None``: that of the rows.

        fp16 is none to follow: gradients made in the forward pass are not scaled yet, and would vanish in it.
        """
        follows = self.prototype_precision == "autocast" and torch.is_autocast_enabled(device)
        return torch.bfloat16 if follows and torch.get_autocast_dtype(device) == torch.bfloat16 else None

    def _regularizers(self, student: Features) -> dict[str, Tensor]:
        """Return further weighted terms by name (``loss_*``)."""
        return {}

    def _monitors(self, targets: Tensor, cls: Tensor) -> dict[str, Tensor]:
        """Measure collapse: an entropy of 0 is one prototype; log K with a divergence of 0 is all of them alike."""
        entropy = torch.special.entr(targets).sum(dim=-1).mean()
        temperature = cls.new_full((), self.cls_temperature)
        return {"teacher_entropy": entropy, "cls_divergence": cls - entropy, "teacher_temperature": temperature}

    def _teacher_rows(self, teacher: Features, masked: MaskedPatches | None) -> TeacherRows:
        """Run the teacher's head on CLS and masked patches; centers average what the loss uses."""
        crops = teacher.cls.shape[:2]
        cls, patches = self.teacher_head(teacher, teacher.cls.flatten(0, 1), tokens_at(teacher, masked))
        means: list[Tensor | None] = [cls.mean(dim=0)]
        if patches is not None:
            # Without masked patches there is no mean, and this process has no say in the center.
            means.append(patches.mean(dim=0) if len(patches) else None)
        return TeacherRows(cls.unflatten(0, crops), patches, means)

    @torch.no_grad()
    def _cls_targets(self, rows: Tensor, weight: Tensor, precision: torch.dtype | None) -> Tensor:
        """Turn the teacher's rows (V, B, d) into targets (V, B, K)."""
        logits = multiply(rows, weight.T, precision)
        if self.centering == "centering":
            return centered_softmax(logits, self.cls_center, self.cls_temperature)
        return sinkhorn_knopp(logits.flatten(0, 1), self.cls_temperature).view_as(logits)

    @torch.no_grad()
    def _patch_targets(
        self, taught: TeacherRows, weight: Tensor, precision: torch.dtype | None
    ) -> Callable[[slice], Tensor]:
        """Make a function that turns a slice of the masked patches into their targets (m, K)."""
        rows, temperature = cast(Tensor, taught.patches), cast(float, self.patch_temperature)
        prototypes = (weight if precision is None else weight.to(precision)).T  # cast once, for all slices

        def logits(part: slice) -> Tensor:
            return multiply(rows[part], prototypes, precision)

        if self.centering == "centering":
            return lambda part: centered_softmax(logits(part), self.patch_center, temperature)
        return sinkhorn_knopp(logits(slice(None)), temperature).__getitem__

    @torch.no_grad()
    def _update_centers(self, means: list[Tensor | None], weights: list[Tensor]) -> None:
        """Move each center: c <- m c + (1 - m) mean of logits.

        Prototypes are linear: processes exchange mean rows, d numbers each.
        """
        if self.centering != "centering" or not self.training:
            return
        width = weights[0].shape[1]
        rows = weights[0].new_zeros(len(means), width + 1)  # the last column counts the processes that have a mean
        for row, mean in zip(rows, means, strict=True):
            if mean is not None:
                row[:width], row[width:] = mean, 1.0  # a slice is filled; one element would be copied, and waited for
        rows = all_reduce_sum(rows)
        centers = [self.cls_center] if len(means) == 1 else [self.cls_center, self.patch_center]
        for center, row, weight in zip(centers, rows, weights[: len(means)], strict=True):
            count = row[width]
            moved = center.lerp(weight @ (row[:width] / count.clamp(min=1)), 1 - self.center_momentum)
            center.copy_(torch.where(count > 0, moved, center))


def cls_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, temperature: float, precision: torch.dtype | None = None
) -> Tensor:
    r"""Average the cross-entropy over all pairs of a teacher's global crop q and another crop v of the student.

    .. math::
        L = \frac{1}{V (V + L - 1)} \sum_{q} \sum_{v \ne q} \frac{1}{B} \sum_b H(t_{qb}, s_{vb})

    With V = 2 that is 22 pairs beside 10 local crops, 18 beside 8. H is linear in the target, so each student row
    meets the sum of its teachers' targets once.

    Args:
        rows: ((V + L) * B, d), unit rows of the student, global crops first.
        weight: (K, d), prototypes.
        targets: t, (V, B, K).
        temperature: Temperature of the student's softmax.
        precision: Of products with the prototypes, as in :func:`.prototype_cross_entropy`.
    """
    crops, images = targets.shape[:2]
    pairs = crops * (len(rows) // images - 1)
    # A global crop takes the sum of the targets of the others, a local crop, last here, that of all of them.
    others = [torch.cat([targets[:crop], targets[crop + 1 :]]).sum(dim=0) for crop in range(crops)]
    sums = torch.stack([*others, targets.sum(dim=0)])  # (V + 1, B, K)
    of_row = torch.arange(len(rows), device=rows.device)
    of_row = torch.where(of_row < crops * images, of_row, crops * images + of_row % images)
    return prototype_cross_entropy(
        rows,
        weight,
        lambda part: sums.flatten(0, 1)[of_row[part]],
        rows.new_full((len(rows),), 1 / (pairs * images)),
        temperature,
        precision,
    )


def _cls_of_all_crops(features: Features) -> Tensor:
    """Take the CLS rows of all crops, ((V + L) * B, D)."""
    rows, local = features.cls.flatten(0, 1), features.local_cls
    return rows if local is None else torch.cat([rows, local.flatten(0, 1)])


def _check_arguments(
    config: EquiSSLConfig, num_prototypes: int, equivariant_logits: int, student_temperature: float, centering: str
) -> None:
    if centering not in ("centering", "sinkhorn"):
        raise ValueError(f"`centering` is {centering!r}, expected 'centering' or 'sinkhorn'.")
    if student_temperature <= 0:
        raise ValueError(f"`student_temperature` is {student_temperature}, expected a value above 0.")
    if num_prototypes < 2:
        raise ValueError(f"`num_prototypes` is {num_prototypes}, expected at least 2 to choose from.")
    if not 0 <= equivariant_logits < num_prototypes:
        raise ValueError(
            f"`equivariant_logits` is {equivariant_logits}, expected 0 (stem split) or fewer than the "
            f"{num_prototypes} prototypes."
        )
    if equivariant_logits and config.feature_size is not None:
        raise ValueError(
            f"`equivariant_logits` ({equivariant_logits}) splits the head's output, and this encoder has a stem that "
            f"is split already (feature_size {config.feature_size}). Set feature_size and equivariant_size to null."
        )
