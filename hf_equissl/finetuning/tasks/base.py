"""What every task is: it reads labelled samples, puts a head on an encoder, and says how good the result is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ...encoders.export import image_processor
from ...evaluation.metrics import Metric
from ...utils.load_errors import read_config
from ..settings import FineTuningSettings

if TYPE_CHECKING:
    from transformers.image_processing_base import ImageProcessingMixin


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder reads.

    Attributes:
        image_size: Side of square images in pixels.
        image_mean, image_std: Normalisation of images in [0, 1], three numbers each.
    """

    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


class Samples(ABC):
    """Labelled samples of one split, by index.

    Attributes:
        name: What messages call them.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def read(self, index: int) -> dict[str, Any]:
        """Decode one sample for ``Task.transform``: images as RGB, labels as the task wants them.

        Raises:
            ImageDecodeError: an image of it does not decode. Another sample stands in for it, and it is counted.
        """

    def item_name(self, index: int) -> str:
        """Return what messages call a sample."""
        return f"{self.name}, row {index}"


@dataclass(frozen=True)
class Splits:
    """Samples to train on and samples to judge by.

    Attributes:
        train, test: The samples.
        train_split, test_split: What they are called, for records.
        classes: Names, in the order of the labels; empty where a task has none.
        remarks: What people should know of the data before training, one line each.
    """

    train: Samples
    test: Samples
    train_split: str
    test_split: str
    classes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Step(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: Scalar, in float32.
        output: What ``Task.judge`` needs of it.
        parts: Named parts of the loss, for the log.
    """

    loss: Tensor
    output: Any
    parts: dict[str, Tensor] = {}


class UnfitEncoderError(ValueError):
    """An encoder is of a kind that a task cannot be trained with; the message says why."""


