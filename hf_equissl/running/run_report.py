"""One page about a run that has ended: what was run, how the losses went, speed, memory, and what came out.

``report.md`` lies in the output folder, with its curves (``losses.png``, where matplotlib is installed and there are
enough log lines) and the run's own pictures (``reconstructions.png``, ``monitor.png``). ``training.run_report: false``
switches it off.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch

from ..pretraining.pictures import PICTURES_FILE
from ..pretraining.run_record import RunRecord
from ..utils.figures import plot_losses
from ..utils.files import readable_size, write_text
from ..utils.machine import resident_peak
from ..utils.markdown import code, fence, plain, table
from .online_monitor import PANELS, PLOT_FILE, load_records
from .output_folder import CURVES_FILE, KEPT_REPORT, REPORT_FILE

logger = logging.getLogger(__name__)
# Fewer points make no curve worth a picture.
FEWEST_POINTS = 10


def write_report(folder: str | Path, name: str, history: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write the page. It is of no use to training: what cannot be written is a warning.

    Args:
        folder: The run's output folder, with ``run.json``.
        name: The recipe's.
        history: ``log_history`` of the Trainer.

    Returns:
        Its path; ``None`` where it could not be written.
    """
    folder = Path(folder)
    try:
        record = RunRecord.load(folder)
        curves = _draw_curves(folder, name, history)
        parts = [
            f"{KEPT_REPORT}\n\n# {plain(name)}",
            _what_was_run(record),
            *_losses(history, curves),
            *_monitor(folder),
            *_picture(folder, PICTURES_FILE, "Reconstructions", "Of images of the last step, as they were trained."),
            _what_next(folder),
        ]
        path = folder / REPORT_FILE
        write_text(path, "\n\n".join(parts) + "\n")
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be written in %s (%s). The run is whole without it.", REPORT_FILE, folder, error)
        return None
    return path


def _what_was_run(record: RunRecord) -> str:
    batch = record.batch
    arithmetic = f"{batch['per_device']} x {batch['processes']} x {batch['accumulation']} = {record.global_batch}"
    hardware = record.hardware
    images = f"{record.num_images:,} images" if record.num_images else "a stream"
    rows = [
        ("data", f"{plain(record.data)}, {images}"),
        ("optimizer steps", f"{record.steps:,}"),
        ("images per step", f"{arithmetic} (per device x processes x accumulation)"),
        ("precision", record.precision),
        ("hardware", plain(f"{hardware.get('devices', 1)} x {hardware.get('device')}")),
        ("wall time", f"{record.seconds / 60:.1f} min" + (f" in {record.starts} starts" if record.starts > 1 else "")),
        ("images per second, all steps", f"{record.steps * record.global_batch / max(record.seconds, 1e-9):.1f}"),
        ("peak memory, main process", _peak_memory()),
        ("started, ended (UTC)", f"{record.started}, {record.finished or 'not ended'}"),
        ("versions", ", ".join(plain(f"{name} {version}") for name, version in record.versions.items())),
        *(("changed on the way", plain(change.text)) for change in record.changes),
    ]
    return f"{fence(record.command, 'bash')}\n\n{table([('run', ''), *rows])}"


def _peak_memory() -> str:
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return f"{readable_size(peak)} on the device"
    try:
        return readable_size(resident_peak())
    except (OSError, StopIteration):  # only Linux says it
        return "unknown"


def _losses(history: Sequence[Mapping[str, Any]], curves: bool) -> Iterator[str]:
    entries = [entry for entry in history if "loss" in entry]
    if not entries:
        return
    first, last = entries[0], entries[-1]
    yield "## Losses"
    keys = [key for key in last if _is_number(last[key]) and (key.startswith("loss") or "/" in key)]
    keys += [key for key in ("feature_std", "effective_rank", "grad_norm", "learning_rate") if key in last]
    rows = [[code(key), _number(first.get(key)), _number(last[key])] for key in keys]
    yield table([["", f"step {first['step']:,}", f"step {last['step']:,}"], *rows])
    if curves:
        yield f"![losses]({CURVES_FILE})"
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    if speeds:
        waits = [entry["data_wait"] for entry in entries if "data_wait" in entry]
        wait = f" Training stood still for data {sum(waits) / len(waits):.0%} of the time." if waits else ""
        yield f"Images per second between log lines: {median(speeds):.1f} (median).{wait}"


def _draw_curves(folder: Path, name: str, history: Sequence[Mapping[str, Any]]) -> bool:
    entries = [entry for entry in history if "loss" in entry]
    if len(entries) < FEWEST_POINTS or find_spec("matplotlib") is None:
        return False
    panels = {key: key for key in entries[-1] if key.startswith("loss") or key == "effective_rank"}
    plot_losses({name: entries}, panels, folder / CURVES_FILE, columns=3)
    return True


def _monitor(folder: Path) -> Iterator[str]:
    records = load_records(folder)
    if not records:
        return
    first, last = records[0], records[-1]
    yield "## Monitor"
    rows = [[title, _number(first.get(key)), _number(last[key])] for key, title in PANELS.items() if key in last]
    yield table([[plain(last["encoder"]), f"step {first['step']:,}", f"step {last['step']:,}"], *rows])
    if last.get("collapsing"):
        yield "**The representations were collapsing at the last measurement.**"
    yield from _picture(folder, PLOT_FILE, "", "")


def _picture(folder: Path, file: str, title: str, caption: str) -> Iterator[str]:
    if (folder / file).is_file():
        yield from filter(None, [title and f"## {title}", caption, f"![{title or file}]({file})"])


def _what_next(folder: Path) -> str:
    commands = (
        f"python training/probe.py --encoder {quote(str(folder / 'encoder'))} --data DATA --output_dir probes\n"
        f"python training/push_to_hub.py {quote(str(folder))} --repo_id NAME/MODEL --results probes --dry_run"
    )
    return f"## Measure and publish\n\n{fence(commands, 'bash')}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else ""
