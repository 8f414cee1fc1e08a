"""Train the systems of a sweep, probe each encoder, and put all in one table: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.distributed.signals import EXIT_PREEMPTED, Preempted, Signals
from hf_equissl.training.members import PROBING, RESULTS, MemberLane, check_alike, expected_end, places, read_words
from hf_equissl.training.recipe_options import RECIPES, find_recipe, import_words, parse_words
from hf_equissl.training.side_by_side import DONE, CommandError, follow_on_devices
from hf_equissl.training.step_times import StepTimes
from hf_equissl.training.sweep import (
    add_options,
    check_output_dir,
    dry_run,
    load_recipes,
    pretrain_words,
    read_members,
)
from hf_equissl.utils.commands import check_at_least, command_parser, say, stop
from hf_equissl.utils.files import write_text
from hf_equissl.utils.suggestions import RecipeError

PROBES, UNTRAINED, RAW_PIXELS = "probes", "untrained", "raw_pixels"
TABLE, PLOT = "table.md", "table.png"  # beside the records of all systems, RESULTS
REGRESSION = "transformation_regression"  # the one task of raw pixels
FEATURES = ("backbone", "equivariant")
PROBE_WORDS = (
    *("--seeds", "1"),
    *(word for name in ("linear", "knn", "effective_rank") for word in ("--set", f"{name}.features=[backbone]")),
)
# Images of up to 64 pixels: about half a minute per family on one core. Others have the probe's own settings.
SMALL_PROBE_WORDS = (
    *("--set", f"{REGRESSION}.train_images=25000"),
    *("--epochs", "12", "--num_draws", "1"),
)

DESCRIPTION = """\
Train the systems of a sweep, several side by side, probe each encoder, and write records, a table and a plot: rows are
systems, values mean and standard deviation over the seeds of training. Members of a sweep that differ in training.seed
alone are one system."""

EPILOG = f"""\
DIR/NAME holds each run, as sweep.py leaves it, and its probes; DIR/probes the table ({TABLE}), the records
({RESULTS}), both written anew whenever a member is done, and in the end the plot ({PLOT}).
Run the same command again to go on: finished runs are skipped, wherever they were trained, an interrupted one resumes,
what is probed is kept, also when DIR/NAME/encoder is deleted to save space. A member that fails does not stop the
others. Ctrl-C and SIGTERM stop all of them; code 75 after SIGTERM. Each run is one process here; on several devices
train with sweep.py first.
What stands behind -- goes to probe.py, after these words: {" ".join(PROBE_WORDS)}
and for images of up to 64 pixels: {" ".join(SMALL_PROBE_WORDS)}

examples:
  python training/compare.py --recipe cifar10_systems --data uoft-cs/cifar10 --output_dir runs/systems
  # what is finished by now, with few images, in a table of its own
  python training/compare.py --recipe cifar10_systems --data uoft-cs/cifar10 --output_dir runs/systems \\
      --finished_only --probes quick -- --train_images 500 --test_images 500 --epochs 2
  # two systems without black corners, too; crops and flips beside the four families
  python training/compare.py --recipe cifar10_systems --data uoft-cs/cifar10 --output_dir runs/systems \\
      --only vicreg vicreg_rot --fill zeros reflect -- --tests rotation crop flip
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 2 for what can be mended before the first run, 1 if a member failed, 75 after SIGTERM, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    try:
        options, overrides = parse_words(_parser(), words[:split])
        check_at_least(options, **({"side_by_side": 1} if options.side_by_side is not None else {}), step_repeats=0)
        if options.dry_run:
            return dry_run(read_members(options, overrides), overrides, options)
        check_output_dir(options)
        comparison = Comparison(options, overrides, words[split + 1 :])
        if options.list:
            say(comparison.listing())
            return 0
        comparison.check()
        comparison.write()
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    try:
        with Signals() as signals:
            signals.raises = False
            return comparison.run(signals)
    except KeyboardInterrupt:
        return stop("the same command goes on from here", code=130, word="stopped")
    except Preempted as stopped:
        return stop(stopped, code=EXIT_PREEMPTED, word="stopped")
    except (ValueError, OSError, CommandError) as error:
        return stop(error, code=1)


