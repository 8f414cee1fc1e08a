"""EquiSSLForPreTraining: student, objectives with their heads, and one forward that is the whole step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..distributed.collectives import gather, is_gathered, local_shard, wait_for_shards
from ..modeling import EquiSSLConfig, EquiSSLModel
from ..objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, build_objective, weight_of
from ..objectives.base import Features, Objective
from ..objectives.progress import TrainingProgress
from ..utils.feature_statistics import effective_rank, feature_std
from ..utils.registry import Registry
from ..views.base import Views
from ..views.facts import ViewFacts
from ..views.needs import Needs
from .encoding import encode_crops, encode_extra


@strict
class EquiSSLPreTrainingConfig(PreTrainedConfig):
    """What is pretrained, and by which objectives: L = L_inv + sum_j weight_j L_equi,j.

    Attributes:
        encoder: The student's ``EquiSSLConfig``, or its fields. It carries no decoder: objectives own theirs.
        invariance: ``{"name": key of INVARIANCE_OBJECTIVES, **keyword arguments}``.
        equivariance: Each ``{"name": key of EQUIVARIANCE_OBJECTIVES, "weight": lambda, **keyword arguments}``. An entry
            with weight 0 is not built at all, so that lambda = 0 is exactly the base method; with ``"views": "keep"``
            the views are still made as it asks, which makes lambda = 0 the control of the runs with other lambdas.
        facts: ``ViewFacts`` as plain values, where an objective is built from them.
    """

    model_type = "equissl_pretraining"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"encoder": EquiSSLConfig}

    encoder: dict | EquiSSLConfig | None = None
    invariance: dict = field(default_factory=lambda: {"name": "vicreg"})
    equivariance: list[dict] = field(default_factory=list)
    facts: dict | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder is None:
            self.encoder = EquiSSLConfig()
        elif isinstance(self.encoder, dict):
            self.encoder = EquiSSLConfig(**self.encoder)
        super().__post_init__(**kwargs)

    @property
    def encoder_config(self) -> EquiSSLConfig:
        """``encoder``, which is no longer a dictionary once the config is built."""
        return cast(EquiSSLConfig, self.encoder)

    @property
    def trained(self) -> list[dict]:
        """Entries of ``equivariance`` that are built, each with its weight."""
        weighted = [{**entry, "weight": float(weight_of(entry))} for entry in self.equivariance]
        return [entry for entry in weighted if entry["weight"] > 0]

    @property
    def kept(self) -> list[dict]:
        """Entries of ``equivariance`` that are not built, and whose views are made all the same."""
        return [entry for entry in self.equivariance if not weight_of(entry) and entry.get("views") == "keep"]

    def validate_objectives(self) -> None:
        """Check that every entry has a name, weights are finite and not negative, and the encoder has no decoder."""
        for entry in (self.invariance, *self.equivariance):
            if "name" not in entry:
                raise ValueError(f"An objective needs a `name`, got {entry}.")
        names = [entry["name"] for entry in self.equivariance]
        if len(set(names)) < len(names):
            raise ValueError(f"Each equivariance objective may be named once, got {names}.")
        for entry in self.equivariance:
            weight = weight_of(entry)
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise ValueError(
                    f"The weight (lambda) of equivariance objective {entry['name']!r} must be a number >= 0, "
                    f"got {weight!r}."
                )
            if entry.get("views", "keep") != "keep":
                raise ValueError(
                    f"`views` of equivariance objective {entry['name']!r} is {entry['views']!r}. Write `keep`, or "
                    "leave it out."
                )
        if self.encoder_config.decoder_type is not None:
            raise ValueError(
                f"The encoder of a pretraining model must not have a decoder, got decoder_type="
                f"{self.encoder_config.decoder_type!r}. Name an objective under `equivariance`: it brings its decoder."
            )


@dataclass
class EquiSSLPreTrainingOutput(ModelOutput):
    """One step's result.

    Attributes:
        loss: Scalar with gradient, fp32.
        logs: Detached scalars. ``loss_ssl`` and one weighted ``loss_<objective>`` each add up to ``loss``; the
            objectives' own parts follow as ``<objective>/<part>``, then monitors where they were asked for.
    """

    loss: Tensor | None = None
    logs: dict[str, Tensor] | None = None


class EquiSSLForPreTraining(PreTrainedModel):
    """Everything that learns or remembers during pretraining. ``forward`` is the whole step: wrappers see one module.

    Published beside an encoder it lets anyone continue the training. Takes an ``EquiSSLPreTrainingConfig``; raises
    ``ValueError`` for unknown objectives or arguments, and for two objectives whose needs cannot be met together.
    """

    config: EquiSSLPreTrainingConfig
    config_class = EquiSSLPreTrainingConfig
    base_model_prefix = "student"
    main_input_name = "views"
    accepts_loss_kwargs = False  # the loss is a batch mean: the Trainer divides by the accumulation steps
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = ["EquiSSLLayer"]

    def __init__(self, config: EquiSSLPreTrainingConfig) -> None:
        super().__init__(config)
        # The student comes first: with one seed, runs that differ in their objectives start from the same encoder.
        self.student = EquiSSLModel(config.encoder_config)
        self.invariance = self._build(INVARIANCE_OBJECTIVES, config.invariance, config.encoder_config)
        sizes = self.invariance.feature_config
        self.equivariance = nn.ModuleList(
            self._build(EQUIVARIANCE_OBJECTIVES, entry, sizes) for entry in config.trained
        )
        self.equivariance_names = [entry["name"] for entry in config.trained]
        self.weights = [entry["weight"] for entry in config.trained]
        self.needs = Needs()
        for objective in (self.invariance, *self.equivariance):
            self.needs = self.needs | objective.needs
            objective.prepare_encoder(self.student)
        for objective in self.build_kept():
            needs = objective.needs
            # Its views are made as it asks, and encoded only where they join the usual ones.
            made = tuple(replace(extra, student=(), teacher=(), hidden_layers=()) for extra in needs.extra)
            self.needs = self.needs | replace(needs, teacher=False, hidden_layers=(), extra=made)
        self._check_needs()
        self.teacher = deepcopy(self.student) if self.needs.teacher else None
        self.post_init()
        self.freeze_unused()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as the parent does, a complete state only.

        Raises:
            ValueError: The checkpoint lacks weights of the objectives that the config names. They would be left
                uninitialised: heads follow their papers, not one rule for all.
        """
        loaded: Any = super().from_pretrained(*args, **{**kwargs, "output_loading_info": True})
        model, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights that its objectives need, the first is {missing[0]}. "
                "Load it with the objectives it was trained with, or take only its encoder."
            )
        model.freeze_unused()
        return (model, info) if kwargs.get("output_loading_info") else model

    def _check_needs(self) -> None:
        """Refuse objectives that ask for what ``encode`` does not give them."""
        encoder = self.config.encoder_config
        if self.needs.masks and not encoder.use_mask_token:
            raise ValueError(
                f"{self.name_askers('masks')} masks patches, and this encoder has no token to put in their place. "
                "Set model.use_mask_token: true."
            )
        if not self.invariance.reads_joining_rows and any(extra.joins for extra in self.needs.extra):
            raise ValueError(
                f"Images of {self.name_askers('extra')} join the others in the invariance loss by their CLS tokens, "
                f"and {self.config.invariance['name']} reads the mean of the patches. Set its pooling: cls."
            )
        asked = [(layer, self.name_askers("hidden_layers")) for layer in self.needs.hidden_layers]
        for extra in self.needs.extra:
            last = () if extra.last_layer is None else (extra.last_layer,)
            asked += [(layer, self.name_askers("extra")) for layer in (*extra.hidden_layers, *last)]
            if last and not extra.patches and 0 < encoder.cls_insertion_layer >= min(last):
                raise ValueError(
                    f"The further views {extra.name!r} keep CLS alone and stop after block {extra.last_layer}, and CLS "
                    f"is inserted after block {encoder.cls_insertion_layer}. Read a later block, or lower "
                    "model.cls_insertion_layer."
                )
        for layer, name in asked:
            if not 1 <= layer <= encoder.num_hidden_layers:
                raise ValueError(
                    f"{name} reads the tokens after block {layer}, and this encoder has blocks 1 to "
                    f"{encoder.num_hidden_layers}. Choose one of them."
                )

    def check_batch(self, images: int, processes: int) -> None:
        """Raise ``ValueError`` if an objective cannot use batches of ``images`` on each of so many processes.

        Objectives whose views are kept are asked, too: a control refuses what the runs do that it is for.
        """
        for objective in (*self.objectives(), *self.build_kept()):
            objective.check_batch(images, processes)

    def freeze_unused(self) -> None:
        """Freeze what no gradient trains. ``from_pretrained`` forgets this: the Trainer calls it again."""
        if not self.needs.masks and self.student.embeddings.mask_token is not None:
            self.student.embeddings.mask_token.requires_grad_(False)
        for _, follower in self.ema_pairs():
            follower.requires_grad_(False)

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield pairs (student's module, teacher's copy), of the encoder first, then of the objectives' heads."""
        if self.teacher is not None:
            yield self.student, self.teacher
        for objective in self.objectives():
            yield from objective.ema_pairs()

    def train(self, mode: bool = True) -> Self:
        """Set the mode as the parent does; teachers stay in evaluation mode."""
        super().train(mode)
        for _, follower in self.ema_pairs():
            follower.eval()
        return self

    def begin_step(self, progress: TrainingProgress) -> None:
        """Tell the objectives where the run stands; before the first micro-batch of each optimizer step."""
        for objective in self.objectives():
            objective.begin_step(progress)

    def read_schedules(self, progress: TrainingProgress) -> dict[str, float]:
        """Return by name what the objectives change over the run, as it will be at ``progress``."""
        values: dict[str, float] = {}
        for objective in self.objectives():
            values |= objective.read_schedules(progress)
        return values

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Update parameters and buffers after a step: teacher <- momentum * teacher + (1 - momentum) * student.

        One fused call updates all tensors, in the teacher's fp32, and each process its own shards. Buffers that hold
        counts are copied.
        """
        leading: list[Tensor] = []
        following: list[Tensor] = []
        for leader, follower in self.ema_pairs():
            for source, target in _pairs_of(leader, follower):
                if target.is_floating_point():
                    leading.append(source)
                    following.append(target)
                else:
                    target.copy_(source)
        if following:
            torch._foreach_lerp_(following, leading, 1.0 - momentum)
            wait_for_shards(next(self.parameters()))

    def objectives(self) -> Iterator[Objective]:
        """Yield the invariance objective, then the equivariance objectives that are trained."""
        yield self.invariance
        yield from cast(Iterable[Objective], self.equivariance)

    def owner_of(self, name: str) -> tuple[str, Objective, str] | None:
        """Find the objective that the parameter or module ``name`` belongs to.

        Returns:
            The objective's place in this model ("invariance", "equivariance.0"), the objective, and what follows the
            place in ``name``; ``None`` for a part of student or teacher.
        """
        places = ("invariance", *(f"equivariance.{index}" for index in range(len(self.equivariance))))
        for place, objective in zip(places, self.objectives(), strict=True):
            if f"{name}.".startswith(f"{place}."):
                return place, objective, name.removeprefix(place).removeprefix(".")
        return None

    def name_askers(self, need: str) -> str:
        """Name the objectives whose declaration has ``need``."""
        names = (self.config.invariance["name"], *self.equivariance_names)
        pairs = zip(names, self.objectives(), strict=True)
        return " and ".join(name for name, objective in pairs if getattr(objective.needs, need))

    def _build(self, registry: Registry[Objective], entry: dict, sizes: EquiSSLConfig) -> Objective:
        arguments = {key: value for key, value in entry.items() if key not in ("name", "weight", "views")}
        facts = None if self.config.facts is None else ViewFacts.from_dict(self.config.facts)
        return build_objective(registry, entry["name"], sizes, facts=facts, **arguments)

    def build_kept(self) -> list[Objective]:
        """Build, without memory, the objectives that are not trained and whose views are made all the same."""
        with torch.device("meta"):
            sizes = self.invariance.feature_config
            return [self._build(EQUIVARIANCE_OBJECTIVES, entry, sizes) for entry in self.config.kept]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every module as its constructor made it: heads follow their papers, the student its own rules."""

    def encode(self, views: Views) -> Features:
        """Encode global and local crops in one pass of the student, the global ones masked where there are masks.

        Raises:
            ValueError: The views lack local crops, masks or labels that an objective asks for, which it names.
        """
        for need in ("masks", "local_crops", "labels"):
            if getattr(self.needs, need) and getattr(views, need) is None:
                raise ValueError(
                    f"{self.name_askers(need)} needs {need.replace('_', ' ')}, and the views have none. Build the view "
                    "pipeline with this model's `needs`."
                )
        masks = None if views.masks is None else views.masks.flatten(0, 1)
        local = views.local_crops if self.needs.local_crops else None
        features = encode_crops(self.student, views.global_crops, masks, self.needs.hidden_layers, local=local)
        features.stem = self.invariance.split(features.stem)
        encode_extra(self.student, views, features, [(extra, extra.of_student) for extra in self.needs.extra])
        return features

    @torch.no_grad()
    def encode_teacher(self, views: Views) -> Features | None:
        """Encode with the teacher the global crops, not masked and without gradient; ``None`` without a teacher."""
        if self.teacher is None:
            return None
        features = encode_crops(self.teacher, views.global_crops, layers=self.needs.hidden_layers)
        joining = len(features.tokens)
        wanted = [(extra, (*extra.teacher, *extra.joins[:joining])) for extra in self.needs.extra]
        encode_extra(self.teacher, views, features, wanted)
        return features

    def forward(self, views: Views, monitor: bool = False) -> EquiSSLPreTrainingOutput:
        """Compute the loss of one batch; ``monitor`` adds feature statistics (eigenvalues: at logging steps only)."""
        # The teacher comes first, so that its large intermediate results are gone when the student's are kept.
        teacher = self.encode_teacher(views)
        student = self.encode(views)
        invariance = self.invariance(student, teacher, views)
        student.projections = invariance.projections
        loss, logs = invariance.loss, {"loss_ssl": invariance.loss.detach()}
        parts = {self.config.invariance["name"]: invariance.logs}
        for name, weight, objective in zip(self.equivariance_names, self.weights, self.equivariance, strict=True):
            output = objective(student, teacher, views)
            loss = loss + weight * output.loss
            logs[f"loss_{name}"] = weight * output.loss.detach()
            parts[name] = output.logs
        logs |= {f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}
        if monitor:
            logs |= self.monitor(student)
        return EquiSSLPreTrainingOutput(loss=loss, logs=logs)

    @torch.no_grad()
    def monitor(self, student: Features) -> dict[str, Tensor]:
        """Measure deviation and effective rank of view 1's CLS over the global batch, which show collapse."""
        representation = gather(student.cls[0].detach().float())
        return {"feature_std": feature_std(representation), "effective_rank": effective_rank(representation)}

    @property
    def exported(self) -> str:
        """Whose weights are the result: "teacher" or "student".

        Where an equivariance objective alone asks for a teacher, the student is the result, as in the base's own run.
        """
        return self.invariance.exports if self.invariance.needs.teacher else "student"

    def export_encoder(
        self, with_decoder: bool = True, state_dict: dict[str, Tensor] | None = None, weights_of: str | None = None
    ) -> EquiSSLModel:
        """Copy the encoder into a model of its own, on the CPU.

        Args:
            with_decoder: Keep the decoder of the first objective that has one, so that ``reconstruct`` works. An
                encoder without a stem (the logits are split) goes without: the decoder would read the head.
            state_dict: Full (gathered) state of this model, where its own parameters are sharded.
            weights_of: "teacher" or "student"; by default what ``exported`` says.

        Raises:
            ValueError: Unknown ``weights_of``, or "teacher" where there is none.
        """
        weights_of = weights_of or self.exported
        if weights_of not in ("student", "teacher") or (weights_of == "teacher" and self.teacher is None):
            there_are = "student" if self.teacher is None else "student, teacher"
            raise ValueError(f"`weights_of` is {weights_of!r}, this model has: {there_are}.")
        state = self.state_dict() if state_dict is None else state_dict
        prefix = f"{weights_of}."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        config = deepcopy(self.config.encoder_config)
        for index, objective in enumerate(self.equivariance):
            decoder_config = cast(Objective, objective).decoder_config
            if with_decoder and config.feature_size and decoder_config is not None:
                config = deepcopy(decoder_config)
                prefix = f"equivariance.{index}.decoder."
                weights |= {f"decoder.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
                break
        encoder = EquiSSLModel(config)
        encoder.load_state_dict({key: value.detach().cpu() for key, value in weights.items()}, strict=True)
        return encoder.eval()


def _pairs_of(leader: nn.Module, follower: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair the parameters and buffers of both, as far as this process holds them."""
    tensors = ((*module.parameters(), *module.buffers()) for module in (leader, follower))
    for source, target in zip(*tensors, strict=True):
        yield local_shard(source), local_shard(target)
        if is_gathered(target):  # ZeRO-3 keeps small ones gathered beside their shards, and reads those
            yield source.data, target.data
