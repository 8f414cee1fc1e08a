"""Video object segmentation without training: masks of the first frame follow the features from frame to frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..encoders.frozen import FrozenEncoder
from .base import Evaluator
from .data import EvaluationData
from .images import ImageSet
from .metric import Metric
from .results import ResultRecord
from .video_data import Video, VideoData
from .video_metrics import contour_accuracy, region_similarity

J_AND_F = Metric("j_and_f", "%", digits=2, hub_type="j_and_f")
J_MEAN = Metric("j_mean", "%", digits=2)
F_MEAN = Metric("f_mean", "%", digits=2)
J_AND_F_STILL = Metric("j_and_f_still", "%", digits=2)
# Sides of frames are multiples of it, as in DINO's protocol, where patches allow.
_UNIT = 64
# Affinities that are held at a time, 4 bytes each.
_BLOCK = 1 << 23


class LabelPropagationEvaluator(Evaluator):
    """J&F of objects whose masks are carried from the first frame on by similar features, as DINO measures it.

    The protocol is that of "Emerging Properties in Self-Supervised Vision Transformers" on DAVIS 2017
    (https://arxiv.org/abs/2104.14294, after https://arxiv.org/abs/2006.14613). The map of every frame has tokens of
    unit length. A token's label is the mean of those of its ``top_k`` most similar tokens among the first frame and the
    ``context`` frames before, at most ``radius`` tokens away in each direction, weighted by exp(cosine / temperature).
    The first mask becomes a map of labels by nearest neighbours; labels of later frames stay soft. They are enlarged,
    bilinearly, each scaled to [0, 1], and the largest one wins.

    - J is the mean over objects of the mean intersection over union over their frames, F the same for contours; the
      first frame, which is given, and the last are not judged. ``j_and_f`` is the mean of both.
    - ``j_and_f_still`` is reached by leaving the first mask where it is: what remains is what the features follow.

    Affinities are computed for blocks of tokens: memory does not grow with the size of frames or the context beyond
    the maps themselves.
    """

    name: ClassVar[str] = "label_propagation"
    metrics: ClassVar[tuple[Metric, ...]] = (J_AND_F, J_MEAN, F_MEAN, J_AND_F_STILL)
    reading: ClassVar[str] = "J&F: 100 is perfect; j_and_f_still is reached by leaving the first mask where it is."
    hub_task: ClassVar[str] = "image-segmentation"
    data_type: ClassVar[type[EvaluationData]] = VideoData
    needs_tokens: ClassVar[bool] = True
    reads_stored: ClassVar[bool] = False
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {"frame_size": 128}}
    tasks = ("video_segmentation",)

    def __init__(
        self,
        data: VideoData,
        *,
        frame_size: int = 480,
        context: int = 7,
        radius: int = 12,
        top_k: int = 5,
        temperature: float = 0.1,
        progress: bool = True,
    ) -> None:
        """Check the settings.

        Args:
            data: Videos with masks.
            frame_size: Shorter side of the frames in pixels. Both sides become multiples of 64 below it, or of the
                patch where that does not divide 64.
            context: Frames before the present one, beside the first.
            radius: Tokens in each direction that a label may come from.
            top_k: Tokens that a label is the mean of.
            temperature: Of the weights.
            progress: Whether to show a bar.
        """
        super().__init__(data, features=("tokens",), seeds=1)
        self.videos = data.videos
        counts = {"frame_size": frame_size, "context": context, "radius": radius, "top_k": top_k}
        if wrong := [name for name, value in counts.items() if value < 1]:
            raise ValueError(f"{wrong[0]} is {counts[wrong[0]]}: expected 1 or more.")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: expected more than 0.")
        self.frame_size, self.context, self.radius = frame_size, context, radius
        self.top_k, self.temperature, self.progress = top_k, temperature, progress

    def settings(self, task: str) -> dict[str, Any]:
        """Return all settings but the bar."""
        names = ("frame_size", "context", "radius", "top_k", "temperature")
        return {name: getattr(self, name) for name in names}

    def protocol(self, encoder: FrozenEncoder, task: str, test: ImageSet | None = None) -> dict[str, Any]:
        """Return the settings, and how many videos and frames there were; nothing is trained."""
        return {
            **self.settings(task),
            "encoder_precision": encoder.precision,
            "videos": len(self.videos),
            "frames": len(self.data.test),
        }

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` where the encoder gives no map, or none of frames of this size."""
        encoder.check_maps()
        self._map(encoder, self.videos[0].frame(0))

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Follow the objects of every video."""
        found: list[tuple[float, float]] = []
        still: list[tuple[float, float]] = []
        names = []
        for video in tqdm(self.videos, desc=f"videos, {encoder.name}", disable=not self.progress, leave=False):
            ours, theirs = self._judge(encoder, video)
            found, still = found + ours, still + theirs
            names += [f"{video.name}/{number}" for number in video.objects]
        (j, f), (j_still, f_still) = (torch.tensor(pairs).double().mean(0).tolist() for pairs in (found, still))
        values = {J_AND_F: (j + f) / 2, J_MEAN: j, F_MEAN: f, J_AND_F_STILL: (j_still + f_still) / 2}
        details = {"objects": [[[name, *pair] for name, pair in zip(names, found, strict=True)]]}
        listed = {metric.name: [value] for metric, value in values.items()}
        return self.records(encoder, task, self.features[0], listed, seeds, details)

    def _judge(
        self, encoder: FrozenEncoder, video: Video
    ) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Return (J, F) of each object, of what follows it and of the first mask."""
        first, judged = video.mask(0), set(video.judged)
        scores = torch.zeros(2, len(video.objects), 2, dtype=torch.float64)
        for number, guess in enumerate(self.follow(encoder, video), start=1):
            if number not in judged:
                continue
            true = video.mask(number)
            for way, mask in enumerate((guess, first)):
                for row, name in enumerate(video.objects):
                    pair = mask == name, true == name
                    scores[way, row] += torch.tensor([region_similarity(*pair), contour_accuracy(*pair)])
        ours, theirs = (scores / len(judged)).tolist()
        return [(j, f) for j, f in ours], [(j, f) for j, f in theirs]

    def follow(self, encoder: FrozenEncoder, video: Video) -> Iterator[Tensor]:
        """Yield the mask of every frame but the first, int64 (H, W), on the CPU; nothing after the last judged one."""
        first = video.mask(0)
        numbers = torch.tensor([0, *video.objects])
        features, size = self._map(encoder, video.frame(0))
        small = F.interpolate(first[None, None].float(), features.shape[1:], mode="nearest-exact")[0, 0].long()
        labels = (small[None] == numbers[:, None, None]).to(features)
        given, before = (features, labels), deque[tuple[Tensor, Tensor]](maxlen=self.context)
        for number in range(1, max(video.judged) + 1):
            features, size = self._map(encoder, video.frame(number))
            sources, known = (torch.stack(parts) for parts in zip(given, *before, strict=True))
            labels = carry_labels(features, sources, known, self.radius, self.top_k, self.temperature)
            before.append((features, labels))
            winner = _enlarge(labels, size).argmax(0).cpu()
            stored = F.interpolate(winner[None, None].float(), first.shape, mode="nearest-exact")[0, 0].long()
            yield numbers[stored]

    def _map(self, encoder: FrozenEncoder, frame: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Compute the map (D, h, w) of a frame, tokens of unit length, and the height and width that it was read at."""
        size = self._size(encoder, *frame.size)
        pixels = torch.from_numpy(np.array(frame.resize(size, Image.Resampling.BICUBIC)))
        found = encoder.maps(encoder.normalise(pixels.permute(2, 0, 1)[None]))[0][0]
        return F.normalize(found, dim=0), (size[1], size[0])

    def _size(self, encoder: FrozenEncoder, width: int, height: int) -> tuple[int, int]:
        """Return width and height of a frame as it is read."""
        patch = encoder.patch_size or 1
        unit = _UNIT if _UNIT % patch == 0 and self.frame_size >= _UNIT else patch
        if (short := self.frame_size // patch * patch) < patch:
            raise ValueError(f"frame_size is {self.frame_size}: less than the {patch}-pixel patches of {encoder.name}.")
        long = max(short, int(short * max(width, height) / min(width, height)) // unit * unit)
        return (long, short) if width >= height else (short, long)


def carry_labels(
    features: Tensor,
    sources: Tensor,
    labels: Tensor,
    radius: int,
    top_k: int,
    temperature: float,
    block: int = _BLOCK,
) -> Tensor:
    """Give every token of a map the labels of its most similar tokens in other maps.

    Args:
        features: (D, h, w), tokens of unit length.
        sources: (M, D, h, w), the other maps.
        labels: (M, C, h, w), theirs.
        radius: Greatest distance, in tokens, in each direction.
        top_k: How many tokens.
        temperature: Weights are exp(cosine / temperature).
        block: Affinities that are held at a time.

    Returns:
        (C, h, w).
    """
    rows, columns = features.shape[1:]
    tokens, others = features.flatten(1).T, sources.transpose(0, 1).flatten(1)  # (N, D), (D, M N)
    known = labels.transpose(0, 1).flatten(1)  # (C, M N)
    places = (
        torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        .flatten(0, 1)
        .to(features.device)
    )
    carried = []
    for part in torch.arange(len(tokens), device=features.device).split(max(1, block // others.shape[1])):
        affinity = tokens[part] @ others
        far = (places[part][:, None] - places[None]).abs().amax(2) > radius  # (n, N)
        affinity.view(len(part), len(sources), -1).masked_fill_(far[:, None], -torch.inf)
        best, where = affinity.topk(min(top_k, affinity.shape[1]), dim=1)
        carried.append((known[:, where] * (best / temperature).softmax(1)).sum(2))  # (C, n)
    return torch.cat(carried, dim=1).unflatten(1, (rows, columns))


def _enlarge(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge labels (C, h, w) to (C, H, W), each scaled so that it reaches from 0 to 1."""
    large = F.interpolate(labels[None], size, mode="bilinear", align_corners=False)[0]
    large = large - large.amin((1, 2), keepdim=True)
    return large / large.amax((1, 2), keepdim=True).clamp(min=1e-12)
