"""What a run will cost, found without weights in memory and without the cluster: see ``step``, ``memory``, ``traffic``
and ``cluster``; ``check`` compares with what a real run takes.
"""

from __future__ import annotations

from .step import Cost, Part, check_step, checkpoint_bytes, measure, parts_of, without_weights

__all__ = ["Cost", "Part", "check_step", "checkpoint_bytes", "measure", "parts_of", "without_weights"]
