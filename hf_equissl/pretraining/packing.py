"""Global and local crops through the blocks of a ViT together: one pass in place of one for each size.

All tokens of a batch lie in one sequence (1, T, D). Norms, products and MLPs work on every token alone, so they need
not know; attention stays within each image. A pass of its own for local crops would cast and read every weight twice,
add up two gradients for each, and gather every layer twice where weights are sharded. DINOv2 packs its crops for the
same reason (``NestedTensorBlock`` of facebookresearch/dinov2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..modeling import EquiSSLModel
from ..modeling.layers_equissl import EquiSSLLayer

__all__ = ["encode_packed"]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each image lie in the sequence.

    Attributes:
        images: Number of images of each group.
        parts: (group, tokens of each image), in their order: all images of the group with these tokens.
    """

    images: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each part, of all its images."""
        return [self.images[group] * tokens for group, tokens in self.parts]

    def split(self, sequence: Tensor) -> list[Tensor]:
        """Take (T, ...) apart: one (images, tokens, ...) for each part that it holds, views of it."""
        held = 0
        lengths = self.lengths
        while held < len(lengths) and sum(lengths[:held]) < len(sequence):
            held += 1
        pieces = sequence.split(lengths[:held])
        return [piece.unflatten(0, (self.images[g], n)) for piece, (g, n) in zip(pieces, self.parts, strict=False)]

    def rows(self, samples: Sequence[Tensor]) -> Tensor:
        """Number the places of some images' tokens: (branches, kept) numbers of images by group -> (branches, K)."""
        rows, start = [], 0
        for (group, tokens), length in zip(self.parts, self.lengths, strict=True):
            places = torch.arange(start, start + tokens, device=samples[group].device)
            rows.append((samples[group][:, :, None] * tokens + places).flatten(1))
            start += length
        return torch.cat(rows, dim=1)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Give each token its image's value: (branches, images) by group -> (branches, T, 1)."""
        spread = [values[group][:, :, None].expand(-1, -1, tokens).flatten(1) for group, tokens in self.parts]
        return torch.cat(spread, dim=1)[:, :, None]

    def keep(self, kept: tuple[int, ...]) -> Layout:
        """Return the layout of so many images of each group."""
        return Layout(kept, self.parts)


@dataclass(frozen=True)
class PackedAttention:
    """Attention within each image of a packed sequence: a kernel of ``EquiSSLAttention``.

    Attributes:
        layout: Of keys and values. Queries are its first parts, up to their end.
        kernel: What computes the attention of images with equally many tokens.
    """

    layout: Layout
    kernel: Callable[..., tuple[Tensor, Tensor | None]]

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend: (1, H, Q, d) and twice (1, H, T, d) -> (1, Q, H, d), ``None``."""
        queries, keys, values = (self.layout.split(part.transpose(1, 2).squeeze(0)) for part in (query, key, value))
        outputs = []
        for index, (group, _) in enumerate(self.layout.parts[: len(queries)]):
            own = [place for place, (other, _) in enumerate(self.layout.parts) if other == group]
            answering = (_join([parts[place] for place in own]).transpose(1, 2) for parts in (keys, values))
            output, _ = self.kernel(module, queries[index].transpose(1, 2), *answering, *args, **kwargs)
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs)[None], None


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class PackedPath:
    """A residual branch with stochastic depth per image of a packed sequence, as ``EquiSSLDropPath`` for one size.

    Attributes:
        rows: (K,), places of the tokens for which the branch is computed; ``None``: of all.
        factor: (K, 1) or (T, 1), what each token's branch is multiplied with.
        asking: Number of tokens that the residual has behind the branch.
    """

    rows: Tensor | None
    factor: Tensor
    asking: int

    def __call__(
        self, hidden_states: Tensor, branch: Callable[[Tensor], Tensor], num_tokens: int | None = None
    ) -> Tensor:
        """Add the branch: (1, T, D) -> (1, ``asking``, D)."""
        residual = hidden_states[:, : self.asking]
        if self.rows is None:
            output = branch(hidden_states)
            return (output * self.factor[: output.shape[1]]).to(residual.dtype) + residual
        output = branch(hidden_states.index_select(1, self.rows))
        kept = output.shape[1]
        return residual.index_add(1, self.rows[:kept], (output * self.factor[:kept]).to(residual.dtype))


def encode_packed(
    encoder: EquiSSLModel,
    images: Tensor,
    small: Tensor,
    masks: Tensor | None = None,
    layers: Sequence[int] = (),
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Encode images of two sizes in one pass through the blocks; of the small ones CLS and registers alone.

    Args:
        encoder: The student.
        images: (B, C, H, W).
        small: (M, C, h, w).
        masks: bool (B, N), patches of ``images`` that the encoder does not see.
        layers: Blocks after which the tokens of ``images`` are kept.

    Returns:
        Tokens (B, T, D) and (M, P, D) after the final norm, and by block the kept ones (B, T, D), not normed.
    """
    large_tokens, large_prefix = encoder.embeddings(images, bool_masked_pos=masks)
    small_tokens, small_prefix = encoder.embeddings(small)
    groups, prefixes = [large_tokens, small_tokens], [large_prefix, small_prefix]
    blocks = cast(Sequence[EquiSSLLayer], encoder.encoder.layer)
    late, count = encoder.config.cls_insertion_layer, encoder.num_prefix_tokens
    layouts = _plan(groups, len(blocks), late, count)
    ways = _draw(blocks, layouts, encoder.training, large_tokens.device)
    sequence = _pack(groups)
    kept = {}
    for index, (block, layout, (paths, inside)) in enumerate(zip(blocks, layouts, ways, strict=True)):
        if late and index == late:
            parts = layouts[index - 1].split(sequence.squeeze(0))
            sequence = _pack(
                [torch.cat((p.to(t.dtype), t), 1) for p, t in zip(prefixes, parts, strict=True) if p is not None]
            )
        queries = None
        if len(layout.parts) == 3:
            large, other = Layout(layout.images, _usual(layout)).split(sequence.squeeze(0))
            sequence = _pack([large, other[:, :count], other[:, count:]])
            queries = sum(inside.lengths[:2])
        kernel = PackedAttention(inside, block.attention.find_kernel())
        sequence = block(sequence, queries, paths, kernel=kernel)
        if index + 1 in layers:
            kept[index + 1] = layout.split(sequence.squeeze(0))[0]
    large, other = layouts[-1].split(encoder.layernorm(sequence).squeeze(0))
    return large, other, kept


