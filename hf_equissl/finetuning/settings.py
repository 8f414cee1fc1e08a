"""What a fine-tuning run is asked to do: every option, its default, and the checks that need nothing loaded."""

from __future__ import annotations

import json
import os
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal

from ..utils.files import expand_home
from ..utils.redaction import redact_values
from ..utils.suggestions import did_you_mean

# As in modeling.configuration_equissl, without the seconds that its import takes before --help.
POOLINGS = ("cls", "patches", "cls_patches", "invariant", "equivariant")
KEEPS = ("last", "best")
# The base learning rates hold at this global batch and grow with its square root, as suits Adam.
REFERENCE_BATCH = 256
# The trained weights do not depend on these, but for images that are left out: a run may go on with other values.
_NOT_IDENTITY = (
    "output_dir",
    "num_workers",
    "eval_steps",
    "save_steps",
    "max_bad_share",
    "max_pixels",
    "trust_remote_code",
    "base_id",
)
# Settings that are or may be paths.
_PATHS = ("encoder", "data", "output_dir")


@dataclass(frozen=True)
class Method:
    """One way to fine-tune, with the settings that follow from it.

    Attributes:
        description: What it does, in words; ``{head}`` stands for what the task puts on the encoder.
        base_learning_rate: Learning rate at a global batch of 256.
        weight_decay: Decay of matrices; biases, norms and embeddings of one dimension have none.
        layer_decay: Learning rate of a block relative to the block above it.
        label_smoothing: In classification, the share of the target that is spread over all classes.
        adapter: Whether the encoder's own weights stay, beside small matrices that are trained and saved alone.
        frozen: Whether the head alone is trained.
    """

    description: str
    base_learning_rate: float
    weight_decay: float
    layer_decay: float = 1.0
    label_smoothing: float = 0.1
    adapter: bool = False
    frozen: bool = False


METHODS: dict[str, Method] = {
    # As the released commands of MAE for ViT-B (facebookresearch/mae, FINETUNE.md), and 1e-3 at a batch of 1024, which
    # suits joint-embedding encoders too. The 4e-3 of its paper's table 9 (https://arxiv.org/abs/2111.06377) is made for
    # 100 epochs. A small encoder that was trained for minutes gains from three times as much.
    "full": Method("every weight", base_learning_rate=5e-4, weight_decay=0.05, layer_decay=0.75),
    # A convex problem: a large step costs time, not accuracy.
    "linear": Method("{head}, the encoder frozen", 1e-2, weight_decay=0.0, label_smoothing=0.0, frozen=True),
    # The same for heads that are no convex problem.
    "frozen": Method("{head}, the encoder frozen", 1e-3, weight_decay=0.01, frozen=True),
    # PEFT's guide to image classification has 5e-3 at a batch of 512 for ViT-B, with adapters that count once
    # (alpha / rank = 1) on queries and values alone; these count twice and sit on every linear map.
    "lora": Method("LoRA adapters and {head}", 2e-3, weight_decay=0.01, adapter=True),
    "dora": Method("DoRA adapters and {head}", 2e-3, weight_decay=0.01, adapter=True),
}


