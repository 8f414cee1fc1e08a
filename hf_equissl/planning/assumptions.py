"""What a plan assumes of a cluster, as the command line says it. Needs no torch: mistakes are answered at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..distributed.engines import Engine
from ..recipes.overrides import check_processes
from ..utils.suggestions import RecipeError, did_you_mean

if TYPE_CHECKING:
    from ..pretraining.arguments import EquiSSLTrainingArguments

GIB = 1024**3
MOST_GIB = 1e9  # bounds memory, and what a link sends in a second
OFFLOAD = "+offload"
A100_TFLOPS = 312.0
A100_PEAKS = {"bf16": A100_TFLOPS, "TF32": 156.0, "fp32": 19.5}  # dense products, from its data sheet
# What the table compares, from the simplest to the one that needs the least memory.
COMPARED = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3+offload")
ENGINES = (*COMPARED, "fsdp2+offload", "zero1+offload", "zero2+offload")


@dataclass(frozen=True)
class Speed:
    """What a device is assumed to do.

    Attributes:
        utilisation: Share of the peak that a model's own operations reach (model-FLOPs utilisation), in (0, 1].
        device_tflops: Peak of one device, in 10^12 operations per second; ``None``: an A100's in the run's precision.

    Raises:
        RecipeError: A number is out of its range.
    """

    utilisation: float = 0.4
    device_tflops: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise RecipeError(f"--utilisation {self.utilisation:g}: expected a share above 0, at most 1.")
        if self.device_tflops is not None and not 0 < self.device_tflops < float("inf"):
            raise RecipeError(f"--device_tflops {self.device_tflops:g}: expected a number above 0.")

    def of(self, args: EquiSSLTrainingArguments) -> Speed:
        """Fill in an A100's peak in the precision of ``args`` where no other peak was given."""
        if self.device_tflops is not None:
            return self
        full = "TF32" if args.tf32 else "fp32"
        return replace(self, device_tflops=A100_PEAKS["bf16" if args.bf16 or args.fp16 else full])

    @property
    def peak(self) -> float:
        """Peak of one device, in 10^12 operations per second."""
        return A100_TFLOPS if self.device_tflops is None else self.device_tflops

    def describe(self) -> str:
        """Say in words which peak and which share of it the hours are computed from."""
        precision = next((name for name, peak in A100_PEAKS.items() if peak == self.peak), None)
        device = f" (A100, {precision})" if precision else ""
        return f"at {100 * self.utilisation:g} % of {self.peak:g} TFLOP/s per device{device}"


@dataclass(frozen=True)
class Cluster:
    """The machines, as far as a plan needs them.

    Attributes:
        gpus: Devices, one process each.
        gpus_per_node: Devices of one machine.
        memory: GiB of one device.
        reserve: GiB of each device that the plan leaves free, for the device's context, NCCL's buffers and
            fragmentation. ``None``: 1.5 GiB and 5 % of the memory.
        link: GB/s that a device sends to its neighbour in the machine; the default is what NCCL reaches on NVLink 3.
        network: GB/s that a machine sends to others; the default is one 400 Gb/s adapter.
        host_link: GB/s between a device and the host's memory; PCIe 4.0 x16.

    Raises:
        RecipeError: A number is out of its range.
    """

    gpus: int = 8
    gpus_per_node: int = 8
    memory: float = 80.0
    reserve: float | None = None
    link: float = 200.0
    network: float = 50.0
    host_link: float = 20.0

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            check_processes(getattr(self, name), f"--{name} {getattr(self, name)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise RecipeError(
                f"--gpus {self.gpus} are no whole number of nodes of {self.gpus_per_node}. "
                f"Set --gpus_per_node, or plan for {self.gpus // self.gpus_per_node * self.gpus_per_node} GPUs."
            )
        for name in ("memory", "link", "network", "host_link"):
            if not 0 < getattr(self, name) <= MOST_GIB:
                expected = "a number above 0" if getattr(self, name) <= 0 else f"at most {MOST_GIB:g}"
                raise RecipeError(f"--{name} {getattr(self, name):g}: expected {expected}.")
        if not 0 <= self.free < self.memory:
            raise RecipeError(
                f"--reserve {self.free:g}: expected 0 or more GiB, and less than the memory, {self.memory:g} GiB."
            )

    @property
    def free(self) -> float:
        """Memory that the plan leaves free, in GiB."""
        return 1.5 + 0.05 * self.memory if self.reserve is None else self.reserve

    @property
    def usable(self) -> int:
        """Memory that a step may take, in bytes."""
        return int((self.memory - self.free) * GIB)

    @property
    def nodes(self) -> int:
        """Number of machines that hold these GPUs; at least 1."""
        return max(1, self.gpus // self.gpus_per_node)

    def bandwidth(self) -> float:
        """Compute the bytes per second at which each device sends on a ring. All rings leave a machine through its
        network, with as many bytes in all as one device sends.
        """
        return 1e9 * (self.link if self.nodes == 1 else min(self.link, self.network))


def parse_engine(text: str) -> tuple[Engine, bool]:
    """Read the engine and whether it offloads from e.g. "zero3+offload".

    Raises:
        RecipeError: There is no engine of this name.
    """
    if text not in ENGINES:
        hint = did_you_mean(text, ENGINES)
        raise RecipeError(f"--engine {text}: there is no such engine.{hint} Valid: {', '.join(ENGINES)}.")
    name, offload, _ = text.partition(OFFLOAD)
    return Engine(name), bool(offload)
