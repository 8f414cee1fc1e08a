"""A run that is really trained, in a second, and records of its encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation.results import ResultRecord
from hf_equissl.training import pretrain

RECIPE = """
name: tiny_rot
description: A tiny one.
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 16, equivariant_size: 8, num_register_tokens: 2}
objectives:
  invariance: {name: vicreg, expander_sizes: [16, 16]}
  equivariance: [{name: reconstruction, weight: 2.5, decoder_widths: [4, 4, 4]}]
views:
  pipeline: {name: vicreg}
  transformation: {name: rotation}
  image_mean: [0.4, 0.5, 0.6]
  image_std: [0.2, 0.25, 0.3]
training: {max_steps: 4, per_device_train_batch_size: 8, save_steps: 2, logging_steps: 1, disable_tqdm: true,
           use_cpu: true}
"""


@pytest.fixture(scope="module")
def run(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("somebodys_home")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    words = ["--recipe", recipe, "--data", photo_folder, "--output_dir", folder / "run"]
    assert pretrain.main(list(map(str, words))) == 0
    return folder / "run"


def copy_of(run: Path, target: Path, *without: str) -> Path:
    """A copy of a run's folder to change, without some of its entries."""
    return shutil.copytree(run, target, ignore=shutil.ignore_patterns(*without))


def records_of(run: Path, data: Path) -> list[ResultRecord]:
    """Numbers as the probes record them, with paths of this machine in every place that may hold one."""
    encoder = run / "encoder"
    shared = {
        "dataset": str(data),
        "split": "test",
        "encoder": str(encoder),
        "encoder_digest": FrozenEncoder(encoder).digest(),
        "command": f"python /opt/code/training/probe.py --encoder {encoder} --data={data} --cache_dir /var/cache/me",
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-02T03:04:05+00:00",
    }
    regression = {"evaluator": "transformation_regression", "features": "backbone", "seeds": (0, 1), "primary": True}
    family = {"family": {"class": "RotationFamily", "max_degrees": 45.0, "fill": "zeros"}}
    return [
        ResultRecord(task="rotation", metric="r2", values=(0.5, 0.7), protocol=family, **regression, **shared),
        ResultRecord(
            task="translation", metric="r2", values=(0.25, 0.25), protocol={"epochs": 8}, **regression, **shared
        ),
        ResultRecord(
            evaluator="linear",
            task="classification",
            metric="top1",
            features="cls",
            values=(0.43219,),
            seeds=(0,),
            primary=True,
            protocol={"train_split": "train", "cache": "/var/cache/me/features"},
            **shared,
        ),
        ResultRecord(
            evaluator="effective_rank",
            task="representation",
            metric="effective_rank",
            features="cls",
            values=(12.3456,),
            seeds=(0,),
            primary=True,
            protocol={},
            **shared,
        ),
    ]
