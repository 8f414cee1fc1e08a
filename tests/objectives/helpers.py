"""Tiny encoders, views with whatever an objective needs, and two processes; all seeded."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, Features, Objective, build_objective
from hf_equissl.pretraining.model import EquiSSLForPreTraining
from hf_equissl.views.base import Views
from hf_equissl.views.needs import Needs
from tests.processes import limit, start

BATCH = 6
SMALL_HEAD = {"num_prototypes": 24, "head_hidden_size": 16, "bottleneck_size": 8}
# Small heads for those whose defaults are large; an entry that is absent here is built with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "dino": SMALL_HEAD,
    # Neighbours from the whole batch, so that two processes can equal one.
    "dinov2": {**SMALL_HEAD, "gather_koleo": True},
    "ibot": SMALL_HEAD,
    "vicreg": {"expander_sizes": (16, 16, 16)},
    "cross_attention_reconstruction": {"decoder_num_layers": 1, "decoder_hidden_size": 16, "decoder_num_heads": 2},
}
# Objectives whose published loss depends on the order of the images in the batch.
ORDER_DEPENDENT: set[str] = set()
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
    torch.manual_seed(seed)
    return build_objective(REGISTRIES[kind], name, config or tiny_config(), **{**SMALL.get(name, {}), **kwargs})


def make_views(
    needs: Needs, batch: int = BATCH, crops: int = 2, size: int = 32, patch: int = 8, seed: int = 2
) -> Views:
    """Random views that carry what ``needs`` asks for."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    patches = (size // patch) ** 2
    masks = make_masks(crops, batch, patches, g) if needs.masks else None
    return Views(
        global_crops=normal(crops, batch, 3, size, size),
        local_crops=normal(2, batch, 3, size // 2, size // 2) if needs.local_crops else None,
        intermediate_images=normal(batch, len(needs.fractions), 3, size, size) if needs.fractions else None,
        parameters=normal(batch, 3) if needs.parameters else None,
        normalized_parameters=torch.rand(batch, 3, generator=g) * 2 - 1 if needs.parameters else None,
        masks=masks,
        mask_indices=None if masks is None else indices_of(masks),
        crop_boxes=torch.rand(crops, batch, 4, generator=g) if needs.crop_boxes else None,
        photometric={"flip": torch.rand(crops, batch, generator=g).round()} if needs.photometric else {},
        labels=torch.randint(0, 4, (batch,), generator=g) if needs.labels else None,
        extra={name: normal(batch, 3, size // 2, size // 2) for name in needs.extra},
    )


def make_masks(crops: int, batch: int, patches: int, generator: torch.Generator) -> Tensor:
    """0 to 6 masked patches per crop, and as many in each half of the batch: means of two processes are comparable."""
    image, crop = torch.arange(batch) % max(1, batch // 2), torch.arange(crops)[:, None]
    counts = (3 * image + 2 * crop) % 7  # (V, B)
    order = torch.rand(crops, batch, patches, generator=generator).argsort(dim=-1)
    return order < counts[..., None]


def indices_of(masks: Tensor) -> Tensor:
    return masks.flatten().nonzero().squeeze(1)


BATCH_FIRST = {"intermediate_images", "parameters", "normalized_parameters", "labels", "extra"}


def take(views: Views, index: Tensor) -> Views:
    """The images ``index`` of every part of the views."""

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(name, item) for key, item in value.items()}
        if value is None:
            return None
        return value[index] if name in BATCH_FIRST else value[:, index]

    parts = {f.name: pick(f.name, getattr(views, f.name)) for f in fields(views) if f.name != "mask_indices"}
    indices = None if views.masks is None else indices_of(parts["masks"])
    return replace(views, **parts, mask_indices=indices)


def encode(encoder: EquiSSLModel, views: Views, needs: Needs | None = None, masked: bool = True) -> Features:
    """What the pretraining model does, by its own method: global crops in one pass, local ones in another."""
    needs = needs or Needs()
    encode_crops = partial(EquiSSLForPreTraining._encode, None, encoder)
    masks = views.masks.flatten(0, 1) if masked and views.masks is not None else None
    features = encode_crops(views.global_crops, masks, needs.hidden_layers)
    if views.local_crops is not None:
        features.local_tokens = encode_crops(views.local_crops).tokens
    features.extra = {name: encode_crops(images[None]) for name, images in views.extra.items()}
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
