"""Run a suite of tasks on one or several encoders, and write one report: see ``--help``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.distributed.signals import EXIT_PREEMPTED, Preempted, Signals
from hf_equissl.encoders.places import RAW_PIXELS, check_measured, is_raw_pixels, split_untrained
from hf_equissl.evaluation.cli import LEFT_OUT, distinct_encoders
from hf_equissl.training.members import RESULTS, SCRIPTS, places, weights_of
from hf_equissl.training.recipe_options import add_import, import_words
from hf_equissl.training.side_by_side import CommandError, Lane, StoppedError, follow_on_devices
from hf_equissl.training.suite import FINETUNE, PROBE, SUITES, Suite, SuiteTask, check_words, read_suite
from hf_equissl.utils.commands import check_at_least, command_parser, log_plainly, path_word, say, stop
from hf_equissl.utils.files import write_text
from hf_equissl.utils.imports import import_named
from hf_equissl.utils.suggestions import RecipeError, check_known

NOTE, REPORT = "task.json", "report"
FINETUNING_BAR = ""  # that of transformers has no name

DESCRIPTION = """\
Run a suite of tasks on one or several encoders, and write one report over all of them: a table, differences to a
baseline, pictures, records. A suite names probes (probe.py) and fine-tuning tasks (finetune.py) with their data and
settings; what an encoder's kind does not allow is left out, with the reason."""

EPILOG = f"""\
DIR/ENCODER/TASK holds what each command leaves, and its log; DIR/{REPORT} the report, written anew after each task.
Run the same command again to go on: what is done is kept, an interrupted fine-tuning resumes. Further encoders and
tasks may join later; a task with other settings than before is refused. A task that fails does not stop the others.
Ctrl-C and SIGTERM stop all; code 75 after SIGTERM.

examples:
  # any labelled images; raw pixels and random weights stand beside the encoder
  python training/evaluate_encoder.py --suite quick --encoder runs/rot/encoder --data ./photos --output_dir evaluation
  # two encoders, and by how much the second is better
  python training/evaluate_encoder.py --suite cifar10 --encoder runs/base/encoder --encoder runs/rot/encoder \\
      --baseline base/encoder --output_dir evaluation
  # a suite of your own; what would run?
  python training/evaluate_encoder.py --suite mine.yaml --encoder facebook/dinov2-small --output_dir out --dry_run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 2 for what can be mended before the first task, 1 if a task failed, 75 after SIGTERM, 130 after Ctrl-C.
    """
    try:
        import_named(argv)
        options = _parser().parse_args(argv)
        check_at_least(options, **({"side_by_side": 1} if options.side_by_side is not None else {}))
        lanes = plan(options)
        if options.dry_run:
            say("\n".join(f"{job.folder}: {job.script} {' '.join(job.words)}" for lane in lanes for job in lane.jobs))
            return 0
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    log_plainly()
    try:
        with Signals() as signals:
            signals.raises = False
            return run(lanes, options, signals)
    except KeyboardInterrupt:
        return stop("the same command goes on from here", code=130, word="stopped")
    except Preempted as stopped:
        return stop(stopped, code=EXIT_PREEMPTED, word="stopped")
    except (ValueError, OSError) as error:
        return stop(error, code=1)


@dataclass
class Job:
    """One task on one encoder: a command, its words and its folder."""

    kind: str
    source: str
    folder: Path
    words: list[str]

    @property
    def script(self) -> str:
        """File of the command."""
        return f"{self.kind}.py"

    def noted(self) -> dict[str, Any]:
        """Read what was written down of it; empty where it has not begun."""
        path = self.folder / NOTE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def note(self, done: bool, left_out: Sequence[str] = ()) -> None:
        """Write down that it has begun, or is done, and what was left out."""
        said = {**self._state(), "done": done, "left_out": list(left_out)}
        write_text(self.folder / NOTE, json.dumps(said, indent=2) + "\n")

    def _state(self) -> dict[str, Any]:
        architecture = split_untrained(self.source)
        weights = None if architecture else weights_of(Path(self.source))
        return {"settings or data": self.words, "weights": weights}

    def check(self) -> None:
        """Refuse to measure in the place of another measurement.

        Raises:
            RecipeError: It says what differs, and what to do.
        """
        noted = self.noted()
        for what, value in self._state().items():
            if noted and noted[what] != value:
                raise RecipeError(
                    f"{self.folder} was measured with other {what}. Name another --output_dir, or delete that folder."
                )

    def why_not(self) -> str:
        """Say why the encoder's kind does not allow the task; probe.py says it itself."""
        if self.kind == PROBE:
            return ""
        from hf_equissl.finetuning.tasks import make_task
        from hf_equissl.finetuning.tasks.base import UnfitEncoderError

        settings = check_words(FINETUNE, self.words, self.folder.name)
        options = {"trust_remote_code": settings.trust_remote_code, **settings.hub_options}
        try:
            make_task(settings.task, settings.task_options).check_encoder(settings.encoder, **options)
        except UnfitEncoderError as error:
            return f"{self.folder.name} is not run for {self.source}: {error}"
        return ""


