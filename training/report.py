"""Put the results of several encoders into one report: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.hub.places import find_results
from hf_equissl.utils.commands import command_parser, log_plainly, path_word, say, stop

DESCRIPTION = """\
Put what probe.py and finetune.py measured of several encoders into one report: a table, by how much each encoder is
better or worse than a baseline on every task, and R2 as bars. Only numbers of the same data and protocol are compared.
Nothing is measured here."""

EXAMPLES = """\
examples:
  # probes of both encoders lie in one folder, each fine-tuned model in its own
  python training/report.py probes runs/segment_base runs/segment_rot --baseline runs/base/encoder --output_dir report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    options = build_parser().parse_args(argv)
    log_plainly()
    try:
        files = [find_results(Path(path)) for path in options.results]

        from hf_equissl.evaluation.encoder_report import write_encoder_report
        from hf_equissl.evaluation.results import load_records

        records = [record for file in files for record in load_records(file)]
        written = write_encoder_report(records, options.output_dir, options.baseline)
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    say(f"Written to {options.output_dir}: {', '.join(path.name for path in written)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options with their help."""
    parser = command_parser("report.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("results", nargs="+", type=path_word, metavar="PATH", help="folder with a results.json, or such a file")
    add("--output_dir", required=True, type=path_word, metavar="DIR", help="where the report is written")
    add("--baseline", metavar="NAME", help="encoder that the others are compared with: its name, or the end of it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