class Comparison:
    """All members of a sweep with what is held against them, and the table of those that are probed.

    Args:
        options: The command's.
        overrides: Values of the recipe for the chosen members.
        probe_words: What stands behind ``--``.

    Raises:
        ValueError: The definition or an option is wrong, or nothing is chosen.
    """

    def __init__(self, options: argparse.Namespace, overrides: dict[str, Any], probe_words: Sequence[str]) -> None:
        from hf_equissl.recipes.sweep import group_by_system, read_sweep

        everyone, chosen = read_sweep(find_recipe(options.recipe), [RECIPES]), read_members(options, overrides)
        self.options, self.overrides, self.probe_words = options, overrides, list(probe_words)
        self.output, self.probes = Path(options.output_dir), "_".join(filter(None, (PROBES, options.probes)))
        # Those that are not chosen are rows of the table, too, where they are probed.
        self.recipes = load_recipes(chosen, overrides)
        for member in everyone:
            if member not in chosen:
                self.recipes |= load_recipes([member], _common(overrides, member))
        trained = [
            self._member(member, system, member in chosen)
            for system, members in group_by_system(everyone).items()
            for member in members
        ]
        evaluators = read_words(self.probe_words).get("--evaluators", (REGRESSION,))
        with_pixels = RAW_PIXELS in options.references and REGRESSION in evaluators
        pixels = self._raw_pixels(trained) if with_pixels else []
        untrained = self._untrained(trained) if UNTRAINED in options.references else []
        self.lanes = [*pixels, *untrained, *trained]
        for lane in (*pixels, *untrained):
            lane.damage = lane.find_damage(None)
        self.chosen = [lane for lane in self.lanes if lane.probe]
        if not self.chosen:
            raise RecipeError("--finished_only: no chosen member is finished. Leave it out, or wait for one.")
        for words in self.chosen[0].probe:
            check_probe_words(words)
        self.steps = StepTimes(self.output / self.probes, find_recipe(options.recipe), overrides)
        self.said: set[str] = set()

    def check(self) -> None:
        """Refuse what one table cannot hold, before anything runs.

        Raises:
            ValueError: The encoders see images of several sizes, or probes have other words than those that are there.
        """
        recipes = {lane.title: self.recipes[lane.title] for lane in self.chosen if lane.train}
        sizes = {
            str(recipe.build_encoder_config().image_size): title
            for title, recipe in recipes.items()
            if recipe.model.get("init_from") is None
        }
        if len(sizes) > 1:
            found = ", ".join(f"{size} ({title})" for size, title in sizes.items())
            raise RecipeError(
                f"one table holds images of one size, and the members have several: {found}. Choose those of one size "
                "with --only, and give each size a place of its own with --probes NAME."
            )
        check_alike([lane for lane in self.lanes if not lane.why_no_row(self.recipes.get(lane.title))])

    def _member(self, member: Any, system: str, is_chosen: bool) -> MemberLane:
        from hf_equissl.running.resume import is_finished

        recipe = self.recipes[member.name]
        lane = self._lane(member.name, system, recipe)
        lane.train = pretrain_words(member, self.overrides, lane.run)
        lane.damage = lane.find_damage(recipe)
        if is_chosen:
            lane.probe = self._probe_commands(lane, recipe)
        if is_chosen and not lane.damage:
            lane.is_trained = is_finished(recipe, lane.run) or (lane.is_kept and not lane.why_no_row(recipe))
            if self.options.finished_only and not lane.is_trained:
                lane.probe = []
        return lane

    def _lane(self, name: str, system: str, recipe: Any) -> MemberLane:
        from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments

        seed = recipe.training.get("seed", EquiSSLTrainingArguments.seed)
        run = self.output / name
        return MemberLane(name, run, system=system, seed=seed, probes=run / self.probes)

    def _untrained(self, trained: Sequence[MemberLane]) -> list[MemberLane]:
        """Make a lane for random weights of each architecture and seed; it is a member of the table like any other."""
        names: dict[str, str] = {}  # architecture -> its system
        lanes: dict[str, MemberLane] = {}
        for member in trained:
            recipe = self.recipes[member.title]
            if recipe.model.get("init_from") is not None:
                continue  # it starts from the weights of another encoder
            architecture = recipe.build_encoder_config().to_json_string()
            system = names.setdefault(architecture, f"{UNTRAINED}_{member.system}" if names else UNTRAINED)
            lane = self._lane(f"{system}_seed-{member.seed}", system, recipe)
            lane = lanes.setdefault(lane.title, lane)
            if member.probe and not lane.probe:
                lane.untrained, lane.probe = recipe, self._probe_commands(lane, recipe)
        return list(lanes.values())

    def _raw_pixels(self, trained: Sequence[MemberLane]) -> list[MemberLane]:
        """Make a lane for the images themselves, of each size: what R2 is read beside."""
        lanes: dict[int, MemberLane] = {}
        for member in trained:
            recipe = self.recipes[member.title]
            size = recipe.build_encoder_config().image_size
            if size not in lanes:
                name = f"{RAW_PIXELS}_{size}" if lanes else RAW_PIXELS
                run = self.output / name
                lanes[size] = MemberLane(name, run, system=name, probes=run / self.probes, source=RAW_PIXELS)
            if member.probe and not lanes[size].probe:
                more = ("--image_size", str(size), "--evaluators", REGRESSION)
                lanes[size].probe = self._probe_commands(lanes[size], recipe, *more)
                if "--evaluators" in read_words(self.probe_words):  # they may name what raw pixels cannot do
                    lanes[size].probe = [[*words, "--evaluators", REGRESSION] for words in lanes[size].probe]
        return list(lanes.values())

    def _probe_commands(self, lane: MemberLane, recipe: Any, *more: str) -> list[list[str]]:
        """Write the words of the probes of one encoder, one command for each way to fill images.

        Raises:
            RecipeError: No data set is named.
        """
        from hf_equissl.evaluation.protocols import protocol_for

        source, config = recipe.data.get("source"), recipe.build_encoder_config()
        if not source:
            raise RecipeError("data.source: no data set is named. Give one with --data.")
        features = FEATURES if config.feature_size and config.equivariant_size else FEATURES[:1]
        words = ["--encoder", str(lane.encoder), "--data", str(source), "--output_dir", str(lane.probes)]
        words += [*import_words({"imports": recipe.imports}), "--features", *features, *PROBE_WORDS, *more]
        words += [*(SMALL_PROBE_WORDS if protocol_for(config.image_size) == "small" else ()), *self.probe_words]
        return [[*words, *(() if fill is None else ("--fill", fill))] for fill in self.options.fill or [None]]

    def listing(self) -> str:
        """Say of each chosen member how far it is."""
        width = max(len(lane.title) for lane in self.chosen)
        lines = [f"{lane.title:<{width}}  {lane.state}" for lane in self.chosen]
        return "\n".join([*lines, f"{len(lines)} members of {len({lane.system for lane in self.chosen})} systems"])

    def run(self, signals: Signals) -> int:
        """Train and probe what is missing, several members side by side; returns the exit code.

        Raises:
            Preempted: A signal asked to stop.
        """
        at_once, devices = places(self.options.side_by_side)
        for lane in self.chosen:
            lane.prepare()
        written = 0

        def watch() -> str:
            nonlocal written
            listen(signals)
            if (done := sum(lane.stage == DONE for lane in self.chosen)) > written:
                written = done
                try:
                    self.write()
                except ValueError as error:  # the trainings that run have nothing to do with it
                    self._say_once(f"No table: {error}")
                except OSError as error:  # such as a full disk; its message names another temporary file each time
                    why = error.strerror or error
                    self._say_once(f"No table in {self.output / self.probes} for now: {why}. The trainings go on.")
            return expected_end(self.chosen, at_once)

        say(f"{len(self.chosen)} members, {at_once} side by side; what their commands say: {self.output}/*/*.log")
        follow_on_devices(self.chosen, at_once, devices, watch)
        problems = []
        if failed := [lane.title for lane in self.chosen if lane.failure]:
            problems.append(f"{len(failed)} of {len(self.chosen)} members failed: {', '.join(failed)}")
        try:
            self.write(plot=True)
            if self.options.step_repeats:
                trained = [lane for lane in self.chosen if lane.train and not lane.failure]
                known = self.steps.read().get("systems", {})
                systems = {lane.system: self.recipes[lane.title] for lane in self.lanes if lane.system in known}
                systems |= {lane.system: self.recipes[lane.title] for lane in trained}
                self.steps.measure(systems, self.options.step_repeats, lambda: listen(signals))
            say(f"\n{self.write()}\nWritten to {self.output / self.probes}: {TABLE}, {RESULTS}, {PLOT}")
        except (ValueError, OSError) as error:
            problems.append(str(error))
        return stop("; ".join(problems), code=1) if problems else 0

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            say(f"\n{text}")

    def write(self, plot: bool = False) -> str:
        """Write table and records of all members that are probed by now, and the ``plot``; returns the table.

        Raises:
            ValueError: Two members were probed in different ways.
        """
        from hf_equissl.evaluation import comparison, load_records, save_records

        # Of a member that is being probed only a part is there.
        over = [lane for lane in self.lanes if lane.stage != PROBING]
        probed = {lane.title: lane for lane in over if (lane.probes / RESULTS).is_file()}
        reasons = {title: lane.why_no_row(self.recipes.get(title)) for title, lane in probed.items()}
        left_out = {title: reason for title, reason in reasons.items() if reason}
        measured = [
            comparison.Measured(lane.system, lane.seed, comparison.newest_encoder(load_records(lane.probes / RESULTS)))
            for title, lane in probed.items()
            if title not in left_out
        ]
        notes = [f"Left out: {'; '.join(left_out.values())}."] if left_out else []
        for sentence in notes:
            self._say_once(sentence)
        if not measured:
            return ""
        try:
            merged = comparison.merge_systems(measured)
        except comparison.UnlikeProtocolsError as error:
            raise ValueError(f"{error} --probes NAME does so.") from error
        rows = list(dict.fromkeys(lane.system for lane in self.lanes))
        folder = self.output / self.probes
        folder.mkdir(parents=True, exist_ok=True)
        save_records(merged, folder / RESULTS)
        column, note = self.steps.column()
        write_text(folder / TABLE, comparison.comparison_text(merged, rows, column, [*note, *notes]))
        try:
            if plot:
                comparison.plot_comparison(merged, rows, folder / PLOT)
        except ImportError as error:
            say(f"No plot: {error}")
        return comparison.plain_comparison(merged, rows, column)


