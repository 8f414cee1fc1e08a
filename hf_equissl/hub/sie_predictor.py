"""The predictor that SIE trained, out of a pretraining state: evaluation on 3DIEBench asks what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..objectives.sie import SIEObjective
from .pretraining_state import load_pretraining_state


class SIEPredictor:
    """Embeddings and predictions of a ``SIEObjective``, in eval mode, on the CPU.

    Parameters are taken as they are, as a ``given`` transformation without ranges gives them in training.

    Attributes:
        features: Kind of features that embeddings are made of.
    """

    def __init__(self, objective: SIEObjective, parameter_names: tuple[str, ...]) -> None:
        self.objective, self.parameter_names = objective.eval().float(), parameter_names
        self.features = "equivariant_cls" if objective.pooling == "cls" else "equivariant_patches"

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        """Turn features (n, D) into embeddings (n, d)."""
        return torch.cat([self.objective.expander(part) for part in features.split(4096)])

    @torch.no_grad()
    def predict(self, embeddings: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Predict embeddings (n, d) from others (n, d) and parameters, name -> (n,)."""
        missing = [name for name in self.parameter_names if name not in parameters]
        if missing:
            raise ValueError(
                f"This predictor was trained with {', '.join(self.parameter_names)}; renders tell "
                f"{', '.join(parameters)} only. It cannot be judged on them."
            )
        inputs = torch.stack([parameters[name] for name in self.parameter_names], 1)
        inputs = F.pad(inputs, (0, 1), value=1.0) if self.objective.append_one else inputs
        pairs = zip(embeddings.split(4096), inputs.split(4096), strict=True)
        return torch.cat([self.objective.predictor(*pair) for pair in pairs])


def load_sie_predictor(source: str | Path) -> SIEPredictor:
    """Load the predictor of a run trained with SIE.

    Args:
        source: A checkpoint of the run, or the published pretraining state.

    Raises:
        ValueError: SIE is not among its objectives.
        OSError: There is no such state.
    """
    state = load_pretraining_state(source)
    found = next((objective for objective in state.equivariance if isinstance(objective, SIEObjective)), None)
    if found is None:
        raise ValueError(f"{source} was trained with {', '.join(state.equivariance_names) or 'no objective'}, not SIE.")
    return SIEPredictor(found, tuple((state.config.facts or {}).get("parameter_names", ())))
