"""How the Trainer gets its batches: samplers and loaders of both kinds of data set, positions and throughput."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import ImageViewDataset, StreamingViewDataset
from ..data.throughput import Throughput
from ..distributed.signals import guard_workers
from .arguments import EquiSSLTrainingArguments

if TYPE_CHECKING:
    from ..checkpoints import WholeCheckpoints as _Trainer
else:
    _Trainer = object


class DataFeed(_Trainer):
    """Stands before ``WholeCheckpoints`` among a Trainer's parents. What differs from ``transformers.Trainer``:

    - a stream divides itself over ranks and workers, and its positions lie in checkpoints: a resumed run goes on there
      instead of reading again what it has seen;
    - how long training waits for its data is measured (``throughput``).
    """

    args: EquiSSLTrainingArguments
    throughput: Throughput

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.throughput = Throughput(self.args.device, self.args.dataloader_num_workers)

    @property
    def _stream(self) -> StreamingViewDataset | None:
        return self.train_dataset if isinstance(self.train_dataset, StreamingViewDataset) else None

    # ---- loaders ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # The data set's own sampler: accelerate's set_epoch reaches the data set through every wrapper, but stops
        # before the sampler when a resumed epoch is split over ranks.
        if not isinstance(dataset, ImageViewDataset):
            return None
        return dataset.sampler(multiple=self.args.epoch_multiple)

    def get_train_dataloader(self) -> DataLoader:
        """Return the parent's loader; a stream splits itself over ranks, so accelerate must not do it again."""
        # Its workers' seed, drawn once or in each epoch, must not come from the generator that drop path draws from.
        generator = torch.Generator()
        if self._stream is None:
            loader = guard_workers(super().get_train_dataloader())
            getattr(loader, "base_dataloader", loader).generator = generator
            return loader
        args = self.args
        stream = DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=bool(args.dataloader_persistent_workers),
            multiprocessing_context=args.dataloader_multiprocessing_context,
            # Always in order: else a position would not say whose batch comes next.
            drop_last=args.dataloader_drop_last,
            generator=generator,
        )
        return guard_workers(stream)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Get the parent's batches and time the wait."""
        with self.throughput.waiting():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.throughput.add(len(inputs["index"]), inputs.pop("seconds"))
        position = inputs.pop("position", None)
        if self._stream is not None and position is not None:
            self._stream.note_batch(position)
        return super()._prepare_inputs(inputs)

    def _prepare_input(self, data: Any) -> Any:
        """Move as the parent does; pinned memory is copied while the device works on, as in accelerate's loaders."""
        if isinstance(data, Tensor) and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # ---- positions ----

    def _init_training_state(
        self, max_steps: Any, num_update_steps_per_epoch: Any, num_train_epochs: Any, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Set up as the parent does; a stream goes on by itself, and the parent must not skip samples of it."""
        self.throughput = Throughput(self.args.device, self.args.dataloader_num_workers)
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if self._stream is None:
            return epochs, steps
        self._stream.load_positions(Path(checkpoint) if checkpoint else None, self.args.dataloader_num_workers)
        return epochs, 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._stream is not None:
            self.state.epoch = self.state.global_step / self.state.max_steps  # the parent counts from where it resumed
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_more(self, folder: Path) -> None:
        super()._save_more(folder)
        if self._stream is not None:
            self._stream.save_positions(folder, self.args.dataloader_num_workers)
