"""A recipe on a cluster: memory, traffic and time per engine, and the largest batch per device that fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from ..distributed.engines import Engine, find_asked_engine
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..utils.suggestions import RecipeError
from .arithmetic import Schedule
from .assumptions import OFFLOAD, Cluster, Speed, parse_engine
from .memory import MemoryUse, Setup, host_bytes, peak, peaks_by_phase
from .optimizer_memory import ADAMW, OptimizerMemory
from .step import Cost
from .traffic import Traffic, traffic

LARGEST_BATCH = 65536  # the search for the largest one that fits ends here
USUAL_NODE = 8  # GPUs
NEAR = 0.25  # share of a batch within which the straight line through measured batches is trusted


@dataclass(frozen=True)
class EnginePlan:
    """One engine on a cluster.

    Attributes:
        setup: Engine and processes.
        batch: Images per device and micro-batch.
        held: Memory at the fullest moment.
        phases: Phase -> memory at its fullest moment.
        host: Bytes of the host's memory per device.
        traffic: What a device sends in an optimizer step.
        largest_batch: Largest batch per device that fits; 0 if none does, ``None`` if it was not looked for.
        compute: Seconds of arithmetic in an optimizer step.
        exchange: Seconds that the traffic takes if nothing else happens meanwhile.
    """

    setup: Setup
    batch: int
    held: MemoryUse
    phases: dict[str, MemoryUse]
    host: int
    traffic: Traffic
    largest_batch: int | None
    compute: float
    exchange: float

    @property
    def name(self) -> str:
        """Name of the engine, as ``--engine`` takes it."""
        return self.setup.engine.value + (OFFLOAD if self.setup.offload else "")

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of an optimizer step with exchange and arithmetic at the same time, and one after the other."""
        return max(self.compute, self.exchange), self.compute + self.exchange

    @property
    def bound(self) -> str:
        """What a step waits for, if both happen at the same time."""
        return "arithmetic" if self.compute >= self.exchange else "exchange"


def name_engine(args: EquiSSLTrainingArguments, processes: int) -> str:
    """Name the engine that this launch asks for, as ``--engine`` does; without a launcher DDP."""
    engine = find_asked_engine(args)
    if engine is Engine.SINGLE and processes > 1:
        engine = Engine.DDP
    setting = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE" if engine.is_deepspeed else "FSDP_OFFLOAD_PARAMS"
    offloads = os.environ.get(setting, "").lower() in ("cpu", "true", "1")
    return engine.value + (OFFLOAD if offloads and engine not in (Engine.SINGLE, Engine.DDP) else "")


def gpus_of_a_node(processes: int) -> int:
    """Count the processes of one machine: as the launcher says, else the most, up to 8, that divide ``processes``."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if local and processes % local == 0:
        return local
    return next(count for count in range(min(USUAL_NODE, processes), 0, -1) if processes % count == 0)


@dataclass
class Planner:
    """Plans engines on a cluster; a step is run on fake tensors once for each batch that is asked for.

    Args:
        measure: Batch per device -> cost of a step on one of the cluster's devices.
        schedule: Batch and accumulation of the run.
        cluster: The machines.
        speed: What a device is assumed to do.
        optimizer: What the optimizer takes.
        smallest: Smallest batch per device that the objectives accept.
        multiple: Batches per device are multiples of this, and ``smallest`` is one.
    """

    measure: Callable[[int], Cost]
    schedule: Schedule
    cluster: Cluster
    speed: Speed
    optimizer: OptimizerMemory = ADAMW
    smallest: int = 1
    multiple: int = 1
    _costs: dict[int, Cost] = field(default_factory=dict)

    def cost(self, batch: int) -> Cost:
        """Measure the cost of a step on one device, once for each batch."""
        if batch not in self._costs:
            self._costs[batch] = self.measure(batch)
        return self._costs[batch]

    def plan(self, name: str, search: bool = True, exact: bool = True) -> EnginePlan:
        """Plan one engine; ``search`` for the largest batch, ``exact`` as in ``largest_batch``.

        Raises:
            RecipeError: There is no such engine, or a single process is to use several devices.
        """
        engine, offload = parse_engine(name)
        if engine is Engine.SINGLE and self.cluster.gpus > 1:
            raise RecipeError(f"--engine single uses one device, got --gpus {self.cluster.gpus}. Set --gpus 1, or ddp.")
        accumulation = self.schedule.accumulation
        setup = Setup(engine, self.cluster.gpus, offload, accumulation > 1, self.optimizer)
        batch = self.schedule.per_device
        cost = self.cost(batch)
        sent = traffic(cost, setup, accumulation)
        operations = cost.flops * batch * accumulation
        return EnginePlan(
            setup=setup,
            batch=batch,
            held=peak(cost, setup),
            phases=peaks_by_phase(cost, setup),
            host=host_bytes(cost, setup),
            traffic=sent,
            largest_batch=self.largest_batch(setup, exact) if search else None,
            compute=operations / (self.speed.utilisation * self.speed.peak * 1e12),
            exchange=sent.network / self.cluster.bandwidth() + sent.host / (1e9 * self.cluster.host_link),
        )

    def largest_batch(self, setup: Setup, exact: bool) -> int:
        """Find the largest batch per device that fits; 0 if not even the smallest does.

        The memory of a step grows linearly with the batch, but for a few small squares: a line through the two nearest
        measured batches gives the answer. Where that lies far from both, it is measured too and the line moved; if
        ``exact``, always, until it fits and one image more would not.
        """
        step = self.multiple
        # ``low`` fits or lies below the smallest batch, ``high`` does not fit.
        low, high = self.smallest - step, LARGEST_BATCH // step * step + step
        first, second = max(self.smallest, 2, self.schedule.per_device // 2), max(self.smallest + 1, 3)
        self.cost(-(-first // step) * step), self.cost(max(-(-second // step) * step, self.schedule.per_device))
        guess = self.schedule.per_device
        while high - low > step:
            line = self._line(setup, guess)
            guess = min(max(int(line.at(self.cluster.usable)) // step * step, low + step), high - step)
            if not exact and min(abs(batch - guess) for batch in self._costs) <= NEAR * guess:
                low = max(low, int(self._line(setup, guess).at(self.cluster.usable)) // step * step)
                break
            held = peak(self.cost(guess), setup).total
            if held > self.cluster.usable:
                high = guess
            else:
                low = guess
                if held + step * line.slope > self.cluster.usable:
                    break
        return low if low >= self.smallest else 0

    def _line(self, setup: Setup, batch: int) -> _Line:
        """Draw the line through the two measured batches that are nearest to ``batch``."""
        first, second = sorted(sorted(self._costs, key=lambda known: abs(known - batch))[:2])
        low, high = (peak(self._costs[known], setup).total for known in (first, second))
        return _Line(first, low, max(1.0, (high - low) / (second - first)))


@dataclass(frozen=True)
class _Line:
    """A straight line of bytes over the batch."""

    batch: int
    held: int
    slope: float

    def at(self, held: int) -> float:
        """Find the batch that takes so many bytes."""
        return self.batch + (held - self.held) / self.slope
