"""What HiP's descents ask for in a prompt: scores of single keys for blocks of queries."""

import torch
from torch import Tensor

from configs.descent import Scores
from configs.model import PAGE_SIZE


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
