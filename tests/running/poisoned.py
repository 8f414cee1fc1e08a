"""``training/pretrain.py`` on CPUs with any engine; the images of process 1 are not numbers in step 3."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hf_equissl.pretraining.trainer import EquiSSLTrainer

ROOT = Path(__file__).resolve().parents[2]
_prepare_inputs = EquiSSLTrainer._prepare_inputs


def poisoned(self: EquiSSLTrainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's own views, NaN in one place."""
    prepared = _prepare_inputs(self, inputs)
    if self.args.process_index == 1 and self.state.global_step == 2:
        prepared["views"].global_crops[0].mul_(float("nan"))
    return prepared


EquiSSLTrainer._prepare_inputs = poisoned  # type: ignore[method-assign]
if __name__ == "__main__":
    runpy.run_path(str(ROOT / "tests" / "distributed" / "pretrain.py"), run_name="__main__")