def _common(overrides: dict[str, Any], member: Any) -> dict[str, Any]:
    """Take the overrides of the chosen members that a row beside them has to share: how it is trained, on what."""
    shared = {key: value for key, value in overrides.items() if key.partition(".")[0] in ("training", "data")}
    return {key: value for key, value in shared.items() if key not in member.overrides and key != "training.seed"}


def check_probe_words(words: Sequence[str]) -> None:
    """End the command with probe.py's own message where it does not understand ``words``."""
    from hf_equissl.evaluation.cli import parse_words, read_settings

    read_settings(parse_words(list(words)).set)


def listen(signals: Signals) -> None:
    """Raise ``Preempted`` once a signal asked to stop."""
    if signals.received:
        raise Preempted(f"{signals.received}: the same command goes on from here")


def _parser() -> argparse.ArgumentParser:
    usage = "compare.py --recipe NAME|PATH --data SOURCE --output_dir DIR [options] [--section.key VALUE ...] [-- ...]"
    parser = command_parser("compare.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    add_options(parser, "how far each member is")
    add = parser.add_argument
    add("--side_by_side", type=int, metavar="N", help="members at once; default: one per GPU, or per core without one")
    add("--finished_only", action="store_true", help="train nothing: probe what is finished")
    add("--fill", nargs="+", metavar="FILL", help="probe once with each: zeros, reflect, circle; default: zeros")
    add(
        "--references",
        nargs="*",
        choices=[RAW_PIXELS, UNTRAINED],
        default=[RAW_PIXELS, UNTRAINED],
        help="further rows: raw_pixels, the images as their own features; untrained, the same encoder with random "
        "weights of each seed; default: both, without a word: none",
    )
    add("--probes", metavar="NAME", help=f"keep these probes apart, in folders {PROBES}_NAME in place of {PROBES}")
    text = "timed steps of each system and its base, in turns, when all else is done; 0: none; default: 5"
    add("--step_repeats", type=int, default=5, metavar="N", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
