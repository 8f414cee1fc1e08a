"""The device that a command runs on: which one, what it is called, and the precision in which it computes fastest."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from .machine import usable_cores
from .suggestions import RecipeError

Precision = Literal["fp32", "bf16", "fp16"]
# Flags of torch.cpu.get_capabilities -> the unit that multiplies bf16 faster than fp32, as people call it.
_BF16_UNITS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "ARM-BF16"}
# Instruction sets of ONEDNN_MAX_CPU_ISA that have no product in bf16, although some convert numbers from and to it.
_ISA_WITHOUT_BF16 = re.compile(r"sse41|avx|avx2(_vnni.*)?|avx512_core(_vnni)?", re.IGNORECASE)
_PRODUCT_SIDE, _PRODUCT_REPEATS = 256, 3  # products that measure a speed take 0.1 s where bf16 is emulated


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def choose_device(name: str) -> torch.device:
    """Give the device called ``name``; ``auto``: an accelerator if there is one.

    Raises:
        RecipeError: This machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: not a device of PyTorch. Give auto, cpu or cuda.") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise RecipeError(f"--device {name}: this machine has {accelerator or 'no accelerator'}. Give auto or cpu.")
    count = torch.accelerator.device_count() if device.type != "cpu" else 1
    if device.index is not None and device.index >= count:
        raise RecipeError(f"--device {name}: this machine has {count} of {device.type}, counted from 0.")
    return device


# ---- precision ----


def choose_precision(asked: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Decide in which precision to compute on ``device``.

    Args:
        asked: "auto" chooses bf16 where the device has units for it (``bf16_units``) and fp32 elsewhere: emulated, a
            product in bf16 takes up to seventy times as long as in fp32. Any other name is kept.
        device: Where products of matrices are computed.
    """
    if asked != "auto":
        return asked
    return "bf16" if bf16_units(device) else "fp32"


def bf16_units(device: torch.device) -> tuple[str, ...]:
    """Name what multiplies matrices in bf16 faster than in fp32 on ``device``; empty where nothing does.

    Apple's GPUs count as without: the first two generations emulate bf16, and no speed-up is known of later ones.
    """
    if device.type == "cpu":
        is_built = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
        most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
        return cpu_bf16_units(torch.cpu.get_capabilities(), is_built, most)
    if device.type == "cuda" and torch.version.hip is None:
        return cuda_bf16_units(torch.cuda.get_device_capability(device))
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        return ("matrix cores",) if module.is_bf16_supported(including_emulation=False) else ()
    return ()


def cpu_bf16_units(capabilities: Mapping[str, Any], in_onednn: bool, max_isa: str = "") -> tuple[str, ...]:
    """Name the units for bf16 that PyTorch uses on a CPU.

    Args:
        capabilities: As ``torch.cpu.get_capabilities`` gives them: what the CPU has.
        in_onednn: Whether oneDNN, which computes the products, was built and finds instructions for bf16. Without it
            (PyTorch for macOS) they are emulated, whatever the CPU has.
        max_isa: Value of ``ONEDNN_MAX_CPU_ISA``, which bounds what oneDNN uses; empty: no bound.
    """
    if not in_onednn or _ISA_WITHOUT_BF16.fullmatch(max_isa):
        return ()
    return tuple(unit for flag, unit in _BF16_UNITS.items() if capabilities.get(flag, False))


def cuda_bf16_units(capability: tuple[int, int]) -> tuple[str, ...]:
    """Name the units for bf16 of an NVIDIA GPU: tensor cores have it from compute capability 8.0 (Ampere) on."""
    return ("tensor cores",) if capability >= (8, 0) else ()


def precision_lines(precision: Precision, device: torch.device) -> list[str]:
    """Say what ``device`` computes in; in a second line what bf16 costs, where the device is slower in it.

    Both speeds are measured then, on products of small matrices.
    """
    units = bf16_units(device)
    without = "" if units or device.type == "cpu" else ", no units for bf16"
    lines = [f"precision {precision} on {describe_device(device)}{without}"]
    if precision == "bf16" and not units:
        bf16, fp32 = (product_speed(device, dtype) for dtype in (torch.bfloat16, torch.float32))
        if bf16 < fp32:
            lines.append(
                f"warning: this device has no units for bf16: it multiplies matrices at {bf16:.3g} GFLOP/s in bf16 and "
                f"at {fp32:.3g} in fp32. With `auto` in place of bf16 the faster one is chosen."
            )
    return lines


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best speed of a few products of square matrices, in 10^9 operations per second."""
    a, b = (torch.ones(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + _PRODUCT_REPEATS):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * _PRODUCT_SIDE**3 / min(seconds[1:]) / 1e9


# ---- names ----


def describe_device(device: torch.device) -> str:
    """Name a device as figures of time should: an NVIDIA GPU by its model, a CPU by its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return describe_cpu() if device.type == "cpu" else device.type


def describe_cpu() -> str:
    """Name the CPU by its kind, what PyTorch uses of it and its cores: "Intel Xeon, AVX512-BF16 + AMX, 2 cores"."""
    cores = usable_cores()
    level = torch.backends.cpu.get_cpu_capability()
    used = " + ".join(bf16_units(torch.device("cpu"))) or (platform.machine() if level == "DEFAULT" else level)
    return f"{_cpu_name()}, {used}, {cores} core{'s' if cores != 1 else ''}"


def _cpu_name() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name", "")
    if name and "unknown" not in name.lower():
        return str(name)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] not in ("", "unknown") else platform.processor() or platform.machine()
