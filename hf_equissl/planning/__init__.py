"""What a run will cost, found without weights in memory and without the cluster: see ``step``, ``memory``, ``traffic``
and ``cluster``; ``check`` compares with what a real run takes. Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

__all__ = ["Cost", "Part", "build_without_weights", "check_step", "checkpoint_bytes", "measure", "parts_of"]

if TYPE_CHECKING:
    from .step import Cost, Part, build_without_weights, check_step, checkpoint_bytes, measure, parts_of

__getattr__, __dir__ = import_when_used(__name__, __all__, dict.fromkeys(__all__, "step"))
