"""Pretrain a small encoder twice on photographs, without and with reconstruction, probe both, draw pictures.

python training/quickstart.py --output_dir DIR   (``make quickstart`` installs what is needed and runs this)
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `make quickstart`, or `pip install -e '.[quickstart]'`.")

from hf_equissl.training.pace import Pace, TooSlowError
from hf_equissl.training.photographs import (
    TEST_PHOTOGRAPHS,
    PhotographsMissingError,
    check_packages,
    cut_tiles,
    find_photographs,
)
from hf_equissl.training.side_by_side import CommandError, Lane, clock, follow
from hf_equissl.utils.commands import path_word, say, stop
from hf_equissl.utils.files import move_into_place, write_text

SCRIPTS = Path(__file__).resolve().parent
RECIPE = SCRIPTS / "recipes" / "quickstart.yaml"
STEPS = 600
CROPS_PER_PHOTOGRAPH = 300
TESTS = ("rotation", "color_jitter", "gaussian_blur", "translation")
PROBE = (
    "--evaluators",
    "transformation_regression",
    "effective_rank",
    "--epochs",
    "12",
    "--num_draws",
    "4",
    "--seeds",
    "2",
)
SETTINGS = "settings.json"
# R2 of rotation with reconstruction by the number of steps (without it: 0.01), which says what fewer steps cost.
ROTATION_R2 = {200: 0.01, 400: 0.69, 600: 0.78, 800: 0.88}
SMALLEST_SHOWN_ANGLE = 20.0  # degrees

DESCRIPTION = """\
Pretrain a small encoder on crops of a few photographs that scikit-image, scikit-learn and matplotlib carry: once
without and once with reconstruction. Probe both, draw pictures. About five minutes on two cores; where it would take
more than ten, fewer steps are trained."""

SUMMARY = """
Done in {time}. R2 of g's parameters, read off frozen features of photographs that were never seen in training:

{table}

What to look at in {output}:
  r2.png               the same as bars: what features keep of how an image was changed, without reconstruction
                       (lambda = 0) and with it
  reconstructions.png  held-out images. From view 1 and view 2 = g(u) alone, the decoder paints the images between u
                       and view 2. Nobody tells it the angle (left): it has to read it off the features
  loss.png             VICReg's own loss of both runs, and the reconstruction error
  results.md           the numbers with their protocol; results.json: the same for programs

Load the encoder:
  import hf_equissl
  from transformers import AutoModel
  encoder = AutoModel.from_pretrained({encoder!r})
