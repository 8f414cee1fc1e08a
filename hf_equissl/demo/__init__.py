"""Look at what a pair of encoders sees: pictures and a page, or an app in the browser.

Names are imported when they are first used, so that a command that names what is not there says so without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

__all__ = [
    "Analyst",
    "AngleProbe",
    "Change",
    "build_app",
    "fit_angle_probe",
    "launch_app",
    "run_demo",
    "shipped_checkpoint",
    "shipped_photographs",
    "write_space",
]

if TYPE_CHECKING:
    from .analysis import Analyst
    from .angle_probe import AngleProbe, fit_angle_probe
    from .app import build_app, launch_app
    from .change import Change
    from .page import run_demo
    from .shipped import shipped_checkpoint, shipped_photographs
    from .space import write_space

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "Analyst": "analysis",
        "AngleProbe": "angle_probe",
        "Change": "change",
        "build_app": "app",
        "fit_angle_probe": "angle_probe",
        "launch_app": "app",
        "run_demo": "page",
        "shipped_checkpoint": "shipped",
        "shipped_photographs": "shipped",
        "write_space": "space",
    },
)
