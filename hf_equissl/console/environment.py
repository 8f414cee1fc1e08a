"""``hf-equissl env``: what a bug report needs, and nothing that says whose machine it is."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..utils.commands import command_parser, say
from ..utils.files import readable_size
from ..utils.machine import total_memory, usable_cores
from ..utils.versions import library_versions

if TYPE_CHECKING:
    import torch

# Libraries that are listed beside those that results name.
LIBRARIES = (
    *("accelerate", "huggingface-hub", "safetensors", "evaluate", "peft", "deepspeed", "onnx", "onnxruntime"),
    *("matplotlib", "tensorboard", "trackio", "wandb", "torchvision", "pillow-heif", "simplejpeg"),
)
# Variables that change what happens; their values are numbers and words, and others are not shown.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"),
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "NCCL_DEBUG", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"),
)
_PLAIN = re.compile(r"(?!.*(?:GPU|MIG)-)[\w.,:+ -]{0,80}")  # GPU-..., MIG-...: ids of one device in the world


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
    parser = command_parser(
        "hf-equissl env",
        usage="hf-equissl env",
        description="Print what a bug report needs: versions, devices, cores, memory. No paths, names or tokens.",
    )
    parser.parse_args(argv)
    lines = [*_lines()]
    width = max(len(name) for name, _ in lines)
    say("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    return 0


def _lines() -> Iterator[tuple[str, str]]:
    """Give the lines, each a name and a value."""
    import torch

    from ..benchmarking.timing import environment

    where = environment(torch.device("cpu"))
    versions = library_versions(LIBRARIES)
    yield (
        "hf-equissl",
        f"{where['hf_equissl']}, " + (f"commit {where['commit']}" if where["commit"] else "commit unknown"),
    )
    yield "python", f"{versions.pop('python')} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield from ((name, version) for name, version in versions.items() if name != "hf-equissl")
    yield "torch built with", f"CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"
    yield "CPU", where["cpu"]
    yield "cores", f"{usable_cores()} of {os.cpu_count()} usable, {torch.get_num_threads()} threads"
    yield "memory", "unknown" if (memory := total_memory()) is None else readable_size(memory)
    yield "bf16 on the CPU", _bf16(torch.device("cpu"))
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        yield "accelerators", "none"
    else:
        for number in range(torch.accelerator.device_count()):
            yield f"{kind.type}:{number}", _describe(torch.device(kind.type, number))
    for name in VARIABLES:
        if (value := os.environ.get(name)) is not None:
            yield name, value if _PLAIN.fullmatch(value) else "set"


def _describe(device: torch.device) -> str:
    import torch

    from ..utils.devices import describe_device

    memory = ""
    if device.type == "cuda":
        memory = f", {readable_size(torch.cuda.get_device_properties(device).total_memory)}"
    return f"{describe_device(device)}{memory}; bf16: {_bf16(device)}"


def _bf16(device: torch.device) -> str:
    from ..utils.devices import bf16_units

    return " + ".join(bf16_units(device)) or "no units, emulated"