"""


class QuickstartError(RuntimeError):
    """Something that its message says how to mend."""


@dataclass
class EncoderLane(Lane):
    """The commands of one encoder: pretraining, then probes.

    Attributes:
        encoder: Folder of the finished encoder.
        tiles: Folder of the images.
        overrides: Values that its command line sets in the recipe.
    """

    encoder: Path = Path()
    tiles: Path = Path()
    overrides: tuple[object, ...] = ()

    @property
    def probes(self) -> Path:
        """Folder of the probes' results."""
        return self.run / "probes"

    def is_pretrained(self, steps: int) -> bool:
        """Return whether a run of ``steps`` is finished and exported."""
        finished = self.run / f"checkpoint-{steps}" / "trainer_state.json"
        return finished.is_file() and (self.encoder / "model.safetensors").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for what can be mended, 1 for a command that failed, 130 if stopped."""
    options = _parser().parse_args(argv)
    try:
        check_packages()
        run(Path(options.output_dir), options.steps, options.crops_per_photograph)
    except (QuickstartError, PhotographsMissingError) as error:
        return stop(error, code=2)
    except CommandError as error:
        return stop(error, code=1)
    except KeyboardInterrupt:
        return stop("The same command goes on from the last checkpoint.", code=130, word="stopped")
    return 0


def run(output: Path, steps: int | None, crops_per_photograph: int) -> None:
    """Do everything, from photographs to pictures; what ``output`` already holds is not made again.

    Args:
        output: Folder of all results.
        steps: Steps of either training; ``None``: ``STEPS``, or as many as fit into ten minutes.
        crops_per_photograph: Images to cut.
    """
    start = time.monotonic()
    settings = claim(output, steps, crops_per_photograph)
    tiles = output / "tiles"
    counts = cut_tiles(tiles, crops_per_photograph)
    say(
        f"{tiles}: {counts['train']} crops of photographs to train on, {counts['test']} of other photographs to test on"
    )
    try:
        lanes = train_and_probe(output, tiles, settings, Pace(start, steps is None and not _has_checkpoints(output)))
    except TooSlowError as slow:
        settings = shorten(output, settings, slow.steps)
        say(f"\nAt this speed the end would come after {clock(slow.expected)}. {cost_of(settings)}\nStarting anew.")
        lanes = train_and_probe(output, tiles, settings, Pace(start, may_shorten=False))
    table = write_results(lanes, output, settings)
    draw_losses(lanes, output / "loss.png")
    draw_reconstructions(lanes[-1], output / "reconstructions.png")
    seconds = time.monotonic() - start
    say(SUMMARY.format(time=clock(seconds), table=table, output=output, encoder=str(lanes[-1].encoder)))


def train_and_probe(output: Path, tiles: Path, settings: dict[str, int], pace: Pace) -> list[EncoderLane]:
    """Pretrain and probe both encoders side by side, and say when the end is expected.

    Raises:
        TooSlowError: as ``Pace.watch``; nothing is left running.
    """
    steps = settings["steps"]
    lanes = make_lanes(output, tiles, steps)
    say(f"pretraining for {steps} steps and probing, side by side; what the commands say: {output / 'runs'}/*/*.log")

    def watch() -> None:
        if (expected := pace.watch(lanes)) is not None:
            say(f"\n{expected}")

    follow(lanes, lambda lane: pretrain_and_probe(lane, steps), watch)
    return lanes


def _has_checkpoints(output: Path) -> bool:
    return any((output / "runs").glob("*/checkpoint-*"))


def shorten(output: Path, settings: dict[str, int], steps: int) -> dict[str, int]:
    """Note that fewer steps are trained, and drop what the longer runs have begun; returns the settings."""
    shutil.rmtree(output / "runs")
    settings = {**settings, "steps": steps, "shortened_from": settings["steps"]}
    write_text(output / SETTINGS, json.dumps(settings) + "\n")
    return settings


def cost_of(settings: dict[str, int]) -> str:
    """Say what the shortening of a run costs."""
    known = ", ".join(f"{r2:.2f} after {steps} steps" for steps, r2 in ROTATION_R2.items())
    return (
        f"{settings['steps']} steps are trained in place of {settings['shortened_from']}, so that all is done in about "
        f"ten minutes. What that costs: rotations are read off less well with reconstruction (R2 {known})."
    )


def claim(output: Path, steps: int | None, crops_per_photograph: int) -> dict[str, int]:
    """Make the output folder, or make sure that what it holds was made with the same settings; returns them.

    Raises:
        QuickstartError: If it is a file, cannot be written, or holds another run.
    """
    path = output / SETTINGS
    settings = {"steps": steps or STEPS, "crops_per_photograph": crops_per_photograph}
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, json.dumps(settings) + "\n")
        stored: dict[str, int] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise QuickstartError(f"--output_dir {output} cannot be used ({error}). Name another folder.") from error
    if steps is None and "shortened_from" in stored:
        settings["steps"] = stored["steps"]
    if any(stored.get(name) != value for name, value in settings.items()):
        raise QuickstartError(f"{output} holds a run with {stored}, not {settings}. Name another --output_dir.")
    return stored


def make_lanes(output: Path, tiles: Path, steps: int) -> list[EncoderLane]:
    """Make a lane of the base method and one with reconstruction: same budget, seed, images and views."""
    from hf_equissl.recipes.recipe import Recipe

    weight = Recipe.load(RECIPE).objectives.equivariance[0]["weight"]
    common: list[object] = ["--training.max_steps", steps, "--training.use_cpu", "true"]
    common += ["--training.logging_steps", min(10, steps)]  # short runs have a curve, too
    settings = {"encoder_lambda0": 0.0, "encoder": weight}
    return [
        EncoderLane(
            title=f"lambda = {value:g}",
            run=output / "runs" / name,
            encoder=output / name,
            tiles=tiles,
            overrides=(*common, "--objectives.equivariance.0.weight", value),
        )
        for name, value in settings.items()
    ]


def pretrain_and_probe(lane: EncoderLane, steps: int) -> None:
    """Run both commands of one lane."""
    if not lane.is_pretrained(steps):
        shutil.rmtree(lane.probes, ignore_errors=True)
        words = ("--recipe", RECIPE, "--data", lane.tiles / "train", "--output_dir", lane.run, *lane.overrides)
        lane.call("pretraining", SCRIPTS / "pretrain.py", *words, bar="pretraining")
        staging = lane.run / ".copy"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(lane.run / "encoder", staging)
        move_into_place(staging, lane.encoder)
    words = ("--encoder", lane.encoder, "--data", lane.tiles, "--output_dir", lane.probes, "--device", "cpu")
    lane.call("probing", SCRIPTS / "probe.py", *words, "--tests", *TESTS, *PROBE, bar=str(lane.encoder))
    lane.finish()


def write_results(lanes: Sequence[EncoderLane], output: Path, settings: dict[str, int]) -> str:
    """Write ``results.json``, ``results.md`` and ``r2.png`` of all lanes; returns the table and how it came as text."""
    from hf_equissl.evaluation import load_records, markdown_table, plain_table, plot_r2, save_records

    found = [(lane, record) for lane in lanes for record in load_records(lane.probes / "results.json")]
    save_records([record for _, record in found], output / "results.json")
    shown = [replace(record, encoder=lane.title) for lane, record in found if record.metric == "r2"]
    notes = [describe_training(lanes, settings["steps"])]
    notes += [cost_of(settings)] if "shortened_from" in settings else []
    write_text(output / "results.md", "\n\n".join([markdown_table(shown).rstrip(), *notes]) + "\n")
    figure = plot_r2(shown)
    figure.axes[0].set_title("What frozen features tell about g(I), on held-out photographs", fontsize="medium")
    figure.set_size_inches(7.2, 3.8)
    figure.savefig(output / "r2.png", dpi=150)
    return "\n\n".join([plain_table(shown).rstrip(), *notes])


def describe_training(lanes: Sequence[EncoderLane], steps: int) -> str:
    """Say for how long and on what the encoders were trained, from the records of their runs."""
    from hf_equissl.pretraining.run_record import RunRecord

    records = {lane.title: RunRecord.load(lane.run) for lane in lanes}
    times = ", ".join(f"{clock(record.seconds)} ({title})" for title, record in records.items())
    last = list(records.values())[-1]
    return f"Trained for {steps} steps in {last.precision} on {last.hardware['cpu']}: {times}."


def draw_losses(lanes: Sequence[EncoderLane], path: Path) -> None:
    """Draw the loss curves of all runs."""
    from hf_equissl.checkpoints import newest_checkpoint
    from hf_equissl.utils.figures import plot_losses

    histories = {}
    for lane in lanes:
        state = Path(newest_checkpoint(lane.run) or lane.run) / "trainer_state.json"
        histories[lane.title] = json.loads(state.read_text())["log_history"]
    panels = {"loss_ssl": "VICReg loss", "reconstruction/loss_recon": "reconstruction error (MSE)"}
    plot_losses(histories, panels, path)


def draw_reconstructions(lane: EncoderLane, path: Path) -> None:
    """Draw views of held-out photographs as in training, the targets, and the decoder's images."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    from hf_equissl.recipes.recipe import Recipe
    from hf_equissl.utils.figures import denormalize, plot_image_grid
    from hf_equissl.views.needs import Needs

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(lane.encoder)
    count = encoder.config.num_intermediate_images
    fractions = tuple(k / (count + 1) for k in range(1, count + 1))
    pipeline = Recipe.load(lane.run / "recipe.yaml").build_pipeline(Needs(fractions=fractions, parameters=True))
    views = views_to_show(pipeline)
    first, second = views.global_crops
    with torch.inference_mode():
        reconstructions = encoder.reconstruct(first, second)

    def pixels(images: Any) -> Any:
        return denormalize(images, pipeline.image_mean, pipeline.image_std)

    steps = [f"{k}/{count + 1} of g" for k in range(1, count + 1)]
    groups = {
        "views": {"view 1": pixels(first), "view 2 = g(u)": pixels(second)},
        "targets": dict(zip(steps, pixels(views.intermediate_images).unbind(1), strict=True)),
        "reconstructions": dict(zip(steps, pixels(reconstructions).unbind(1), strict=True)),
    }
    plot_image_grid(groups, [f"{angle:+.0f}\N{DEGREE SIGN}" for angle in views.parameters[:, 0].tolist()], path)


