"""What a training step of each system of a comparison costs: measured by benchmark.py, shown as a column."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_equissl.training.members import SCRIPTS
from hf_equissl.training.recipe_options import import_words
from hf_equissl.training.side_by_side import CommandError, Lane, follow
from hf_equissl.utils.commands import say

COST = "benchmark.json"


class StepTimes:
    """The report of benchmark.py on the systems of a sweep.

    Args:
        folder: Where it is.
        recipe: File of the sweep.
        overrides: Values of the recipe for all members; those of its data change no step.
    """

    def __init__(self, folder: Path, recipe: Path, overrides: Mapping[str, Any]) -> None:
        self.folder, self.recipe, self.imports = folder, recipe, import_words(dict(overrides))
        self.overrides = {k: v for k, v in overrides.items() if k.partition(".")[0] not in ("data", "imports")}

    def read(self) -> dict[str, Any]:
        """Read the report; an empty one where there is none, or one of steps with other overrides."""
        path = self.folder / COST
        report = json.loads(path.read_text()) if path.is_file() else {}
        same = report.get("settings", {}).get("overrides", {}) == self.overrides
        return report if same else {}

    def measure(self, recipes: Mapping[str, Any], repeats: int, watch: Callable[[], None]) -> None:
        """Measure all systems, unless each that can be is known on this device; nothing else should run meanwhile.

        Args:
            recipes: By system. Those that start from another encoder, or with images that are not square, are left out.
            repeats: Timed steps of each kind.
            watch: Called now and then; stops the measurement by raising.
        """
        from hf_equissl.benchmarking.timing import environment
        from hf_equissl.recipes.sweep import Member
        from hf_equissl.utils.devices import choose_device

        wanted = [name for name, recipe in recipes.items() if _can_be_timed(recipe)]
        report = self.read()
        if report and report["environment"]["device"] != environment(choose_device("auto"))["device"]:
            report = {}
        if not wanted or report.get("systems", {}).keys() >= set(wanted):
            return
        lane = Lane("steps", self.folder)
        words: list[object] = ["--recipe", self.recipe, "--repeats", repeats, "--output_dir", self.folder]
        words += ["--only", *wanted, *Member("", Path(), self.overrides).words, *self.imports]

        def work(lane: Lane) -> None:
            lane.call("measuring", SCRIPTS / "benchmark.py", *words, bar="systems")
            lane.finish()

        try:
            follow([lane], work, watch)
        except (CommandError, OSError) as error:
            say(f"No step times: {error}")

    def column(self) -> tuple[dict[str, dict[str, str]], list[str]]:
        """Make the table's column, step times relative to the base, and what is said of it; nothing without times."""
        report = self.read()
        if not report:
            return {}, []
        # The processor waits, or does not, for what another device computes: its time says nothing there.
        on_cpu = report["environment"]["device"] == "cpu"
        key, kind = ("cpu_overhead", "processor time") if on_cpu else ("overhead", "time by the clock")
        cells = {system: f"{1 + timing.get(key, 0.0):.2f}" for system, timing in report["systems"].items()}
        note = (
            f"Step: {kind} of a training step over that of the same recipe with every lambda = 0, the median of pairs "
            f"measured in turns on {report['environment']['device']} ({COST})."
        )
        return {"step": cells}, [note]


def _can_be_timed(recipe: Any) -> bool:
    return recipe.model.get("init_from") is None and isinstance(recipe.build_encoder_config().image_size, int)
