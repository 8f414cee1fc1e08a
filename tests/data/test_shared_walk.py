"""The processes of a machine list a folder of images once."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from tests import processes

from .image_files import write_folder

# Opens the folder as one of two processes; tells how often it walked and what it found.
OPEN = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from hf_equissl.data import load_images, shared_walk
folder, comes = sys.argv[1:]
walks, real = [], os.walk
os.walk = lambda *given, **options: (walks.append(given[0]), real(*given, **options))[1]
dist.init_process_group("gloo")
shared_walk._PATIENCE = 0.2
if comes == "late" and dist.get_rank() == 0:  # it failed before: nobody waits for it
    source = load_images(folder)
else:
    with shared_walk.walked_once(folder):
        source = load_images(folder)
seen = walks.count(Path(folder))
found = [seen, source.fingerprint(), source.dataset["image"][:], source.classes, list(source.notes)]
dist.barrier()
left = [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("hf_equissl-walk-")]
print(json.dumps([*found, left]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("comes", "walks"), [("both", [1, 0]), ("late", [1, 1])])
def test_a_folder_is_walked_once_by_two_processes(tmp_path: Path, comes: str, walks: list[int]) -> None:
    folder = tmp_path / "photos"
    write_folder(folder, ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"])
    (folder / "notes.txt").touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs, children = [tmp_path / f"{rank}.json" for rank in range(2)], []
    for rank, output in enumerate(outputs):
        env = processes.environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), TMPDIR=str(temporary),
        )  # fmt: skip
        words = [sys.executable, "-c", OPEN, str(folder), comes]
        children.append(processes.start(words, stdout=output, stderr=tmp_path / f"{rank}.log", env=env))
    assert [child.wait(60) for child in children] == [0, 0], (tmp_path / "0.log").read_text()
    first, second = (json.loads(output.read_text().splitlines()[-1]) for output in outputs)
    assert [first[0], second[0]] == walks
    assert first[1:] == second[1:]
    assert first[-1] == []  # nothing is left behind
    assert len(first[2]) == 5
