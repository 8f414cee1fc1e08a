"""A ViT with the parameter names of iBOT's, DINO's and DINOv2's own code, written from their papers.

An independent forward pass: one linear layer for queries, keys and values, softmax written out, positions resized with
upstream's offset of 0.1 patches where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NAMES = {"ibot": ("masked_embed", "gamma_1", "gamma_2"), "dinov2": ("mask_token", "ls1.gamma", "ls2.gamma")}


class UpstreamAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, d)
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]), dim=-1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class UpstreamMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class UpstreamBlock(nn.Module):
    def __init__(self, width: int, heads: int, scales: tuple[str, str] | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp, self.scales = UpstreamAttention(width, heads), UpstreamMlp(width), scales
        for name in scales or ():
            owner, _, leaf = name.rpartition(".")
            if owner:
                self.add_module(owner, nn.Module())
            (self.get_submodule(owner) if owner else self).register_parameter(leaf, nn.Parameter(torch.ones(width)))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_parameter(name) for name in self.scales) if self.scales else (1.0, 1.0)
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


class UpstreamPatches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)


class UpstreamViT(nn.Module):
    """``project`` decides the names; ``chunks`` > 0 nests the blocks as DINOv2's FSDP runs do."""

    def __init__(
        self,
        project: str,
        width: int = 128,
        depth: int = 2,
        patch: int = 8,
        grid: int = 4,
        registers: int = 0,
        scaled: bool = False,
        mask_token: bool = True,
        chunks: int = 0,
    ) -> None:
        super().__init__()
        mask_name, *scale_names = NAMES[project]
        self.patch, self.grid, self.registers, self.mask_name = patch, grid, registers, mask_name
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        if mask_token:
            self.register_parameter(mask_name, nn.Parameter(torch.zeros(1, width)))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = UpstreamPatches(width, patch)
        blocks = [UpstreamBlock(width, width // 64, tuple(scale_names) if scaled else None) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks if not chunks else _chunked(blocks, depth // chunks))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        generator = torch.Generator().manual_seed(width + depth + registers)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + (parameter == 1))

    def positions(self, rows: int, columns: int, offset: float) -> Tensor:
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = ((rows + offset) / self.grid, (columns + offset) / self.grid)
        size = {"scale_factor": scale} if offset else {"size": (rows, columns)}
        grid = nn.functional.interpolate(grid, mode="bicubic", antialias=self.registers > 0, **size)
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor | None = None, offset: float = 0.0) -> Tensor:
        """(B, 3, H, W) -> normed tokens (B, 1 + R + N, D)."""
        patches = self.patch_embed.proj(images)
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.get_parameter(self.mask_name), x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(rows, columns, offset)
        if self.registers:
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in _flat(self.blocks):
            x = block(x)
        return self.norm(x)


def _chunked(blocks: list[UpstreamBlock], size: int) -> list[nn.ModuleList]:
    return [
        nn.ModuleList([*(nn.Identity() for _ in range(start)), *blocks[start : start + size]])
        for start in range(0, len(blocks), size)
    ]


def _flat(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    return [block for chunk in blocks for block in (chunk if isinstance(chunk, nn.ModuleList) else [chunk])]


def wrapped(model: UpstreamViT, prefix: str = "", heads: tuple[str, ...] = ("head",)) -> dict[str, Tensor]:
    """The state dict of encoder and heads in a multi-crop wrapper, below DDP's prefix if one is given."""
    state = {f"{prefix}backbone.{name}": value for name, value in model.state_dict().items()}
    for head in heads:
        for name in ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v"):
            state[f"{prefix}{head}.{name}"] = torch.zeros(3)
    return state