@dataclass
class SuiteLane(Lane):
    """All tasks of one encoder, one after the other.

    Attributes:
        jobs: The tasks.
        failures: Those that failed.
        done: How many are over.
    """

    jobs: list[Job] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    done: int = 0

    def work(self) -> None:
        """Do what is not done; a task that fails does not stop the others."""
        for job in self.jobs:
            try:
                if not job.noted().get("done"):
                    self._do(job)
            except StoppedError:
                raise
            except (CommandError, ValueError, OSError) as error:
                self.failures.append(str(job.folder))
                say(f"\n{job.folder} failed, the others go on. {error}")
            self.done += 1

    def _do(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.note(done=False)
        left_out = [reason] if (reason := job.why_not()) else []
        if not left_out:
            self.run = job.folder
            bar = job.source if job.kind == PROBE else FINETUNING_BAR
            self.call(job.folder.name, SCRIPTS / job.script, *job.words, bar=bar)
            if job.kind == PROBE:
                left_out = json.loads((job.folder / LEFT_OUT).read_text(encoding="utf-8"))
        job.note(True, left_out)


def plan(options: argparse.Namespace) -> list[SuiteLane]:
    """Make the lanes of a suite, all of whose words are checked.

    Raises:
        ValueError: Something in the suite or on the command line is wrong, or was measured in another way before.
    """
    suite, tasks = read_suite(options.suite)
    for name in options.only or ():
        check_known(name, [task.name for task in tasks], "--only")
    encoders = distinct_encoders(options.encoder)
    for source in encoders:
        check_measured(source)
    given = [source for source in encoders if not is_raw_pixels(source) and split_untrained(source) is None]
    further = [f"untrained:{source}" for source in given] if "untrained" in suite.references else []
    further += [RAW_PIXELS] if RAW_PIXELS in suite.references else []
    lanes = []
    for source in distinct_encoders([*encoders, *further]):
        folder = Path(options.output_dir) / re.sub(r"[^\w.@-]+", "_", source).strip("._")[-100:]
        jobs = [
            job
            for task in tasks
            if (not options.only or task.name in options.only) and (task.kind == PROBE or source in given)
            for job in _jobs(suite, task, source, folder, options)
        ]
        lanes.append(SuiteLane(source, folder, jobs=jobs))
    if len({Path(options.output_dir) / REPORT, *(lane.run for lane in lanes)}) <= len(lanes):
        raise RecipeError(f"--encoder: two of {', '.join(encoders)} would share a folder. Measure one elsewhere.")
    every = [job for lane in lanes for job in lane.jobs]
    for job in every:
        check_words(job.kind, job.words, f"{options.suite}, task {job.folder.name}")
    _give_size([job for job in every if is_raw_pixels(job.source)], given)
    for job in every:
        job.check()
    return lanes


def _jobs(suite: Suite, task: SuiteTask, source: str, folder: Path, options: argparse.Namespace) -> Iterator[Job]:
    """Make the one command of a probe, or one for each seed of a fine-tuning."""
    data = task.data or options.data or suite.data
    if data is None:
        raise RecipeError(f"--suite {options.suite}: it names no images for {task.name}. Give them with --data.")
    for seed in task.seeds:
        place = folder / (task.name if len(task.seeds) == 1 else f"{task.name}_seed-{seed}")
        words = ["--encoder", source, "--data", data, "--output_dir", str(place)]
        words += [*import_words({"imports": options.imports or ()}), *task.words]
        words += ["--skip_unfit"] if task.kind == PROBE else ["--seed", str(seed)]
        yield Job(task.kind, source, place, words)


def _give_size(jobs: Sequence[Job], given: Sequence[str]) -> None:
    """Tell raw pixels, which have no size of their own, at which one the encoders see images.

    Raises:
        RecipeError: They see images of several sizes, or there are none.
    """
    if not (jobs := [job for job in jobs if "--image_size" not in job.words]):
        return
    from hf_equissl.encoders.loading import read_image_size

    sizes = {read_image_size(source): source for source in given}
    if len(sizes) != 1:
        found = ", ".join(f"{size} ({source})" for size, source in sizes.items())
        raise RecipeError(
            f"{RAW_PIXELS}: the encoders see images of {found or 'no size'}. Give those of each size a folder of their "
            "own, or image_size to every probe."
        )
    for job in jobs:
        job.words += ["--image_size", str(next(iter(sizes)))]


def run(lanes: Sequence[SuiteLane], options: argparse.Namespace, signals: Signals) -> int:
    """Do all that is missing, several encoders side by side; returns the exit code.

    Raises:
        Preempted: A signal asked to stop.
    """
    at_once, devices = places(options.side_by_side)
    folder, total, written = Path(options.output_dir), sum(len(lane.jobs) for lane in lanes), 0

    def watch() -> str:
        nonlocal written
        if signals.received:
            raise Preempted(f"{signals.received}: the same command goes on from here")
        if (done := sum(lane.done for lane in lanes)) > written:
            written = done
            try:
                write_report(lanes, folder)
            except (ValueError, OSError) as error:  # the tasks that run have nothing to do with it
                say(f"\nNo report for now: {error}")
        return f"{done} of {total} tasks"

    say(f"{total} tasks of {len(lanes)} encoders, {at_once} encoders side by side; logs: {folder}/*/*/*.log")
    follow_on_devices(lanes, at_once, devices, watch)
    failed = [name for lane in lanes for name in lane.failures]
    problems = [f"{len(failed)} of {total} tasks failed: {', '.join(failed)}"] if failed else []
    try:
        for line in write_report(lanes, folder, options.baseline):
            say(line)
    except ValueError as error:  # nothing is known of the baseline
        problems.append(str(error))
    return stop("; ".join(problems), code=1) if problems else 0


def write_report(lanes: Sequence[SuiteLane], folder: Path, baseline: str | None = None) -> list[str]:
    """Write the report over all that is measured; returns lines about it for people.

    Raises:
        ValueError: As ``write_encoder_report``.
    """
    from hf_equissl.evaluation import load_records
    from hf_equissl.evaluation.encoder_report import join_encoders, write_encoder_report
    from hf_equissl.evaluation.report import plain_table

    jobs = [job for lane in lanes for job in lane.jobs]
    left_out = [sentence for job in jobs for sentence in job.noted().get("left_out", ())]
    files = [file for job in jobs if (file := job.folder / RESULTS).is_file()]
    records = join_encoders([record for file in files for record in load_records(file)])
    if not records:
        return [*left_out, "Nothing is measured."]
    written = write_encoder_report(records, folder / REPORT, baseline, remarks=left_out)
    names = ", ".join(path.name for path in written)
    return [plain_table(records), *left_out, f"Written to {folder / REPORT}: {names}"]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate_encoder.py", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    shipped = ", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))
    add("--suite", required=True, type=path_word, metavar="NAME|PATH", help=f"{shipped}, or a YAML file")
    text = "folder or Hub id that AutoModel loads, or what else probe.py takes; repeat for several"
    add("--encoder", action="append", required=True, type=path_word, metavar="PATH_OR_ID", help=text)
    add("--data", type=path_word, metavar="SOURCE", help="images of all tasks whose suite names none of their own")
    add("--output_dir", required=True, type=path_word, metavar="DIR", help="a folder for each encoder, and the report")
    add("--baseline", metavar="NAME", help="encoder that the others are compared with: its name, or the end of it")
    add("--only", nargs="+", metavar="TASK", help="these tasks of the suite")
    text = "encoders at once; default: one per GPU, or per core without one"
    add("--side_by_side", type=int, metavar="N", help=text)
    add("--dry_run", action="store_true", help="print the commands, run none")
    add_import(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
