"""Where the results of a fine-tuning run or of probes lie."""

from __future__ import annotations

from pathlib import Path

RESULTS = "results.json"


def find_results(folder: str) -> Path:
    """Find the file with the results of a finished run; ``folder`` may also be that file.

    Raises:
        ValueError: There is none.
    """
    path = Path(folder) if folder.endswith(".json") else Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"--compare {folder}: there is no {RESULTS}. Give folders of finished runs or of probe.py.")
    return path