class Task(ABC):
    """Something to fine-tune an encoder for. A new one is a class that ``TASKS.register`` adds.

    A run calls, in this order: ``complete`` and ``load`` with its settings, ``load_model``, and ``bind``. Then, in
    worker processes, ``transform`` and ``collate``; on the device ``to_inputs``, ``loss`` and, at evaluation,
    ``judge``; and ``measure`` with what was judged of the whole test split. Everything else (steps, checkpoints,
    processes, adapters, records) belongs to the run.

    The constructor's keyword arguments are the task's own options (``--set NAME=VALUE``); they need annotations.

    Attributes:
        name: Registry key.
        noun: Its name in sentences: "fine-tuned for image classification".
        result: What a trained model is, for the title of its card.
        head: What is put on the encoder, with its article.
        methods: Keys of ``METHODS`` that make sense.
        metrics: What ``measure`` returns for records; the first one is the one to quote and to choose the best by.
        defaults: Values of settings that are ``None``, by name.
        unread: Settings that this task does not read; to give one is a mistake.
        pipeline_tag: Its name on the Hub and in ``transformers.pipeline``; ``None`` where there is none.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    result: ClassVar[str]
    head: ClassVar[str] = "a head"
    methods: ClassVar[tuple[str, ...]] = ("full", "frozen", "lora", "dora")
    metrics: ClassVar[tuple[Metric, ...]]
    defaults: ClassVar[dict[str, Any]] = {}
    unread: ClassVar[tuple[str, ...]] = ("pooling", "label_column", "label_smoothing")
    pipeline_tag: ClassVar[str | None] = None
    settings: FineTuningSettings
    inputs: EncoderInput

    def __init__(self) -> None:  # noqa: B027 (a place for options: what a task has is read off its constructor)
        """Make a task that has no options of its own."""

    @property
    def primary(self) -> Metric:
        """The metric to quote."""
        return self.metrics[0]

    def check_encoder(self, source: str, **options: Any) -> Any:
        """Refuse an encoder whose kind this task cannot be trained with, by its config alone.

        Args:
            source: Folder or Hub id.
            **options: As in ``load_model``.

        Returns:
            The config.

        Raises:
            UnfitEncoderError: It says why.
            LoadError: There is no encoder.
        """
        return read_config(source, what="encoder", **options)

    # ---- settings ----

    def complete(self, settings: FineTuningSettings) -> FineTuningSettings:
        """Return the settings with this task's defaults in place of ``None``.

        Raises:
            ValueError: a method that means nothing here, or a setting that this task does not read.
        """
        if settings.method not in self.methods:
            raise ValueError(
                f"--method {settings.method}: for {self.noun} there is no such method. Choose among "
                f"{', '.join(self.methods)}."
            )
        if given := [name for name in self.unread if getattr(settings, name) is not None]:
            raise ValueError(f"--{given[0]} {getattr(settings, given[0])}: {self.noun} does not read it. Leave it out.")
        missing = {name: value for name, value in self.defaults.items() if getattr(settings, name) is None}
        return replace(settings, **missing)

    def bind(self, settings: FineTuningSettings, inputs: EncoderInput) -> None:
        """Remember what samples shall be made for; a task that prepares more extends this."""
        self.settings, self.inputs = settings, inputs

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments that make an equal task, as plain types."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """Return what can change the numbers beside the settings that all tasks share, as plain types."""
        return self.options()

    # ---- data ----

    @abstractmethod
    def load(self, settings: FineTuningSettings) -> Splits:
        """Open both splits.

        Raises:
            ValueError: names what is wrong with the data and what to do.
        """

    @abstractmethod
    def blank(self) -> dict[str, Any]:
        """Return a sample, as ``Samples.read`` does, that stands for a test image that does not decode.

        It must leave the loss as it is where it can; ``measure`` is not given its row.
        """

    @abstractmethod
    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Make what ``collate`` takes of one sample, in a worker.

        Args:
            sample: What ``Samples.read`` returned.
            rng: The ``numpy.random.Generator`` of this sample in this epoch, from which everything random is drawn;
                ``None`` at evaluation, where nothing is random.
        """

    @abstractmethod
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of samples; entries whose lengths differ stay lists of tensors."""

    @abstractmethod
    def to_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make a batch, on the device already, what ``loss`` takes. One of its entries is called ``pixel_values``."""

    # ---- model ----

    @abstractmethod
    def load_model(
        self, source: str, classes: Sequence[str], *, pooling: str | None = None, drop_path: float = 0.0, **options: Any
    ) -> nn.Module:
        """Load an encoder and put a new head on it.

        Args:
            source: Folder or Hub id of the encoder.
            classes: Names, in the order of the labels.
            pooling: What the head reads, for tasks that leave a choice there.
            drop_path: Stochastic depth.
            **options: ``trust_remote_code``, ``revision``, ``subfolder``, ``cache_dir``, ``token``.
        """

    @abstractmethod
    def load_trained(self, source: str, **options: Any) -> nn.Module:
        """Load a whole trained model from a folder or the Hub; ``options`` as in ``load_model``."""

    @abstractmethod
    def encoder_name(self, model: nn.Module) -> str:
        """Return the name of the encoder among the modules of a model that ``load_model`` made."""

    def encoder(self, model: nn.Module) -> nn.Module:
        """Return the encoder in a model that ``load_model`` made."""
        return model.get_submodule(self.encoder_name(model))

    @abstractmethod
    def reads(self, model: nn.Module) -> str:
        """Say what the head reads, for records."""

    def image_processor(self) -> ImageProcessingMixin:
        """Make the image processor that is saved beside the model."""
        return image_processor(self.inputs.image_size, list(self.inputs.image_mean), list(self.inputs.image_std))

    # ---- loss and metrics ----

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Run the model on what ``to_inputs`` made. ``model.training`` says whether this is a training step."""

    @abstractmethod
    def judge(self, output: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        """Reduce what ``loss`` gave to predictions and targets that are small enough to be kept for a whole split.

        Returns:
            Tensors, or nested tuples or dicts of them, whose first dimension is the sample. Where lengths differ, as
            those of lists of boxes, the second dimension does, and shorter ones are padded with -100, by the run.
        """

    @abstractmethod
    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute metrics of a whole split from what ``judge`` returned, now as arrays over all its samples.

        Returns:
            A number for each of ``metrics``, where it can be had; others become details of the record.
        """
