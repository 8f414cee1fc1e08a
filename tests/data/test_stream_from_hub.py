"""Streams read from a Hub over HTTP by several workers: a private data set, as parquet, as tar shards, as images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi

from tests.hub.loopback_hub import LoopbackHub
from tests.processes import environment, run

from .image_files import write_folder
from .test_streaming import COUNT, parquets, tars

pytest_plugins = ["tests.hub.fixtures"]

READ = """
import json, sys
from itertools import islice
from pathlib import Path
from tests.data.test_streaming import WORKERS, RANKS, batches, build_pipeline, Needs
from hf_equissl.data import StreamingViewDataset, load_images

def make(source, rank):
    stream = load_images(source, streaming=True)
    return StreamingViewDataset(stream, pipeline, 3, rank=rank, world_size=RANKS, shuffle_buffer=5, repeat=False)

pipeline = build_pipeline(
    "vicreg", image_size=8, transformation=None, needs=Needs(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3
)
for source in sys.argv[2:]:
    whole, resumed = [], []
    for rank in range(RANKS):
        stream = make(source, rank)
        seen = list(batches(stream))
        for batch in seen[:7]:
            stream.note_batch(batch["position"])
        folder = Path(sys.argv[1])
        stream.save_positions(folder, WORKERS)
        again = make(source, rank)
        again.load_positions(folder, WORKERS)
        whole.append([int(batch["index"]) for batch in seen])
        resumed.append([int(batch["index"]) for batch in batches(again)])
    print(json.dumps([whole, resumed]))
"""


def test_stream_from_a_private_data_set(hub_here: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    """Every image once over two ranks with two workers each, and on from a position; a busy server is asked again."""
    hub = hub_here
    folders = {"parquets": parquets(tmp_path / "parquets", 3, 10), "tars": tars(tmp_path / "tars", 5)}
    folders["images"] = write_folder(tmp_path / "images", [f"{number:02d}.jpg" for number in range(COUNT)])
    for name, folder in folders.items():
        api.create_repo(f"maker/{name}", repo_type="dataset", private=True)
        api.upload_folder(repo_id=f"maker/{name}", repo_type="dataset", folder_path=folder, path_in_repo="data")
    hub.refuse(r"GET .*/resolve/.*\.(parquet|tar)", 503, "busy", count=2)
    sources = ["maker/parquets", "hf://datasets/maker/tars/data/*.tar", "maker/images"]
    words, env = [sys.executable, "-c", READ, str(tmp_path), *sources], environment(**hub.env(tmp_path / "home"))
    answer = run(words, env=env)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert hub.count("GET", "resolve", 503) == 2
    assert hub.count("GET", status=206) > 0  # parts of files, never whole ones
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(results) == len(sources)
    for whole, resumed in results:
        seen = [index for rank in whole for index in rank]
        assert len(seen) == len(set(seen)) == COUNT
        assert resumed == [rank[7:] for rank in whole]
    first, *others = (sorted(whole[0] + whole[1]) for whole, _ in results)
    assert all(other == first for other in others)
