"""DeepSpeed ZeRO 1, 2, 3 on two processes against DDP: weights, teacher and centers after several steps, in one table.

Plain SGD, unlike Adam, passes on every error of a gradient, and does not turn rounding into steps of full length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_equissl.pretraining.deepspeed import restricted_loading
from tests import processes

from .launching import ENGINES, ROOT, run

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
STEPS = 4
# Wide enough that ZeRO-3 shares out some weights; and a head for which the number of masked patches, another one on
# each process, would decide whether stem and first layer are multiplied before they meet the tokens.
SIZES = [
    "--model.num_hidden_layers", "2", "--model.feature_size", "1024", "--objectives.invariance.num_prototypes", "2048",
    "--objectives.invariance.head_hidden_size", "48", "--objectives.equivariance.0.decoder_widths", "[16, 16, 16, 16]",
]  # fmt: skip
RUN = {
    "optim": "sgd", "learning_rate": 0.02, "warmup_steps": 2, "weight_decay": 0.1, "weight_decay_end": 0.4,
    "layer_decay": 0.8, "teacher_momentum": 0.8, "epoch_steps": 2, "freeze_last_layer_epochs": 1,
    "freeze_last_layer_by": "learning_rate", "grad_clipping": "parameter", "max_grad_norm": 0.5,
    "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "max_steps": STEPS, "logging_steps": 1,
    "save_strategy": "no", "bf16": False,
}  # fmt: skip
PLAIN, GLOBAL, MODULE, BF16, TWICE, AGAIN, HALF, RESUMED = (
    {},
    # Steps of 0.02 under these rules leave the region in which rounding stays small: it grows fourfold per step.
    {"grad_clipping": "global", "max_grad_norm": 3.0, "learning_rate": 0.005},
    {"grad_clipping": "module", "max_grad_norm": 1.0, "learning_rate": 0.005},
    {"bf16": True, "teacher_momentum": 0.996},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    {"activation_checkpointing": True},
    {"save_strategy": "steps", "save_steps": STEPS // 2},
    {"resume": "half"},
)
RUNS = {
    "ddp": {"plain": PLAIN, "global": GLOBAL, "module": MODULE, "bf16": BF16, "twice": TWICE},
    "zero1": {"plain": PLAIN, "module": MODULE},
    "zero2": {"plain": PLAIN, "global": GLOBAL, "bf16": BF16, "twice": TWICE},
    "zero3": {"half": HALF, "resumed": RESUMED, "module": MODULE, "global": GLOBAL, "bf16": BF16, "again": AGAIN},
}


@dataclass(frozen=True)
class Result:
    """What a run left: weights and buffers, losses, and what wrapped the model."""

    state: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    facts: dict


Results = Callable[[str], dict[str, Result]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Results:
    """Engine -> results of its runs; each engine is launched once, when a test first asks for it."""

    @cache
    def of(engine: str) -> dict[str, Result]:
        folder = tmp_path_factory.mktemp(engine)
        words = []
        for name, changes in RUNS[engine].items():
            changes = dict(changes)
            line = ["--recipe", "cifar10_ibot_rot", "--data", str(photo_folder), "--output_dir", str(folder / name)]
            line += SIZES
            if source := changes.pop("resume", None):
                line += ["--resume", str(folder / source / f"checkpoint-{STEPS // 2}")]
            settings = {**RUN, **changes}
            words.append([*line, *(x for k, v in settings.items() for x in (f"--training.{k}", json.dumps(v)))])
        ended = run(engine, json.dumps(words), script=ROOT / "tests" / "distributed" / "several.py")
        assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        found = {}
        for name in RUNS[engine]:
            facts = json.loads((folder / name / "facts.json").read_text())
            assert facts["wrapped"] == ENGINES[engine][1]
            state = load_file(folder / name / "whole.safetensors")
            found[name] = Result(state, facts["losses"], facts["norms"], facts)
        return found

    return of


def difference(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> float:
    """Largest difference of two states."""
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one if k.startswith(prefix))


@pytest.mark.parametrize(
    ("engine", "name"),
    [(engine, name) for engine in ("zero1", "zero2", "zero3") for name in RUNS[engine] if name in RUNS["ddp"]],
)
def test_a_stage_trains_like_ddp(results: Results, engine: str, name: str) -> None:
    """Losses, norms of gradients, student, teacher, heads, decoder and centers; under every rule of clipping."""
    expected, actual = results("ddp")[name], results(engine)[name]
    loose = 1000.0 if name == "bf16" else 1.0  # bf16 has steps of 4e-3, and ZeRO-3 linear layers of its own
    assert actual.losses == pytest.approx(expected.losses, rel=1e-6 * loose)
    assert actual.norms == pytest.approx(expected.norms, rel=1e-5 * loose)
    assert difference(expected.state, actual.state) < 2e-6 * loose
    moved = difference(*({k.split(".", 1)[1]: v for k, v in actual.state.items() if k.startswith(side)}
                         for side in ("student.", "teacher.")))  # fmt: skip
    assert moved > 1e-4  # the teacher is a copy of the student no longer


def test_stage_3_shards(results: Results) -> None:
    """Large weights are shards, small ones are kept whole beside theirs: the teacher's update meets both."""
    facts = results("zero3")["module"].facts
    assert facts["kept_whole"] > 10
    assert facts["sharded"] >= 4


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_leaves_weights_and_teacher_in_fp32(results: Results, engine: str) -> None:
    """It computes in bf16, and a teacher with momentum 0.996 keeps what bf16 would round away."""
    result = results(engine)["bf16"]
    assert result.facts["dtypes"] == ["torch.float32"]
    assert result.losses != pytest.approx(results("ddp")["plain"].losses, rel=1e-6)
    teacher = [value for name, value in result.state.items() if name.startswith(("teacher.", "invariance.cls_center"))]
    assert all(value.dtype == torch.float32 for value in teacher)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in teacher)
    assert difference(result.state, results("ddp")["bf16"].state, "teacher.") < 2e-5


def test_activation_checkpointing_changes_nothing(results: Results) -> None:
    """Under ZeRO-3 weights are gathered once more for it."""
    assert difference(results("zero3")["again"].state, results("zero3")["half"].state) < 1e-6


def test_a_resumed_run_is_the_unbroken_one(results: Results) -> None:
    """Teacher, centers, optimizer and schedules of ZeRO-3 come back from the checkpoint."""
    unbroken, resumed = results("zero3")["half"], results("zero3")["resumed"]
    assert resumed.losses == pytest.approx(unbroken.losses, rel=1e-6)
    assert difference(resumed.state, unbroken.state) < 1e-6
    assert difference(unbroken.state, results("ddp")["plain"].state) < 2e-6  # nor does saving change the run


def test_a_checkpoint_that_runs_code_is_not_read(tmp_path: Path) -> None:
    """DeepSpeed asks for files without restriction; what it wrote itself is read by the resumed run above."""

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state": Code()}, tmp_path / "evil.pt")
    with restricted_loading(), pytest.raises(UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_without_deepspeed(tmp_path: Path) -> None:
    """All but ZeRO works without it; and who asks for ZeRO is told what to install."""
    code = """
import sys
sys.modules["deepspeed"] = None
import hf_equissl.running.run, hf_equissl.pretraining.deepspeed
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
import os
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
EquiSSLTrainingArguments(output_dir=sys.argv[1])
"""
    ended = processes.run([sys.executable, "-c", code, str(tmp_path)], preloaded=processes.BARE)
    assert "zero2 needs DeepSpeed, which is not installed: pip install" in ended.stderr, ended.stderr[-2000:]