def views_to_show(pipeline: Any, per_photograph: int = 2) -> Any:
    """Make views of the middle of each held-out photograph, with the first draws that turn it visibly."""
    from hf_equissl.views.base import Item
    from hf_equissl.views.collator import collate_views

    rng = np.random.default_rng(0)
    samples: list[dict[str, Any]] = []
    for path in find_photographs(TEST_PHOTOGRAPHS):
        photograph = Image.open(path).convert("RGB")
        square = ImageOps.fit(photograph, (min(photograph.size),) * 2)
        wanted = len(samples) + per_photograph
        while len(samples) < wanted:
            sample = pipeline.crop(Item((square,)), rng)
            angle = pipeline.transformation.sample(sample["draws"][None, : pipeline.transformation.num_draws])[0, 0]
            if abs(angle) >= SMALLEST_SHOWN_ANGLE:
                samples.append({**sample, "index": len(samples)})
    batch = collate_views(samples)
    batch.pop("skipped", None)
    return pipeline(batch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quickstart.py", description=DESCRIPTION, allow_abbrev=False)
    folder, crops = "quickstart_output", CROPS_PER_PHOTOGRAPH
    add = parser.add_argument
    add(
        "--output_dir",
        default=folder,
        type=path_word,
        metavar="DIR",
        help=f"default: {folder}; a run that was stopped goes on",
    )
    add("--steps", type=_positive, metavar="N", help=f"of either training; default: {STEPS}, fewer on a slow machine")
    add("--crops_per_photograph", type=_positive, default=crops, metavar="N", help=f"images to cut; default: {crops}")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # these act as Ctrl-C: otherwise the commands would train on
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it, and so it stays
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
