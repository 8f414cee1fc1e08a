"""Heads that are fitted on stored features: the regression MLP, and linear classifiers, several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.devices import Precision


def seeded_permutation(count: int, *key: int) -> Tensor:
    """Draw a permutation of ``count`` that depends on ``key`` alone."""
    state = 0
    for number in key:
        state = (state * 1_000_003 + number + 1) % (1 << 62)
    return torch.randperm(count, generator=torch.Generator().manual_seed(state))


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation of each dimension, (n, D) -> (D,), (D,). Constant dimensions get 1: they stay 0."""
    mean, std = features.mean(0), features.std(0, unbiased=False)
    return mean, torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))


class RegressionProbe:
    """An MLP width-1024-1024-p with ReLU on a pair of features, fitted epoch by epoch.

    The reference for its shape is SIE's "deep-end" evaluation head (https://github.com/facebookresearch/SIE):
    MSE, Adam; the learning rate falls along a cosine over the whole fit, per step.
    """

    def __init__(
        self,
        width: int,
        num_parameters: int,
        *,
        seed: int,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        hidden_width: int = 1024,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.epochs, self.batch_size, self.learning_rate = seed, epochs, batch_size, learning_rate
        self.precision, self.device, self.epoch = precision, torch.device(device), 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden_width),
                nn.ReLU(),
                nn.Linear(hidden_width, hidden_width),
                nn.ReLU(),
                nn.Linear(hidden_width, num_parameters),
            )
        self.mlp.to(self.device)
        self.optimizer = torch.optim.Adam(self.mlp.parameters(), lr=learning_rate, fused=True)

    def fit_epoch(self, first: Tensor, second: Tensor, targets: Tensor) -> float:
        """Train an epoch on pairs ``first``, ``second`` (n, D) and ``targets`` (n, p); returns the mean training loss.

        The last, smaller batch is left out when there is a full one: batches of a few samples would make a jump.
        """
        count = len(targets)
        size = min(self.batch_size, count)
        steps = count // size
        order = seeded_permutation(count, self.seed, self.epoch).to(first.device)
        total = torch.zeros((), device=self.device)
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            progress = (self.epoch * steps + step) / (self.epochs * steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            pair = torch.cat([first[rows], second[rows]], 1).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                predicted = self.mlp(pair)
            loss = F.mse_loss(predicted.float(), targets[rows].to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        self.epoch += 1
        return (total / steps).item()

    @torch.no_grad()
    def predict(self, first: Tensor, second: Tensor) -> Tensor:
        """Predict the parameters (n, p) in float32, on the CPU."""
        pairs = zip(first.split(4096), second.split(4096), strict=True)
        return torch.cat([self.mlp(torch.cat(pair, 1).to(self.device)).cpu() for pair in pairs])


def fit_linear_steps(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.0,
    iterations: int | None = None,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Fit linear classifiers on fixed features, one per learning rate, side by side on the same batches.

    AdamW, or SGD with momentum 0.9; cosine to 0 per step, weights from N(0, 0.01), biases 0; cross-entropy.

    Args:
        features: (n, D); batches are made float32.
        labels: (n,) int64.
        num_classes: Width of the classifiers.
        learning_rates: G of them.
        seed: Seed of the initial weights (the same for all learning rates) and of the order of the batches.
        epochs: Passes over the features.
        batch_size: Samples per step.
        optimizer: "adamw" or "sgd".
        weight_decay: Decay of the weights, not of the biases.
        iterations: Steps in place of ``epochs``.
        rows: Fit to these alone, without a copy of them; ``None``: all.
        device: Where to fit.

    Returns:
        Weights (G, classes, D) and biases (G, classes), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(num_classes, features.shape[1], generator=generator) * 0.01
    weights = [nn.Parameter(start.clone().to(device)) for _ in learning_rates]
    biases = [nn.Parameter(torch.zeros(num_classes, device=device)) for _ in learning_rates]
    groups: list[dict[str, object]] = []
    for rate, weight, bias in zip(learning_rates, weights, biases, strict=True):
        groups.append({"params": [weight], "lr": rate, "base": rate, "weight_decay": weight_decay})
        groups.append({"params": [bias], "lr": rate, "base": rate, "weight_decay": 0.0})
    stepper: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=1.0, fused=True)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    )
    count = len(features) if rows is None else len(rows)
    size = min(batch_size, count)
    steps = count // size
    total = iterations or epochs * steps
    for epoch in range(-(-total // steps)):
        order = seeded_permutation(count, seed, epoch)
        order = order if rows is None else rows[order]
        for step in range(min(steps, total - epoch * steps)):
            batch = order[step * size : (step + 1) * size]
            progress = (epoch * steps + step) / total
            for group in stepper.param_groups:
                group["lr"] = group["base"] * 0.5 * (1 + math.cos(math.pi * progress))
            # One product for all: the classifiers share their inputs, and their gradients do not mix.
            logits = F.linear(features[batch].to(device).float(), torch.cat([*weights]), torch.cat([*biases]))
            logits = logits.view(size * len(weights), num_classes)
            expected = labels[batch].to(device).repeat_interleave(len(weights))
            loss = F.cross_entropy(logits, expected, reduction="sum") / size
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    return torch.stack([w.detach().cpu() for w in weights]), torch.stack([b.detach().cpu() for b in biases])


def fit_linear_lbfgs(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    *,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 100,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Fit logistic regressions by L-BFGS, one per L2 penalty: minimise CE + penalty / 2 * ||W||^2.

    Each fit starts from the one before, with the largest penalty first, and the first one from ``start``; the problem
    is convex, so only speed depends on that. A fit ends when a step changes the loss by less than 1e-6. Every step
    reads all features: they are copied to float32 on ``device``, unless they are that already and all ``rows`` count.

    Returns:
        Weights (G, classes, D) and biases (G, classes), in the order of ``penalties``, on the CPU.
    """
    if rows is not None:
        features, labels = features[rows], labels[rows]
    inputs, targets = features.to(device).float(), labels.to(device)
    if start is None:
        start = torch.zeros(num_classes, features.shape[1]), torch.zeros(num_classes)
    weight, bias = (nn.Parameter(value.clone().to(device)) for value in start)
    found: dict[float, tuple[Tensor, Tensor]] = {}
    for penalty in sorted(set(penalties), reverse=True):
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            tolerance_change=1e-6,
            tolerance_grad=1e-5,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure(penalty: float = penalty, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(inputs, weight, bias), targets) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found[penalty] = weight.detach().cpu().clone(), bias.detach().cpu().clone()
    return torch.stack([found[p][0] for p in penalties]), torch.stack([found[p][1] for p in penalties])
