"""One run after another in each process of a launch, on a disk that somebody else fills meanwhile.

Takes the words of ``training/pretrain.py`` as JSON, and for each run the step at whose end the disk is filled ("end":
after the last checkpoint), with the bytes that are left, or null. Prints the exit code of each run and the folders that
it left.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.distributed.cpu import allow_engines_on_cpu  # noqa: E402

allow_engines_on_cpu()

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_equissl.distributed.agreement import end_process, gather_objects  # noqa: E402
from hf_equissl.distributed.collectives import is_main_process  # noqa: E402
from hf_equissl.pretraining.trainer import EquiSSLTrainer  # noqa: E402

_train = EquiSSLTrainer.train
words, fills = map(json.loads, sys.argv[1:])
output = Path(words[words.index("--output_dir") + 1])
filler = output / "somebody_else"


class FillDisk(TrainerCallback):
    """Leaves so many bytes at the end of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the checkpoint of that step, if there is one."""
        self._fill(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the encoder is written."""
        self._fill("end")

    def _fill(self, when: int | str) -> None:
        if fill is not None and when == fill[0] and is_main_process():
            filler.write_bytes(bytes(shutil.disk_usage(output).free - fill[1]))


def train(self: EquiSSLTrainer, *args: Any, **kwargs: Any) -> Any:
    """The Trainer's own, on that disk."""
    self.add_callback(FillDisk())
    return _train(self, *args, **kwargs)


EquiSSLTrainer.train = train  # type: ignore[method-assign]
main = runpy.run_path(str(ROOT / "training" / "pretrain.py"), run_name="pretrain")["main"]
for fill in fills:  # noqa: B007  # FillDisk reads it
    codes = gather_objects(main(words))
    if is_main_process():
        left = sorted(path.name for path in output.iterdir() if path.is_dir())
        sys.stdout.write(f"codes {codes} left {left}\n")
        filler.unlink(missing_ok=True)
    gather_objects(None)
    AcceleratorState._reset_state()
    GradientState._reset_state()
end_process(0)
