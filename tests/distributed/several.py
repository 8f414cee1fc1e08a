"""Several runs of ``training/pretrain.py`` in each process of a launch: starting takes longer than a few steps do.

Takes one argument, a JSON list with the words of each run. Beside what a run writes, ``whole.safetensors`` in its
output folder holds all weights and buffers, gathered, and ``facts.json`` what wrapped them.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main(runs: list[list[str]]) -> int:
    """Do them one after the other; the worst exit code."""
    from tests.distributed.cpu import allow_engines_on_cpu

    allow_engines_on_cpu()
    from accelerate.state import AcceleratorState, GradientState

    from hf_equissl.distributed.agreement import end_process
    from hf_equissl.pretraining.trainer import EquiSSLTrainer

    original, trainers = EquiSSLTrainer.train, []

    def train(self: EquiSSLTrainer, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        result = original(self, *args, **kwargs)
        record(self)
        return result

    EquiSSLTrainer.train = train  # type: ignore[method-assign]
    pretrain = runpy.run_path(str(ROOT / "training" / "pretrain.py"), run_name="pretrain")["main"]
    code = 0
    for words in runs:
        code = max(code, pretrain(words))
        trainers.pop().accelerator.free_memory()
        AcceleratorState._reset_state()
        GradientState._reset_state()
    end_process(code)


def record(trainer: Any) -> None:
    """Write down what became of the model."""
    from safetensors.torch import save_file

    from hf_equissl.distributed.collectives import is_main_process, local_shard

    wrapped, logs = trainer.model_wrapped, trainer.state.log_history
    parameters = list(trainer.model.parameters())
    facts = {
        "wrapped": f"{type(wrapped).__name__}{getattr(wrapped, 'zero_optimization_stage', str)()}",
        "dtypes": sorted({str(local_shard(parameter).dtype) for parameter in parameters}),
        "kept_whole": sum(getattr(parameter, "ds_persist", False) for parameter in parameters),
        "sharded": sum(not getattr(parameter, "ds_persist", True) for parameter in parameters),
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in logs if "grad_norm" in entry],
    }
    state = trainer.accelerator.get_state_dict(wrapped)
    if is_main_process():
        folder = Path(trainer.args.output_dir)
        save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "whole.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
