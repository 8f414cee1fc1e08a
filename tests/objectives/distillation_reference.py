"""Self-distillation in float64 NumPy, from the formulas: loops over pairs, images and patches, nothing shared."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from hf_equissl.modeling import EquiSSLConfig, EquiSSLStem
from hf_equissl.objectives import Features
from hf_equissl.views.base import Views


def make_features(config: EquiSSLConfig, views: Views, seed: int, locals_: int = 0) -> Features:
    """Random tokens of both sizes of crops behind a random stem (none where the config has none)."""
    g = torch.Generator().manual_seed(seed)
    prefix, (rows, columns) = 1 + config.num_register_tokens, config.grid_size
    crops, images = views.global_crops.shape[:2]
    tokens = torch.randn(crops, images, prefix + rows * columns, config.hidden_size, generator=g)
    local = torch.randn(locals_, images, prefix + 4, config.hidden_size, generator=g) if locals_ else None
    stem = None
    if config.feature_size is not None:
        stem = EquiSSLStem(config.hidden_size, config.feature_size, config.equivariant_size)
        with torch.no_grad():
            for parameter in stem.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) / 4)
    return Features(tokens, prefix, (rows, columns), stem, local_tokens=local)


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def bottleneck(head: nn.Module, features: Features, tokens: Tensor, mlp: str = "mlp") -> np.ndarray:
    """Unit rows of the head for tokens (..., D): stem, linear layers with GELU between, division by the length."""
    state = {name: array(value) for name, value in head.state_dict().items()}
    x = array(tokens)
    if features.stem is not None:
        size = features.stem.invariant_size
        x = x @ array(features.stem.weight)[:size].T + array(features.stem.bias)[:size]
    layers = sorted(int(name.split(".")[1]) for name in state if name.startswith(f"{mlp}.") and name.endswith("weight"))
    for layer in layers:
        if layer != layers[0]:
            x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        x = x @ state[f"{mlp}.{layer}.weight"].T + state[f"{mlp}.{layer}.bias"]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def prototypes(head: nn.Module, name: str = "prototypes") -> np.ndarray:
    """(K, d)."""
    direction = array(head.state_dict()[f"{name}.direction"])
    return array(head.state_dict()[f"{name}.gain"]) * direction / np.linalg.norm(direction, axis=1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def entropy(target: np.ndarray, logits: np.ndarray) -> float:
    """H(t, softmax(logits)) of one row."""
    probabilities = softmax(logits)
    return -sum(float(t) * math.log(p) for t, p in zip(target, probabilities, strict=True))


def cls_loss(student: np.ndarray, targets: np.ndarray, temperature: float) -> tuple[float, int]:
    """Loss and number of pairs; student logits (V + L, B, K), global crops first, targets (V, B, K)."""
    total, pairs = 0.0, 0
    for q in range(len(targets)):
        for v in range(len(student)):
            if v == q:
                continue
            images = targets.shape[1]
            total += sum(entropy(targets[q, b], student[v, b] / temperature) for b in range(images)) / images
            pairs += 1
    return total / pairs, pairs


def ibot_patch_loss(student: np.ndarray, targets: np.ndarray, masks: np.ndarray, temperature: float) -> float:
    """iBOT's form: per crop, a masked mean over all of its patches; (V, B, N, K) twice and (V, B, N)."""
    crops, images, patches = masks.shape
    loss = 0.0
    for q in range(crops):
        for b in range(images):
            terms = [masks[q, b, i] * entropy(targets[q, b, i], student[q, b, i] / temperature) for i in range(patches)]
            loss += sum(terms) / max(1, masks[q, b].sum()) / images / crops
    return loss


def dinov2_patch_loss(student: np.ndarray, targets: np.ndarray, masks: np.ndarray, temperature: float) -> float:
    """DINOv2's form: a list of masked tokens, each with the weight 1 / m of its crop, over all crops."""
    flat = masks.reshape(-1, masks.shape[-1])
    chosen_student, chosen_targets = student[masks], targets[masks]
    weights = [1 / row.sum() for row in flat for _ in range(int(row.sum()))]
    terms = zip(chosen_student, chosen_targets, weights, strict=True)
    return sum(weight * entropy(target, row / temperature) for row, target, weight in terms) / len(flat)


def centered(logits: np.ndarray, center: np.ndarray, temperature: float) -> np.ndarray:
    return np.apply_along_axis(softmax, -1, (logits - center) / temperature)


def sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """(M, K) -> (M, K), with the total, K and the number of rows where the authors have them."""
    q = np.exp(logits / temperature).T
    count, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=1, keepdims=True) / count
        q = q / q.sum(axis=0, keepdims=True) / rows
    return (q * rows).T


def koleo(representations: np.ndarray, eps: float = 1e-8) -> float:
    """Sum over views (V, B, D), nearest neighbours by trying all."""
    total = 0.0
    for view in representations:
        x = view / np.linalg.norm(view, axis=1, keepdims=True)
        images = range(len(x))
        nearest = [min(float(np.linalg.norm(x[i] - x[j])) for j in images if j != i) for i in images]
        total -= sum(math.log(distance + eps) for distance in nearest) / len(x)
    return total


def student_logits(head: nn.Module, student: Features, patch_mlp: str = "mlp", patch_prototypes: str = "prototypes"):
    """Of CLS, (V + L, B, K), and of all patches, (V, B, N, K)."""
    tokens = student.cls if student.local_tokens is None else torch.cat([student.cls, student.local_tokens[:, :, 0]])
    cls = bottleneck(head, student, tokens) @ prototypes(head).T
    patches = bottleneck(head, student, student.patches, patch_mlp) @ prototypes(head, patch_prototypes).T
    return cls, patches
