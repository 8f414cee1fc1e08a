"""The members of a comparison: what is done for each, what is done already, and when all of them will be."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_equissl.training.side_by_side import DONE, CommandError, Lane, clock
from hf_equissl.utils.files import write_text
from hf_equissl.utils.machine import usable_cores

SCRIPTS = Path(__file__).resolve().parent
RESULTS, DONE_PROBES = "results.json", "probes.json"  # what probe.py writes, and which of its commands are done
# Options of probe.py that change no number, or whose values have columns or encoders of their own.
_FREE = {
    *("--encoder", "--output_dir", "--features", "--evaluators", "--tests", "--fill", "--seeds", "--image_size"),
    *("--overwrite", "--device", "--batch_size", "--num_workers", "--import"),
}
_REPEATED = ("--set", "--further_test")
TRAINING, PROBING = "training", "probing"
SPEED_SECONDS = 10.0  # after so much training its speed is known


@dataclass
class MemberLane(Lane):
    """What is done for one member: training, where it is not finished, then probes.

    Attributes:
        system: Its row of the table.
        seed: Seed of its training.
        train: Words of pretrain.py; empty for what is not trained.
        probe: Words of probe.py, a command each; none where it is only looked up.
        probes: Folder of its results.
        is_trained: Whether its encoder is there.
        untrained: Recipe of the encoder, where it is one of random weights.
        source: What probe.py calls the encoder, where it is no folder.
        damage: What is wrong with its folder, so that nothing can be done for it.
        seconds: What its training and its probes took.
    """

    system: str = ""
    seed: int = 0
    train: Sequence[str] = ()
    probe: Sequence[Sequence[str]] = ()
    probes: Path = Path()
    is_trained: bool = False
    untrained: Any = None
    source: str = ""
    damage: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def encoder(self) -> Path:
        """Folder of the encoder, or its name."""
        return Path(self.source or self.run / "encoder")

    def prepare(self) -> None:
        """Write the encoder, where it is one of random weights, and note what a finished training took."""
        if self.damage:
            return
        if self.untrained is not None:
            from hf_equissl.running.untrained import save_untrained

            made, text = self.run / "architecture.json", self.untrained.build_encoder_config().to_json_string()
            if not (made.is_file() and made.read_text() == text and (self._weights() or self.is_kept)):
                save_untrained(self.untrained, self.seed, self.encoder)
                write_text(made, text)
        elif self.is_trained:
            self.seconds[TRAINING] = seconds_of(self.run)

    def work(self) -> None:
        """Train and probe, but for what is done.

        Raises:
            CommandError: A command failed, the lane was stopped, or its folder is damaged.
        """
        if self.damage:
            raise CommandError(self.damage)
        if self.train and not self.is_trained:
            self.call(TRAINING, SCRIPTS / "pretrain.py", *self.train, bar="pretraining")
            self.is_trained, self.seconds[TRAINING] = True, seconds_of(self.run)
        for words in self.probe:
            if not self._is_probed(words):
                self._probe(words)
        self.seconds[PROBING] = sum(entry["seconds"] or 0.0 for entry in self._noted())

    def _probe(self, words: Sequence[str]) -> None:
        start, before = time.monotonic(), _modified(self.probes / RESULTS)
        try:
            self.call(PROBING, SCRIPTS / "probe.py", *words, bar=str(self.encoder))
        except CommandError:
            if _modified(self.probes / RESULTS) != before:
                self._note(words, None)  # some of its numbers are there
            raise
        self._note(words, time.monotonic() - start)

    @property
    def is_probed(self) -> bool:
        """Whether all its probes are done, with these words and of this encoder."""
        return all(map(self._is_probed, self.probe))

    @property
    def is_kept(self) -> bool:
        """Whether nothing is left to do although its weights are gone: its probes were done before."""
        return bool(self.probe) and self._weights() is None and self.is_probed

    @property
    def state(self) -> str:
        """How far this member is, in words."""
        if self.damage:
            return f"damaged: {self.damage}"
        if self.train and not self.is_trained:
            return "not finished" if self.run.exists() else "not begun"
        return "probed" if self.is_probed else "trained" if self.train else "not probed"

    def find_damage(self, recipe: Any) -> str:
        """Say what cannot be read in the folder, and what to do; "" where all can.

        Args:
            recipe: What it is trained by, if it is.
        """
        from hf_equissl.evaluation import load_records
        from hf_equissl.running.resume import name_difference

        try:
            if (self.probes / RESULTS).is_file():
                load_records(self.probes / RESULTS)
            self.measured_words()
            if self.train:
                name_difference(recipe, self.run)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def why_no_row(self, recipe: Any) -> str:
        """Say why the results that there are make no row of a table; "" where they do, or there are none.

        Args:
            recipe: What it is trained by, if it is.
        """
        from hf_equissl.running.resume import name_difference

        if not (self.probes / RESULTS).is_file():
            return ""
        if self.damage:
            return f"{self.title}: {self.damage.rstrip('.')}"
        if not self.measured_words():
            return f"{self.title}: its encoder is not the one that was probed"
        difference = name_difference(recipe, self.run) if self.train else ""
        return difference and f"{self.title} was trained in another way: {difference}"

    def measured_words(self) -> list[list[str]]:
        """List the words of the probes, done or begun, that measured the encoder as it is now."""
        return [entry["words"] for entry in self._noted() if self._measured(entry)]

    def _noted(self) -> list[dict[str, Any]]:
        """Read which commands are done or, without their seconds, begun; none where the results are gone.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.probes / DONE_PROBES
        if not (path.is_file() and (self.probes / RESULTS).is_file()):
            return []
        try:
            noted = json.loads(path.read_text())
            if not all(entry.keys() >= {"words", "weights", "seconds"} for entry in noted):
                raise ValueError("words, weights or seconds are missing")
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it: the probes are done again.") from error
        return noted

    def _is_probed(self, words: Sequence[str]) -> bool:
        return any(
            entry["words"] == list(words) and self._measured(entry) and entry["seconds"] is not None
            for entry in self._noted()
        )

    def _measured(self, entry: dict[str, Any]) -> bool:
        """Whether a noted probe is of the encoder as it is now, or of one that was deleted to save space."""
        weights = self._weights()
        return weights is None or entry["weights"] == weights

    def _note(self, words: Sequence[str], seconds: float | None) -> None:
        took = None if seconds is None else round(seconds, 1)
        entry = {"words": list(words), "weights": self._weights(), "seconds": took}
        write_text(self.probes / DONE_PROBES, json.dumps([*self._noted(), entry], indent=2) + "\n")

    def _weights(self) -> list[int] | None:
        return weights_of(self.encoder)


