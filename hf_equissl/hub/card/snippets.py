"""The code that a card shows, and its execution against the folder that is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from PIL import Image

from ...modeling import EquiSSLConfig
from ...utils.markdown import python_string

PHOTO = "photo.jpg"
TIME_LIMIT = 900  # seconds, for all snippets together; they take about ten
TOLERANCE = 1e-4
_PIN = 'The code beside the weights runs on your machine: read it, and pin a commit with `revision="..."`.'
_STOCK = "The same encoder under a stock model type of transformers, without the stem and its features."


class SnippetError(ValueError):
    """Code of the card does not run, or two ways of loading give different features."""


@dataclass(frozen=True)
class Snippet:
    """One piece of code that a reader may copy.

    Attributes:
        title: What it is for.
        code: Python. It reads the picture ``photo.jpg``.
        needs_package: Whether it imports this package; others must run where it was never imported.
        shape: Shape of the variable ``tokens`` that the code leaves, if it does.
        note: What to know about it.
    """

    title: str
    code: str
    needs_package: bool
    shape: tuple[int, ...] | None = None
    note: str = ""


def snippets(repo_id: str, config: EquiSSLConfig, parts: Collection[str]) -> list[Snippet]:
    """Write the code for the parts that are there, in the order of a card.

    Args:
        repo_id: Name on the Hub, or a folder.
        config: Configuration of the encoder.
        parts: Some of "encoder", "native" and "pretraining".
    """
    shape = (1, 1 + config.num_register_tokens + prod(config.grid_size), config.hidden_size)
    registers = f", {config.num_register_tokens} registers" if config.num_register_tokens else ""
    comment = f"{shape}: CLS{registers}, patches"
    found = []
    if "encoder" in parts:
        code = ", trust_remote_code=True"
        found.append(_with_package(repo_id, config, comment, shape))
        title = "Without the package: its code from this repository"
        found.append(_loading(title, repo_id, "", code, comment, shape, note=_PIN))
    if "native" in parts:
        where = ', subfolder="native"'
        found.append(_loading("Without any code of ours", repo_id, where, "", comment, shape, note=_STOCK))
    if "encoder" in parts and config.decoder_type is not None:
        found.append(_reconstruct(repo_id, config))
    if "pretraining" in parts:
        found.append(_pretraining(repo_id))
    return found


def _head(repo_id: str, where: str, first: str = "") -> str:
    return (
        f"{first}from PIL import Image\nfrom transformers import AutoImageProcessor, AutoModel\n\n"
        f"processor = AutoImageProcessor.from_pretrained({python_string(repo_id)}{where})\n"
        f"encoder = AutoModel.from_pretrained({python_string(repo_id)}{where}"
    )


def _loading(
    title: str, repo_id: str, where: str, option: str, comment: str, shape: tuple[int, ...], note: str
) -> Snippet:
    code = (
        f"{_head(repo_id, where)}{option})\n"
        f'pixels = processor(Image.open("{PHOTO}").convert("RGB"), return_tensors="pt")["pixel_values"]\n'
        f"tokens = encoder(pixels).last_hidden_state  # {comment}\n"
    )
    return Snippet(title, code, needs_package=False, shape=shape, note=note)


def _with_package(repo_id: str, config: EquiSSLConfig, comment: str, shape: tuple[int, ...]) -> Snippet:
    first = "import hf_equissl  # makes AutoModel know EquiSSL encoders\n"
    rows = shape[1] - config.num_register_tokens
    split = ""
    if config.feature_size:
        split = (
            f"invariant = output.invariant_features  # (1, {rows}, {config.invariant_size}): CLS, patches\n"
            f"equivariant = output.equivariant_features  # (1, {rows}, {config.equivariant_size})\n"
        )
    code = (
        f"{_head(repo_id, '', first)})\n"
        f'pixels = processor(Image.open("{PHOTO}").convert("RGB"), return_tensors="pt")["pixel_values"]\n'
        f"output = encoder(pixels)\n"
        f"tokens = output.last_hidden_state  # {comment}\n"
        f"image_feature = output.pooler_output  # (1, {config.hidden_size}): CLS\n{split}"
    )
    return Snippet("With the package", code, needs_package=True, shape=shape)


def _reconstruct(repo_id: str, config: EquiSSLConfig) -> Snippet:
    first = "import hf_equissl\nimport torch\n"
    height, width = (count * config.patch_side for count in config.grid_size)
    size = (1, config.num_decoded_images, config.num_channels, height, width)
    code = (
        f"{_head(repo_id, '', first)})\n"
        f'photo = Image.open("{PHOTO}").convert("RGB")\n'
        'view_1 = processor(photo, return_tensors="pt")["pixel_values"]\n'
        'view_2 = processor(photo.rotate(30), return_tensors="pt")["pixel_values"]\n'
        "with torch.no_grad():\n"
        f"    images = encoder.reconstruct(view_1, view_2)  # {size}, normalised\n"
    )
    return Snippet("Reconstruct what lies between two views", code, needs_package=True)


def _pretraining(repo_id: str) -> Snippet:
    code = (
        "from hf_equissl import EquiSSLForPreTraining\n\n"
        f'model = EquiSSLForPreTraining.from_pretrained({python_string(repo_id)}, subfolder="pretraining")\n'
        "encoder = model.export_encoder()  # on the CPU, as published here\n"
    )
    return Snippet("The whole training state", code, needs_package=True)


def run_snippets(chosen: Sequence[Snippet]) -> None:
    """Execute snippets in one fresh process, on a picture made for it; those without the package come first.

    Raises:
        SnippetError: One fails, gives another shape than it says, or other features than the first one.
    """
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as folder:
        Image.linear_gradient("L").convert("RGB").rotate(20).resize((320, 240)).save(Path(folder) / PHOTO)
        # The remote code is copied when it is loaded: not into the user's cache.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(folder) / "modules")}
        ordered = sorted(chosen, key=lambda snippet: snippet.needs_package)
        job = {"snippets": [asdict(snippet) for snippet in ordered], "tolerance": TOLERANCE}
        command = [sys.executable, "-c", _RUNNER]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(job),
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SnippetError(f"The card's snippets did not end within {TIME_LIMIT} seconds.") from error
    if done.returncode:
        title = ([line[2:] for line in done.stdout.splitlines() if line.startswith("> ")] or ["the first"])[-1]
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SnippetError(f"The card's snippet {title!r} does not run: {reason}")


_RUNNER = """
import json, sys

job, first = json.load(sys.stdin), None
for snippet in job["snippets"]:
    print(">", snippet["title"], flush=True)
    names = {"__name__": "__main__"}
    exec(compile(snippet["code"], "<snippet>", "exec"), names)
    if not snippet["needs_package"] and "hf_equissl" in sys.modules:
        raise RuntimeError("it was to run without the package and imported it")
    if snippet["shape"] is None:
        continue
    tokens = names["tokens"].detach()
    if list(tokens.shape) != snippet["shape"]:
        raise RuntimeError(f"tokens are {tuple(tokens.shape)}, the comment says {tuple(snippet['shape'])}")
    first = tokens if first is None else first
    difference = (tokens - first).abs().max().item()
    if not difference <= job["tolerance"]:
        raise RuntimeError(f"tokens differ by {difference:.2e} from those of the first way of loading")
"""