def _pack(groups: Sequence[Tensor]) -> Tensor:
    """Put images with different numbers of tokens into one sequence: each (B, T, D) -> (1, sum of B T, D)."""
    return torch.cat([tokens.flatten(0, 1) for tokens in groups])[None]


def _usual(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Return the parts of a last block's layout as they lie before it: the small images whole."""
    (large, first, rest) = layout.parts
    return large, (first[0], first[1] + rest[1])


def _plan(groups: Sequence[Tensor], blocks: int, late: int, prefix: int) -> list[Layout]:
    """Plan how tokens lie in each block; in the last one what is asked of the small images comes before the rest."""
    images = tuple(len(tokens) for tokens in groups)
    layouts = []
    for index in range(blocks):
        added = prefix if late and index >= late else 0
        large, small = (tokens.shape[1] + added for tokens in groups)
        parts: tuple[tuple[int, int], ...] = ((0, large), (1, small))
        if index == blocks - 1:
            parts = ((0, large), (1, prefix), (1, small - prefix))
        layouts.append(Layout(images, parts))
    return layouts


def _draw(
    blocks: Sequence[EquiSSLLayer], layouts: Sequence[Layout], training: bool, device: torch.device
) -> list[tuple[tuple[PackedPath, PackedPath] | None, Layout]]:
    """Draw for all blocks at once which images drop which branch: some large kernels in place of many small ones.

    Returns:
        For each block its paths, ``None`` without stochastic depth, and the layout of the images that its attention
        sees.
    """
    rates = [block.drop_path.rate for block in blocks]
    if not training or not any(rates):
        return [(None, layout) for layout in layouts]
    images, exact, branches = layouts[0].images, blocks[0].drop_path.exact, 2 * len(blocks)
    if exact:
        left = tuple(max(1, int(count * (1 - rates[0]))) for count in images)
        order = [torch.rand(branches, count, device=device).argsort(dim=1) for count in images]
        samples = [numbers[:, :count] for numbers, count in zip(order, left, strict=True)]
        values = [
            torch.full((branches, kept), count / kept, device=device) for kept, count in zip(left, images, strict=True)
        ]
    else:
        left, samples = images, []
        ramp = torch.linspace(rates[0], rates[-1], len(blocks), device=device).repeat_interleave(2)[:, None]
        # Drawn in fp32: bf16 has eight bits, too few for a probability.
        values = [(torch.rand(branches, count, device=device) >= ramp) / (1 - ramp) for count in images]
    ways: list[tuple[tuple[PackedPath, PackedPath] | None, Layout]] = []
    made: dict[tuple[tuple[int, int], ...], tuple[Tensor | None, Tensor]] = {}
    for index, layout in enumerate(layouts):
        inside = layout.keep(left)
        if layout.parts not in made:
            made[layout.parts] = (layout.rows(samples) if exact else None, inside.spread(values))
        rows, factor = made[layout.parts]
        asking = sum(layout.lengths[:2])
        first, second = 2 * index, 2 * index + 1
        asked = sum(inside.lengths[:2])
        paths = (
            PackedPath(None if rows is None else rows[first], factor[first], asking),
            PackedPath(None if rows is None else rows[second, :asked], factor[second], asking),
        )
        ways.append((paths if rates[index] else None, inside))
    return ways