def weights_of(encoder: Path) -> list[int] | None:
    """Size and time of an encoder's weights: another training has others. ``None`` where it is no folder here."""
    try:
        stat = (encoder / "model.safetensors").stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def read_words(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read options with their values as probe.py does: the last of an option counts, of ``--set`` that of each key."""
    found: dict[str, list[str]] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            values = found.setdefault(option, [])
            values[:] = [*(values if option in _REPEATED else []), *([value] if equals else [])]
        else:
            found.setdefault(option, []).append(word)
    settings = dict(word.partition("=")[::2] for word in found.pop("--set", []))
    return {option: tuple(values) for option, values in found.items()} | {
        f"--set {key}": (value,) for key, value in settings.items()
    }


def check_alike(lanes: Sequence[MemberLane]) -> None:
    """Refuse probes that would measure in another way than those that are there: one column cannot hold both.

    Raises:
        ValueError: The message names the option, and what to do.
    """
    first: tuple[str, dict[str, tuple[str, ...]]] | None = None
    every: list[tuple[str, Sequence[str]]] = [
        (f"{lane.title} was probed", words) for lane in lanes for words in lane.measured_words()
    ]
    every += [(f"{lane.title} would be probed", words) for lane in lanes for words in lane.probe]
    for what, words in every:
        settings = {option: values for option, values in read_words(words).items() if option not in _FREE}
        if first is None:
            first = what, settings
        for option in first[1] | settings:
            if first[1].get(option) != settings.get(option):
                one, other = (_say_option(option, of.get(option)) for of in (first[1], settings))
                raise ValueError(
                    f"{first[0]} {one}, and {what} {other}: one table cannot hold both. Give the same words behind --, "
                    "or keep the other probes in a place of their own with --probes NAME."
                )


def _say_option(option: str, values: tuple[str, ...] | None) -> str:
    return f"without {option}" if values is None else " ".join(("with", option, *values))


def seconds_of(run: Path) -> float:
    """Read what a training took, in all its starts; 0 where that is not known."""
    from hf_equissl.pretraining.run_record import RunRecord

    try:
        return RunRecord.load(run).seconds
    except (OSError, ValueError):
        return 0.0


def places(asked: int | None) -> tuple[int, list[str]]:
    """Tell how many members run side by side, and the number of each GPU: one member on each, else on each core."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    devices = devices if torch.cuda.is_available() else []
    return asked or len(devices) or usable_cores(), devices


def expected_end(lanes: Sequence[MemberLane], at_once: int) -> str:
    """Say when all will be done, from what trainings and probes took so far; "" while nothing is known of them."""
    left: list[float] = []
    training, probing = known_seconds(lanes, TRAINING), known_seconds(lanes, PROBING)
    for lane in lanes:
        if lane.stage == DONE or lane.damage:
            continue
        speed, done = lane.seconds_per_step(SPEED_SECONDS), lane.steps_done()
        seconds = 0.0
        if lane.train and not lane.is_trained:
            if lane.stage == TRAINING and speed is not None and done is not None:
                seconds = speed * (done[1] - done[0])
            elif training:
                seconds = training.get(lane.system) or fmean(training.values())
            else:
                return ""
        if lane.probe and not lane.is_probed:
            seconds += fmean(probing.values()) if probing else 0.0
        left.append(seconds)
    if not left or not any(left):
        return ""
    seconds = max(max(left), sum(left) / at_once)
    end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds))
    return f"done in about {clock(seconds)}, {end}" + ("" if probing else ", without probes")


def known_seconds(lanes: Sequence[MemberLane], stage: str) -> dict[str, float]:
    """Average by system what a stage took where it is over, or will take at the present speed."""
    found: dict[str, list[float]] = {}
    for lane in lanes:
        seconds = lane.seconds.get(stage)
        if not seconds and lane.stage == stage == TRAINING:
            speed, done = lane.seconds_per_step(SPEED_SECONDS), lane.steps_done()
            seconds = speed * done[1] if speed is not None and done is not None else None
        if seconds:
            found.setdefault(lane.system, []).append(seconds)
    return {system: fmean(values) for system, values in found.items()}
