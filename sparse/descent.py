"""HiP's search: from a piece of keys down to one of them, halving, each time towards the better middle."""

from collections.abc import Callable

import torch
from torch import Tensor

from configs.model import PAGE_SIZE

Scores = Callable[[Tensor], Tensor]
"""How well keys suit the best-suited query of each block: positions int64 [Hq, B, C] -> [Hq, B, C]."""


def mean_queries(rows: Tensor, present: Tensor, stride: int) -> Tensor:
    """Means of `stride` neighbouring queries: [Hq, B, 64 / stride, D]. rows [Hq, B, 64, D], zeros if absent.

    present bool [B, 64]. Where the chunk has no row of a mean, it repeats the nearest mean that it has.
    """
    counts = present.view(present.shape[0], -1, stride).sum(-1)  # [B, R]
    sums = rows.view(*rows.shape[:2], -1, stride, rows.shape[3]).sum(3)
    means = sums / counts.clamp_min(1)[..., None].to(rows.dtype)
    place = torch.arange(counts.shape[1], device=rows.device)
    first = torch.where(counts > 0, place, counts.shape[1]).amin(-1, keepdim=True)
    last = torch.where(counts > 0, place, -1).amax(-1, keepdim=True)
    nearest = torch.minimum(torch.maximum(place, first), last)  # [B, R]
    return means.gather(2, nearest[None, :, :, None].expand_as(means))


def probed_scores(queries: Tensor, k: Tensor, held: Tensor) -> Scores:
    """Scores computed for the keys that are asked for. queries [Hq, B, R, D], k [Hkv, P, 64, D].

    held bool [Hkv, P]: keys of dropped pages score -inf.
    """
    num_heads, num_blocks, _, head_dim = queries.shape
    keys = k.flatten(0, 2)  # [Hkv * P * 64, D]
    dropped = ~held.flatten()
    kv_head = torch.arange(num_heads, device=k.device) // (num_heads // k.shape[0])
    first = (kv_head * k.shape[1] * PAGE_SIZE)[:, None, None]  # of each head's keys
    columns = queries.flatten(0, 1).mT  # [Hq * B, D, R]

    def scores(positions: Tensor) -> Tensor:
        places = first + positions
        probed = keys.index_select(0, places.flatten()).view(num_heads * num_blocks, -1, head_dim)
        best = (probed.to(queries.dtype) @ columns).amax(-1).view(positions.shape).float()
        return best.masked_fill(dropped[places // PAGE_SIZE], float("-inf"))

    return scores


def tabled_scores(queries: Tensor, k: Tensor, held: Tensor) -> Scores:
    """The same, looked up in the scores of all keys: one product, without a key read by its index."""
    num_heads, num_blocks, num_queries, _ = queries.shape
    num_kv_heads, num_pages = held.shape
    rows = queries.reshape(num_kv_heads, -1, queries.shape[3])
    products = rows @ k.flatten(1, 2).mT.to(queries.dtype)  # [Hkv, G * B * R, P * 64]
    table = products.view(num_kv_heads, -1, num_blocks, num_queries, num_pages * PAGE_SIZE).amax(3).float()
    dropped = (~held).repeat_interleave(PAGE_SIZE, dim=1)[:, None, None]
    table = table.masked_fill_(dropped, float("-inf")).flatten(0, 1)  # [Hq, B, P * 64]
    return lambda positions: table.gather(2, positions)


def descend(scores: Scores, left: Tensor, right: Tensor, width: int) -> Tensor:
    """The best score met on the way down from each piece, -inf if it is empty: float32 [Hq, B, C].

    Pieces [left, right) [Hq, B, C] int64 have at most `width` keys. In each of floor(log2(width)) + 1 rounds
    a piece is halved, and goes on as the half whose middle key scores best; ties go right. So each round asks
    for 2 keys of a piece.
    """
    is_empty = left >= right
    left, right = left.masked_fill(is_empty, 0), right.masked_fill(is_empty, 1)
    best = torch.full(left.shape, float("-inf"), device=left.device)
    for _ in range(width.bit_length()):
        middle = (left + right) // 2
        probes = torch.cat(((left + middle) // 2, (middle + right) // 2), dim=-1)
        in_left, in_right = scores(probes).chunk(2, dim=-1)
        goes_left = in_left > in_right
        best = torch.maximum(best, torch.where(goes_left, in_left, in_right))
        left, right = torch.where(goes_left, left, middle), torch.where(goes_left, middle, right)
    return best.masked_fill_(is_empty, float("-inf"))
