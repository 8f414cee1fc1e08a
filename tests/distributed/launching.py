"""Start ``training/pretrain.py`` under any engine on two CPU processes, with the accelerate configs that ship."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "accelerate_configs"
SCRIPT = ROOT / "tests" / "distributed" / "pretrain.py"
# Engine -> (config, what wraps the model).
ENGINES = {
    "single": ("cpu", "EquiSSLForPreTraining"),
    "ddp": ("ddp", "DistributedDataParallel"),
    "fsdp2": ("fsdp2", "FSDPEquiSSLForPreTraining"),
    "zero1": ("deepspeed_zero1", "DeepSpeedEngine1"),
    "zero2": ("deepspeed_zero2", "DeepSpeedEngine2"),
    "zero3": ("deepspeed_zero3", "DeepSpeedEngine3"),
    "zero3+offload": ("deepspeed_zero3_offload", "DeepSpeedEngine3"),
}
TIMEOUT = 400.0  # seconds, for machines with other things to do


def command(
    engine: str, *options: str, processes: int = 2, script: Path = SCRIPT, launcher: tuple[str, ...] = ()
) -> list[str]:
    """The words of an ``accelerate launch``; ``options`` go to the script, ``launcher`` to accelerate."""
    config = CONFIGS / f"{ENGINES[engine][0]}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words += ["--num_processes", str(1 if engine == "single" else processes), "--main_process_port", "0"]
    return [*words, "--mixed_precision", "no", *launcher, str(script), *options]


def environment(**more: str) -> dict[str, str]:
    """One thread per process, no Hub, and DeepSpeed told that there are only CPUs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", **more}


def start(engine: str, *options: str, log: Path, **kwargs: object) -> subprocess.Popen[bytes]:
    """The run in the background, in a session of its own so that launcher and processes die together."""
    file = log.open("ab")
    words = command(engine, *options, **kwargs)  # type: ignore[arg-type]
    return subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True)


def run(
    engine: str, *options: str, timeout: float = TIMEOUT, variables: dict[str, str] | None = None, **kwargs: object
) -> subprocess.CompletedProcess[str]:
    """The run, waited for, with ``variables`` in its environment; killed with all its processes when time is out."""
    words = command(engine, *options, **kwargs)  # type: ignore[arg-type]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(**(variables or {})), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{engine}: no end after {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)
