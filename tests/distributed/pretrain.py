"""``training/pretrain.py`` as it is, on CPUs with any engine; prints what wraps the model and how long steps take."""

from __future__ import annotations

import json
import os
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.distributed.cpu import allow_engines_on_cpu  # noqa: E402

allow_engines_on_cpu()

import torch  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_equissl.pretraining.trainer import EquiSSLTrainer  # noqa: E402


class SayWrapper(TrainerCallback):
    """Prints ``wrapped: <class> <number of sharded parameters>`` when training begins, step times at the end.

    With EQUISSL_NUDGE every weight is first changed in its last bit. In the folder that EQUISSL_FACTS names, each
    process leaves what it knows of its model as ``facts-<rank>.json``.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.gradients: dict[str, tuple[bool, bool, str]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the Trainer's wrapped model."""
        wrapped = self.trainer.model_wrapped  # type: ignore[attr-defined]
        sharded = sum(hasattr(p, "ds_tensor") or hasattr(p, "placements") for p in wrapped.parameters())
        stage = getattr(wrapped, "zero_optimization_stage", lambda: "")()
        if os.environ.get("EQUISSL_NUDGE"):
            with torch.no_grad():
                for parameter in self.trainer.model.parameters():  # type: ignore[attr-defined]
                    parameter.mul_(1 + torch.finfo(torch.float32).eps)
        sys.stdout.write(f"wrapped: {type(wrapped).__name__}{stage} {sharded}\n")
        sys.stdout.flush()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.times.append(time.perf_counter() - self.started)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note who has a gradient, and its type."""
        own = self.trainer.model.named_parameters()  # type: ignore[attr-defined]
        self.gradients = {
            name: (p.requires_grad, p.grad is not None, str(getattr(p.grad, "dtype", ""))) for name, p in own
        }

    def _facts(self) -> dict[str, Any]:
        model = self.trainer.model  # type: ignore[attr-defined]
        return {
            "gradients": self.gradients,
            "weights": {name: str(p.dtype) for name, p in model.named_parameters()},
            "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()),
            "whole": sum(p.numel() for p in model.parameters()),
            "buffers": {name: b.double().flatten().tolist() for name, b in model.named_buffers()},
            "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The median of all steps but the first, which warms up."""
        if folder := os.environ.get("EQUISSL_FACTS"):
            Path(folder, f"facts-{args.process_index}.json").write_text(json.dumps(self._facts()))
        sys.stdout.write(f"seconds per step: {statistics.median(self.times[1:] or [0.0]):.4f}\n")
        sys.stdout.flush()


_train = EquiSSLTrainer.train


def train(self: EquiSSLTrainer, *args: Any, **kwargs: Any) -> Any:
    """The Trainer's own, once it said what it wraps."""
    say = SayWrapper()
    say.trainer = self  # type: ignore[attr-defined]
    self.add_callback(say)
    return _train(self, *args, **kwargs)


EquiSSLTrainer.train = train  # type: ignore[method-assign]
if __name__ == "__main__":
    sys.argv[0] = str(ROOT / "training" / "pretrain.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
