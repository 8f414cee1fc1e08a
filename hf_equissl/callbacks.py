"""Callbacks of the Trainer."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState

from .training_arguments import EquiSSLTrainingArguments


class EquiSSLProgressCallback(ProgressCallback):
    """One bar: steps done, time left, images per second over all ranks, loss. Log lines stay in ``log_history``."""

    def on_train_begin(  # type: ignore[override]
        self, args: EquiSSLTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where a resumed run stands."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("pretraining")
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss parts and the throughput behind the bar."""
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = {key: f"{logs[key]:.3g}" for key in logs if key == "loss" or key.startswith("loss_")}
        bar = self.training_bar.format_dict
        if bar["elapsed"]:
            done = bar["n"] - bar["initial"]
            shown["img/s"] = f"{done * args.global_batch_size / bar['elapsed']:.1f}"
        self.training_bar.set_postfix(shown)
