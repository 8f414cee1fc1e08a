"""Contrastive losses that several objectives share: which row of the batch belongs to which."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed.collectives import gather, gather_rows, rank, world_size

__all__ = ["CONTRASTS", "contrast", "info_nce", "nt_xent", "token_contrast"]

CONTRASTS = ("nt_xent", "info_nce")


def contrast(
    first: Tensor, second: Tensor, temperature: float, form: Literal["nt_xent", "info_nce"]
) -> tuple[Tensor, Tensor]:
    """Compute a symmetric contrastive loss: each row of one set finds its counterpart in the other.

    Args:
        first, second: (B, d), those of this process, of any length.
        temperature: tau.
        form: "nt_xent", SimCLR's: all other rows of both sets are negatives, and the gradient flows into them, too.
            "info_nce", the sum of MoCo-v3's both ways: only the rows of the other set are negatives, without gradient.

    Returns:
        The loss, and the share of rows that find their counterpart first, detached.
    """
    if form == "nt_xent":
        return nt_xent(torch.stack([first, second]), temperature)
    own = torch.stack([first, second], dim=1).detach()
    keys = gather(F.normalize(own, dim=-1)).unbind(dim=1)  # (M, d) each: one exchange for both ways
    losses, hits = zip(info_nce(first, keys[1], temperature), info_nce(second, keys[0], temperature), strict=True)
    return losses[0] + losses[1], (hits[0] + hits[1]) / 2


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE times 2 tau, which keeps the gradient's scale where tau changes.

    Args:
        queries: (B, d), those of this process, of any length.
        keys: (M, d), unit rows of all processes, ordered by rank: the key of each query, and its negatives.
        temperature: tau.

    Returns:
        The mean over the queries, and the share of them whose own key is the nearest, detached.
    """
    logits = F.normalize(queries, dim=-1) @ keys.T / temperature  # (B, M)
    own = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
    loss = 2 * temperature * F.cross_entropy(logits, own)
    return loss, (logits.argmax(dim=1) == own).float().mean()


def nt_xent(projections: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute NT-Xent of this process's views among those of all processes.

    Args:
        projections: (2, B, d), of any length.
        temperature: tau.

    Returns:
        The mean over the 2 B own views, whose mean over processes is the loss of the whole batch; and the share of them
        whose nearest view is that of the same image, detached.
    """
    images = projections.shape[1]
    own = F.normalize(projections, dim=-1)
    every = gather(own.transpose(0, 1)).transpose(0, 1)  # (2, M, d): one exchange for both views
    count = every.shape[1]
    logits = own.flatten(0, 1) @ every.flatten(0, 1).T / temperature  # (2 B, 2 M)
    places = rank() * images + torch.arange(images, device=own.device)
    itself = torch.cat([places, places + count])
    other = torch.cat([places + count, places])
    logits = logits.scatter(1, itself[:, None], -torch.inf)  # no view is compared with itself
    return F.cross_entropy(logits, other), (logits.argmax(dim=1) == other).float().mean()


def token_contrast(
    queries: Tensor, keys: Tensor, temperature: float, most_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare each query with its key and with the keys of other images on all processes.

    Args:
        queries: (P, n, v, E): P places of n images, v of each; of any length.
        keys: Of the same shape; that of a query has the same place, image and number.
        temperature: tau.
        most_tokens: A number of places that no process exceeds, the same on all.

    Returns:
        The sum over the own queries, over their number on an average process: its mean over processes is the mean over
        all queries. The mean cosine of query and key, and the share of queries that find their key first, detached.
        All 0 without images; the loss is 0 with one image, too.
    """
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    places, images, variants = keys.shape[:3]
    if not images:
        nothing = (queries + keys).sum()  # 0, with the gradient's way to the parameters
        return nothing, nothing.detach(), nothing.detach()
    every, real = gather_rows(keys, most_tokens)  # (M, n, v, E), (M,); M counts filling
    per_place = images * variants
    logits = queries.flatten(0, 2) @ every.flatten(0, 2).T / temperature  # (P n v, M n v)
    device = logits.device
    image = torch.arange(images, device=device).repeat_interleave(variants)  # (n v,)
    process = torch.arange(len(every), device=device) // most_tokens  # (M,): one process may have fewer, and no filling
    image_of_key = (process[:, None] * images + image).flatten()
    image_of_query = (rank() * images + image).repeat(places)
    hidden = (image_of_query[:, None] == image_of_key) | ~real.repeat_interleave(per_place)
    own = rank() * most_tokens * per_place + torch.arange(len(logits), device=device)  # each query's key
    logits = logits.masked_fill(hidden.scatter(1, own[:, None], False), -torch.inf)
    count = real.sum() * per_place / world_size()
    loss = F.cross_entropy(logits, own, reduction="sum") / count
    cosine = (queries * keys).detach().sum(dim=-1).mean()
    return loss, cosine, (logits.detach().argmax(dim=1) == own).float().mean()
