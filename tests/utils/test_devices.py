"""The precision of each kind of device, and its name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from hf_equissl.utils import devices
from hf_equissl.utils.devices import bf16_units, choose_precision, cpu_bf16_units, cuda_bf16_units, precision_lines

CPU = torch.device("cpu")
# What torch.cpu.get_capabilities says of real processors, without what does not matter here.
HASWELL = {"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}
SKYLAKE_SERVER = HASWELL | {"avx512_f": True}
ZEN_4 = SKYLAKE_SERVER | {"avx512_bf16": True}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_bf16": True, "amx_tile": True}
NEOVERSE_N1 = {"neon": True, "bf16": False}
NEOVERSE_V1 = {"neon": True, "bf16": True, "sve_bf16": True}


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        (HASWELL, ()),
        (SKYLAKE_SERVER, ()),
        (ZEN_4, ("AVX512-BF16",)),
        (SAPPHIRE_RAPIDS, ("AVX512-BF16", "AMX")),
        (NEOVERSE_N1, ()),
        (NEOVERSE_V1, ("ARM-BF16",)),
        ({}, ()),
    ],
)
def test_a_cpu_has_the_units_that_it_says(capabilities: dict[str, bool], units: tuple[str, ...]) -> None:
    assert cpu_bf16_units(capabilities, in_onednn=True) == units
    # PyTorch for macOS has no oneDNN: an Apple CPU multiplies in fp32 only, whatever its flags say.
    assert cpu_bf16_units(capabilities, in_onednn=False) == ()


@pytest.mark.parametrize("bound", ["SSE41", "AVX", "AVX2", "avx2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE"])
def test_a_bound_on_instructions_takes_the_units_away(bound: str) -> None:
    assert cpu_bf16_units(SAPPHIRE_RAPIDS, True, bound) == ()


@pytest.mark.parametrize("bound", ["", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_AMX", "AVX10_1_512"])
def test_a_bound_above_them_leaves_units(bound: str) -> None:
    assert cpu_bf16_units(ZEN_4, True, bound) == ("AVX512-BF16",)


@pytest.mark.parametrize(
    ("gpu", "capability", "has"),
    [("V100", (7, 0), False), ("T4", (7, 5), False), ("A100", (8, 0), True), ("RTX 4090", (8, 9), True),
     ("H100", (9, 0), True), ("B200", (10, 0), True)],
)  # fmt: skip
def test_nvidia_gpus_have_bf16_from_ampere_on(gpu: str, capability: tuple[int, int], has: bool) -> None:
    assert bool(cuda_bf16_units(capability)) == has, gpu


def test_apples_gpus_stay_in_fp32() -> None:
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_this_machine_is_asked() -> None:
    # What the kernel says, where it says anything; under a bound, oneDNN decides.
    if not os.path.exists("/proc/cpuinfo") or {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys():
        pytest.skip("nothing to compare with")
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    assert bool(bf16_units(CPU)) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def test_a_bound_in_the_environment_is_seen(without_bf16: None) -> None:
    assert bf16_units(CPU) == ()
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"  # who asks for it gets it


def test_bf16_that_was_asked_for_warns_with_both_speeds(without_bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "product_speed", lambda device, dtype: 0.8 if dtype == torch.bfloat16 else 53.0)
    lines = precision_lines("bf16", CPU)
    assert len(lines) == 2
    assert "0.8 GFLOP/s in bf16 and at 53 in fp32" in lines[1]
    assert len(precision_lines("fp32", CPU)) == 1


def test_speed_is_measured_in_operations_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: float(next(ticks)))  # a product takes a second
    assert devices.product_speed(CPU, torch.float32) == pytest.approx(2 * 256**3 / 1e9)


def test_a_cpu_is_named_by_its_kind(without_bf16: None) -> None:
    name = devices.describe_cpu()
    assert re.fullmatch(r".+, [^,]+, \d+ cores?", name), name
    assert "BF16" not in name
    assert precision_lines("fp32", CPU) == [f"precision fp32 on {name}"]
