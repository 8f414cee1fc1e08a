"""One encoder as the demo looks through it: patch colours, cosines, painted images, an angle, neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from ..encoders.painting import can_paint, paint_intermediate_images
from .angle_probe import FEATURES, PROBE_FILE, AngleProbe

Features = Mapping[str, Tensor]
PARTS = ("invariant", "equivariant")
# The share of the gallery's patches that lies outside the range of colours, at each end.
_OUTSIDE = 0.01


class Lens:
    """An encoder with a stem, and what is known of a gallery of images through it.

    Attributes:
        name: What the encoder is called.
        encoder: The encoder.
        probe: Reads the angle between two images off their features; ``None`` where none is stored beside the encoder.
        gallery: Features of the gallery.
    """

    def __init__(self, name: str, source: FrozenEncoder | str | Path, gallery: Tensor | None = None) -> None:
        """Open the encoder.

        Args:
            name: What to call it.
            source: A folder, a Hub id, or an encoder that is open.
            gallery: (G, 3, S, S) uint8, images of the size that the encoder sees; more than one.

        Raises:
            LoadError: The encoder or the probe beside it cannot be read.
            ValueError: The encoder has no stem.
        """
        self.name = name
        self.encoder = source if isinstance(source, FrozenEncoder) else FrozenEncoder(source, name=str(source))
        if "invariant" not in self.encoder.feature_names:
            raise ValueError(
                f"{self.encoder.name} has no invariant and equivariant part: the demo looks at EquiSSL encoders with a "
                "stem (feature_size, equivariant_size)."
            )
        path = None if isinstance(source, FrozenEncoder) else Path(source, PROBE_FILE)
        self.probe = AngleProbe.load(path, self.encoder) if path is not None and path.is_file() else None
        if gallery is not None:
            self.show_gallery(gallery)

    def show_gallery(self, images: Tensor) -> None:
        """Look at the images (G, 3, S, S) that later ones are seen beside."""
        self.gallery = self.features(images)
        tokens = self.gallery["patch_tokens"].flatten(0, 1)
        self._token_mean = tokens.mean(0)
        _, _, directions = torch.linalg.svd(tokens - self._token_mean, full_matrices=False)
        largest = directions[:3].gather(1, directions[:3].abs().argmax(1, keepdim=True))
        self._directions = directions[:3] * largest.sign()  # (3, D); svd leaves signs open
        ends = torch.tensor([_OUTSIDE, 1 - _OUTSIDE])
        self._range = ((tokens - self._token_mean) @ self._directions.T).quantile(ends, 0)  # (2, 3)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images (B, 3, S, S), uint8 or floats in [0, 1].

        Returns:
            "patch_tokens" (B, N, D); "invariant" (B, d_inv), that of CLS, which the base
            method's loss sees; "equivariant" (B, N, d_equi), that of the patches, which decoders see.
        """
        found = self.encoder.encode(images, ["patch_tokens", "invariant_cls"])
        module: Any = self.encoder.module
        with torch.no_grad():
            tokens = found["patch_tokens"].to(self.encoder.device)
            found["equivariant"] = module.stem(tokens, part="equivariant").float().cpu()
        found["invariant"] = found.pop("invariant_cls")
        return found

    def cosines(self, before: Features, after: Features) -> dict[str, Tensor]:
        """Compare the parts of the features of B images, and of what became of them: part -> (B,), mean of patches."""
        found = {part: F.cosine_similarity(before[part], after[part], dim=-1) for part in PARTS}
        return {part: value if value.dim() == 1 else value.mean(1) for part, value in found.items()}

    def colours(self, features: Features) -> Tensor:
        """Show patches by their first three principal components in the gallery, (B, 3, rows, columns) in [0, 1]."""
        low, high = self._range
        shown = ((features["patch_tokens"] - self._token_mean) @ self._directions.T - low) / (high - low)
        side = round(shown.shape[1] ** 0.5)
        return shown.clamp(0, 1).transpose(1, 2).unflatten(2, (side, side))

    def angles(self, before: Features, after: Features) -> Tensor | None:
        """Predict by how many degrees each of B images was turned, (B,); ``None`` without a probe."""
        return None if self.probe is None else self.probe.predict(before[FEATURES], after[FEATURES])

    def neighbours(self, features: Features, count: int = 3) -> tuple[Tensor, Tensor]:
        """Find the images of the gallery with the most similar invariant part: indices and cosines, (B, count) each.

        Cosines are those of features less their mean over the gallery: what all images share tells none apart.
        """
        center = self.gallery["invariant"].mean(0)
        rows, others = (F.normalize(part["invariant"] - center, dim=1) for part in (features, self.gallery))
        cosines, indices = (rows @ others.T).topk(min(count, len(others)))
        return indices, cosines

    @property
    def can_paint(self) -> bool:
        """Whether the encoder has decoders."""
        return can_paint(self.encoder)

    def paint(self, first: Tensor, second: Tensor) -> dict[float, Tensor]:
        """Paint the images between two views (B, 3, S, S): fraction -> (B, 3, S, S); empty without decoders."""
        return paint_intermediate_images(self.encoder, first, second) if self.can_paint else {}
