"""Results on benchmarks of the Hub: which records become entries, what they say, and what a push does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries

from hf_equissl.evaluation import ResultRecord
from hf_equissl.evaluation.metric import R2, TOP1, Metric
from hf_equissl.hub.benchmarks import choose_task, find_tasks, write_eval_results
from hf_equissl.hub.contents import list_left_behind, list_published
from hf_equissl.hub.push import _find_earlier

from .loopback_hub import LoopbackHub

REPO = "me/vits16"


def record(dataset: str = "maker/photos", metric: Metric = TOP1, **changes: Any) -> ResultRecord:
    given: dict[str, Any] = {
        "evaluator": "linear",
        "task": "classification",
        "metric": metric.name,
        "about": metric,
        "features": "cls",
        "values": (0.70, 0.72),
        "seeds": (0, 1),
        "primary": True,
        "dataset": dataset,
        "split": "test",
        "protocol": {"test_images": 500},
        "encoder": REPO,
        "encoder_digest": "0" * 16,
    }
    return ResultRecord(**{**given, **changes})


def define(api: HfApi, name: str, text: str | None) -> None:
    api.create_repo(name, repo_type="dataset", exist_ok=True)
    if text is not None:
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="eval.yaml", repo_id=name, repo_type="dataset")


def test_numbers_on_benchmarks_become_files_of_the_hub(hub_here: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    define(api, "maker/photos", "name: Photos\ntasks:\n- {id: top1, split: test}\n- {id: old, split: validation}\n")
    define(api, "maker/plain", None)
    define(api, "maker/broken", "tasks: [")
    define(api, "maker/odd", "tasks: {id: 3}")
    records = [
        record(),
        record(features="patches", primary=False),
        record(evaluator="knn"),
        record(evaluator="knn", split="train"),
        record("maker/plain"),
        record("maker/broken"),
        record("maker/odd"),
        record("maker/nobody"),
        record("photos"),
        record(metric=R2, evaluator="transformation_regression", task="rotation", values=(0.98765,), seeds=(0,)),
    ]
    written = write_eval_results(records, REPO, tmp_path)
    names = ["equissl-photos-top1-linear-top1-cls.yaml"]  # R2 is no accuracy, and one number answers one task
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [f".eval_results/{name}" for name in names]
    (top1,) = parse_eval_result_entries(yaml.safe_load(written[0].read_text()))
    assert (top1.dataset_id, top1.task_id, top1.value) == ("maker/photos", "top1", 71.0)
    assert top1.source_url == f"{hub_here.endpoint}/{REPO}"
    assert top1.date == records[0].date
    assert top1.notes == (
        "linear top1 (cls), in %, 500 images, 2 seed(s), standard deviation 1.41; the card says how it was measured"
    )


def test_no_hub_no_files(tmp_path: Path) -> None:
    assert find_tasks("maker/photos") == []
    assert write_eval_results([record()], REPO, tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([{"id": "top1", "split": "test"}, {"id": "top1", "split": "train"}], "top1"),
        ([{"id": "classes", "metric": "accuracy"}], "classes"),
        ([{"id": "classes"}], None),
        ([{"id": "top1", "split": "train"}], None),
        ([{"id": "top1"}, {"id": "b", "metric": "top1"}], None),
        ([], None),
    ],
)
def test_which_task_is_meant(tasks: list[dict[str, str]], expected: str | None) -> None:
    assert choose_task(tasks, "test", ("top1", "accuracy", None)) == expected


def test_what_a_push_sends_and_deletes(tmp_path: Path) -> None:
    folder = tmp_path / ".eval_results"
    for name in ("README.md", ".env", ".eval_results/equissl-a.yaml", ".eval_results/.hidden.yaml", ".cache/b.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (folder / "notes.txt").write_text("x")
    published = list_published(tmp_path)
    assert list(published) == [".eval_results/equissl-a.yaml", "README.md"]
    assert list_left_behind(tmp_path) == []
    there = ["README.md", ".eval_results/equissl-old.yaml", ".eval_results/hle.yaml"]
    assert _find_earlier(there, published)[0] == [".eval_results/equissl-old.yaml"]  # what others added stays
