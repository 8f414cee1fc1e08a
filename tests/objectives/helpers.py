"""Tiny encoders, views with whatever an objective needs, and two processes; all seeded."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, Features, Objective, build_objective
from hf_equissl.pretraining.encoding import encode_crops, encode_extra
from hf_equissl.views import SE2Family
from hf_equissl.views.base import Item, Views, map_tensors
from hf_equissl.views.collator import ViewCollator
from hf_equissl.views.facts import ViewFacts
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import LocalSpec, MaskSpec, PipelineSpec, ViewPipeline, ViewSpec
from tests.processes import limit, start

BATCH = 6
# Of the views that are made here, for objectives whose heads follow from them.
VIEW = ViewSpec(crop_scale=(0.3, 1.0), solarize_probability=0.2)
FACTS = ViewFacts.of(PipelineSpec((VIEW, VIEW)), SE2Family(), num_classes=4)
REGISTRIES = {"invariance": INVARIANCE_OBJECTIVES, "equivariance": EQUIVARIANCE_OBJECTIVES}
CASES = [(kind, name) for kind, registry in REGISTRIES.items() for name in sorted(registry)]


def tiny_config(**overrides: Any) -> EquiSSLConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return EquiSSLConfig(**{**sizes, "feature_size": 24, "equivariant_size": 8, **overrides})


def tiny_encoder(config: EquiSSLConfig | None = None, seed: int = 0) -> EquiSSLModel:
    """Weights larger than the usual initialisation, so that images and views differ visibly in the features."""
    torch.manual_seed(seed)
    encoder = EquiSSLModel(config or tiny_config())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def tiny_objective(
    kind: str, name: str, config: EquiSSLConfig | None = None, seed: int = 1, **kwargs: Any
) -> Objective:
    arguments = {**own(name, "SMALL", {}), **kwargs}
    torch.manual_seed(seed)
    return build_objective(REGISTRIES[kind], name, config or tiny_config(), facts=FACTS, **arguments)


def own(name: str, constant: str, default: Any) -> Any:
    """What the objective's own test file says for this battery.

    ``SMALL``: arguments of small heads; without them it is built with its defaults. ``ORDER_DEPENDENT``: whether its
    published loss depends on the order of the images in the batch.
    ``BESIDE_LOCAL_CROPS``: arguments that an equivariance objective needs where the other one has two local crops.
    """
    file = f"tests.objectives.test_{name}"
    return getattr(import_module(file), constant, default) if find_spec(file) else default


def make_views(
    needs: Needs,
    batch: int = BATCH,
    crops: int = 2,
    size: int = 32,
    patch: int = 8,
    seed: int = 2,
    images: Sequence[int] | None = None,
) -> Views:
    """Views of pictures of noise, with whatever ``needs`` asks for: cropped, collated and made by a real pipeline.

    Args:
        needs: Of one or more objectives.
        batch: Images, B.
        crops: Global views, V.
        size, patch: Sides of the global views and of the encoder's patches, in pixels.
        seed: Another one gives other pictures and other draws.
        images: Which of the ``batch`` pictures; by default all. The second half repeats the draws of the first, so that
            halves have as many masked patches: means over two processes can then be compared with those over one.
    """
    pipeline = make_pipeline(needs, crops, size, patch)
    samples = []
    for number in range(batch) if images is None else images:
        picture = np.random.default_rng([seed, number]).integers(0, 256, (size + 8, size + 4, 3), dtype=np.uint8)
        item = Item((Image.fromarray(picture),), label=number % 4)
        rng = np.random.default_rng([seed, number % max(1, batch // 2), 1])
        samples.append({**pipeline.crop(item, rng), "index": number})
    return pipeline(ViewCollator(pipeline)(samples))


def make_pipeline(needs: Needs, crops: int = 2, size: int = 32, patch: int = 8) -> ViewPipeline:
    """A pipeline that can make whatever an objective may ask for."""
    return ViewPipeline(
        PipelineSpec((VIEW,) * crops, LocalSpec(2, size // 2, VIEW), MaskSpec(probability=0.8)),
        image_size=size,
        transformation=SE2Family(),
        needs=needs,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
        patch_size=patch,
    )


def indices_of(masks: Tensor) -> Tensor:
    return masks.flatten().nonzero().squeeze(1)


# Dimension of the images in each part of the views; further views and facts have it first, as these do.
IMAGES_SECOND = {"global_crops", "local_crops", "masks", "crop_boxes", "photometric"}


def reorder(views: Views, order: Tensor) -> Views:
    """The same images in another order; those that further views have for themselves stay as they are."""

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, (dict, tuple)):
            return map_tensors(value, lambda tensor: pick(name, tensor))
        if value is None:
            return None
        if name in IMAGES_SECOND:
            return value[:, order]
        joined = value[len(order) :]
        return value if len(value) < len(order) else torch.cat([value[: len(order)][order], joined])

    parts = {f.name: pick(f.name, getattr(views, f.name)) for f in fields(views) if f.name not in ("facts", "extra")}
    indices = None if views.masks is None else indices_of(parts["masks"])
    extra = {
        name: tuple(view[order] if len(view) == len(order) else view for view in images)
        for name, images in views.extra.items()
    }
    return replace(views, **{**parts, "mask_indices": indices}, extra=extra)


def merge(shares: Sequence[Views]) -> Views:
    """What one process sees, from what several see: images side by side, those that join the usual ones behind them."""
    first, base = shares[0], shares[0].batch_size

    def together(name: str, values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: together(name, [value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], tuple):
            return tuple(together(name, views) for views in zip(*values, strict=True))
        if name == "labels" and values[0] is not None:
            return torch.cat([*(value[:base] for value in values), *(value[base:] for value in values)])
        if not isinstance(values[0], Tensor):
            return values[0]
        return torch.cat(list(values), dim=1 if name in IMAGES_SECOND else 0)

    parts = {f.name: together(f.name, [getattr(share, f.name) for share in shares]) for f in fields(first)}
    return Views(**{**parts, "mask_indices": None if first.masks is None else indices_of(parts["masks"])})


def encode(encoder: EquiSSLModel, views: Views, needs: Needs | None = None, masked: bool = True) -> Features:
    """What the pretraining model does for the student, by the same functions."""
    needs = needs or Needs()
    masks = views.masks.flatten(0, 1) if masked and views.masks is not None else None
    features = encode_crops(encoder, views.global_crops, masks, needs.hidden_layers)
    if views.local_crops is not None:
        features.local_tokens = encode_crops(encoder, views.local_crops, patches=False).tokens
    encode_extra(encoder, views, features, [(extra, extra.of_student) for extra in needs.extra])
    return features


def teacher_features(needs: Needs, views: Views, config: EquiSSLConfig | None = None) -> Features | None:
    if not needs.teacher:
        return None
    teacher = tiny_encoder(config, seed=5).requires_grad_(False)
    return encode(teacher, replace(views, local_crops=None), needs, masked=False)


def random_features(config: EquiSSLConfig, views: Views, seed: int = 7) -> Features:
    """Features that no encoder made, in double use as leaves; the stem is a fixed linear map."""
    g = torch.Generator().manual_seed(seed)
    side = config.image_size // config.patch_size
    crops, batch = views.global_crops.shape[:2]
    tokens = torch.randn(crops, batch, 1 + side * side, config.hidden_size, generator=g)
    weight = torch.randn(config.feature_size, config.hidden_size, generator=g) / config.hidden_size**0.5

    def stem(x: Tensor, part: str) -> Tensor:
        invariant = config.feature_size - config.equivariant_size
        rows = weight[:invariant] if part == "invariant" else weight[invariant:]
        return x @ rows.to(x.dtype).T

    return Features(tokens=tokens, num_prefix_tokens=1, grid=(side, side), stem=stem)


def run_processes(
    worker: Callable[..., Any], folder: Path, *args: Any, processes: int = 2, timeout: float = 90
) -> list:
    """Run ``worker(rank, processes, *args) -> result`` in gloo processes of their own and return the results by rank.

    The group meets in a file of ``folder``: no port to be taken. A hanging collective ends with the timeout.
    """
    (folder / "task.pickle").write_bytes(pickle.dumps((worker, processes, args)))
    code = "import sys; from tests.objectives.helpers import take_part; take_part(int(sys.argv[1]), sys.argv[2])"
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    words = [[sys.executable, "-c", code, str(rank), str(folder)] for rank in range(processes)]
    children = [start(line, log=log) for line, log in zip(words, logs, strict=True)]
    try:
        deadline = time.monotonic() + limit(timeout)
        codes = [child.wait(max(0.0, deadline - time.monotonic())) for child in children]
        assert not any(codes), "\n".join(log.read_text() for log in logs)
    finally:
        for child in children:
            child.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def take_part(rank: int, folder: str) -> None:
    """Do what ``run_processes`` left in ``folder``, as one process of the group."""
    worker, processes, args = pickle.loads(Path(folder, "task.pickle").read_bytes())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    try:
        torch.save(worker(rank, processes, *args), f"{folder}/rank{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