@dataclass(frozen=True)
class FineTuningSettings:
    """Everything that a fine-tuning run is told.

    Attributes:
        encoder: Folder or Hub id of the encoder.
        data: Whatever ``hf_equissl.data.load_images`` reads, with labels.
        output_dir: Where checkpoints, results and the finished model go.
        task: Key of ``TASKS``.
        task_options: The task's own options, by name.
        method: Key of ``METHODS``.
        revision, subfolder, trust_remote_code: How the encoder is loaded.
        base_id: Hub id under which it is published, where ``encoder`` is a folder: what is saved refers to that.
        pooling: What the head of an EquiSSL encoder reads, one of ``POOLINGS``; ``None``: its config's.
        image_size: Side of the images in pixels; ``None``: of the image processor beside the encoder.
        drop_path: Stochastic depth in training.
        train_split, test_split: Names; no ``test_split``: test, validation or val, else a tenth is held out.
        train_images, test_images: Use fixed random subsets of this size; ``None``: all.
        image_column, label_column, config_name: What the data set calls them, where it cannot be found out.
        value_range, max_pixels: How images are decoded, see ``hf_equissl.data.Decoding``; ``None``: its default.
        max_bad_share: Share of images that may fail to decode.
        num_workers: Processes that decode.
        epochs: Passes over the training images.
        batch_size: Images per step and process.
        accumulation: Micro-batches per optimizer step.
        learning_rate: ``None``: the method's, growing with the root of the global batch.
        weight_decay, layer_decay: ``None``: the method's.
        label_smoothing: Label smoothing of classification; ``None``: the method's.
        warmup: Share of the steps in which the learning rate rises; it falls along a cosine afterwards.
        crop_scale: Area of the training crops as shares of the image; ``None``: 0.08 to 1, and 0.35 to 1 for images of
            up to 64 pixels, of which little is left otherwise.
        flip: Mirror half of the training images.
        lora_rank, lora_alpha, lora_dropout: Adapters add (alpha / rank) B A to a weight.
        target_modules: Regular expression for names of layers with adapters; ``None``: ``LORA_TARGETS``.
        seed: Seed of weights, order and views.
        bf16: Train and evaluate under bfloat16 autocast; "auto": where the device has units for it. A run keeps what it
            began with.
        eval_steps, save_steps: Every so many steps; ``None``: after each epoch.
        keep: "last": the weights of the last step; "best": those with the best accuracy among all evaluations, which
            are made on the test images, so that the accuracy is then too good by that choice.
    """

    encoder: str
    data: str
    output_dir: str
    task: str = "classification"
    task_options: dict[str, Any] = field(default_factory=dict)
    method: str = "lora"
    revision: str | None = None
    subfolder: str = ""
    trust_remote_code: bool = False
    base_id: str | None = None
    pooling: str | None = None
    image_size: int | None = None
    drop_path: float = 0.0
    train_split: str = "train"
    test_split: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    config_name: str | None = None
    value_range: str | tuple[float, float] | None = None
    max_pixels: int | None = None
    max_bad_share: float = 0.01
    num_workers: int = 0
    epochs: float = 10.0
    batch_size: int = 128
    accumulation: int = 1
    learning_rate: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    label_smoothing: float | None = None
    warmup: float = 0.05
    crop_scale: tuple[float, float] | None = None
    flip: bool = True
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str | None = None
    seed: int = 0
    bf16: bool | Literal["auto"] = False
    eval_steps: int | None = None
    save_steps: int | None = None
    keep: str = "last"

    def __post_init__(self) -> None:
        """Fill in what follows from the method, and refuse values that nothing can mean."""
        for name in _PATHS:
            object.__setattr__(self, name, expand_home(getattr(self, name)))
        for name, choices in (("method", METHODS), ("keep", KEEPS)):
            _check_choice(name, getattr(self, name), tuple(choices))
        if self.pooling is not None:
            _check_choice("pooling", self.pooling, POOLINGS)
        for name in ("weight_decay", "layer_decay"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(METHODS[self.method], name))
        counts = ("train_images", "test_images", "image_size", "eval_steps", "save_steps", "batch_size")
        for name in (*counts, "accumulation", "lora_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name}: expected 1 or more, got {value}.")
        for name in ("epochs", "lora_alpha", "learning_rate", "layer_decay"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name}: expected more than 0, got {value}.")
        for name in ("max_bad_share", "warmup", "lora_dropout", "label_smoothing", "drop_path"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1 and not (name == "max_bad_share" and share == 1):
                raise ValueError(f"--{name}: expected a share from 0 to below 1, got {share}.")
        if (self.layer_decay or 0) > 1 or (self.weight_decay or 0) < 0 or self.num_workers < 0:
            raise ValueError(
                f"--layer_decay {self.layer_decay}, --weight_decay {self.weight_decay}, --num_workers "
                f"{self.num_workers}: expected at most 1, at least 0, at least 0."
            )
        if self.eval_steps and self.save_steps and self.keep == "best" and self.eval_steps % self.save_steps:
            raise ValueError(
                f"--keep best needs a checkpoint at every evaluation: --eval_steps {self.eval_steps} is not a multiple "
                f"of --save_steps {self.save_steps}."
            )
        if self.keep == "best" and (self.eval_steps is None) != (self.save_steps is None):
            raise ValueError(
                "--keep best needs checkpoints at evaluations: give --eval_steps and --save_steps or none."
            )
        if self.target_modules is not None:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"--target_modules {self.target_modules}: no regular expression ({error}). Example: "
                    r".*attention\.[qv]_proj"
                ) from error
        if self.crop_scale is not None:
            low, high = self.crop_scale
            if not 0 < low <= high <= 1:
                raise ValueError(f"--crop_scale: expected two shares, 0 < LOW <= HIGH <= 1, got {low:g} {high:g}.")
            object.__setattr__(self, "crop_scale", (float(low), float(high)))

    @property
    def hub_options(self) -> dict[str, Any]:
        """Where in its repository the encoder lies, for ``from_pretrained``."""
        given = {"revision": self.revision, "subfolder": self.subfolder}
        return {name: value for name, value in given.items() if value}

    @property
    def source_options(self) -> dict[str, Any]:
        """How the images are read, for ``load_images``."""
        given = {
            "column": self.image_column,
            "label_column": self.label_column,
            "config_name": self.config_name,
            "value_range": self.value_range,
            "max_pixels": self.max_pixels,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def base(self) -> str:
        """What a saved model names as its origin."""
        return self.base_id or self.encoder

    @property
    def is_adapter(self) -> bool:
        """Whether the encoder's own weights stay."""
        return METHODS[self.method].adapter

    def learning_rate_on(self, processes: int) -> float:
        """Return the learning rate that was given, or else the one that the global batch asks for."""
        if self.learning_rate is not None:
            return self.learning_rate
        batch = self.batch_size * self.accumulation * processes
        return METHODS[self.method].base_learning_rate * (batch / REFERENCE_BATCH) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as the plain types that JSON gives back, without secrets."""
        return redact_values(json.loads(json.dumps(asdict(self))))

    def differences(self, other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """List (name, theirs, ours) of each setting that decides what the weights become and is not the same."""
        mine = self.to_dict()
        # A run of an earlier version knows nothing of settings that came later: it has their defaults.
        theirs = {item.name: redact_values(other.get(item.name, _default(item))) for item in fields(self)}
        theirs |= {name: os.path.expanduser(theirs[name]) for name in _PATHS}  # an earlier version did not expand ``~``
        names = [name for name in mine if name not in _NOT_IDENTITY and mine[name] != theirs[name]]
        return [(name, theirs[name], mine[name]) for name in names]


def _default(item: Field[Any]) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"--{name} {value}: there is no such {name}.{hint} Choose among {', '.join(choices)}.")
