"""Delta correction: what reading densely changes in one row is added to the sparse rows that follow it.

    position   64    65        66        67       68    69     ...      every = 4
    output     dense + change  + change  + change dense + its change

A change is dense minus sparse output of the first row of its group, and no later row has a part in it: groups
begin at multiples of `every`, and so do chunks, so that an answer does not depend on where chunks end.
"""

import torch
from torch import Tensor

from configs.features import Features
from sparse.attention import SCORE_ELEMS, softmax_attention, with_sinks
from sparse.base import Chunk, KeyView
from sparse.selection import Selection

ROWS_AT_ONCE = 32  # the keys behind a row that are scored with it are in vain


def with_delta(
    out: Tensor,
    q: Tensor,
    keys: KeyView,
    chunk: Chunk,
    selection: Selection,
    every: int,
    *,
    scale: float,
    features: Features,
) -> Tensor:
    """Corrected rows [Hq, Tq, D], from those that a selection gave and their queries, both [Hq, Tq, D].

    Every so many rows one is read densely. Exact rows stay as they are. No host sync.
    """
    assert chunk.start % every == 0 and features.window is None, (chunk.start, every, features)
    exact = 0 if selection.exact is None else selection.exact.lse.shape[1]
    sparse = out[:, : chunk.length - exact]
    dense = dense_rows(q[:, : sparse.shape[1] : every], keys, chunk, every, scale, features)
    change = dense.float() - sparse[:, ::every].float()
    corrected = sparse + change.repeat_interleave(every, dim=1)[:, : sparse.shape[1]]
    corrected[:, ::every] = dense.float()
    return torch.cat((corrected.to(out.dtype), out[:, sparse.shape[1] :]), dim=1)


def dense_rows(
    q: Tensor, keys: KeyView, chunk: Chunk, every: int, scale: float, features: Features
) -> Tensor:
    """Attention over all keys of every so many rows, from the first of a chunk on. q [Hq, R, D], and back."""
    num_tokens = chunk.start + chunk.length
    k, v = (x[:, :num_tokens] for x in keys.contiguous())  # [Hkv, N, D]
    grouped = q.view(k.shape[0], -1, *q.shape[1:])  # [Hkv, G, R, D]
    places = torch.arange(num_tokens, device=q.device)
    step = max(1, min(ROWS_AT_ONCE, SCORE_ELEMS // (q.shape[0] * num_tokens)))
    pieces = []
    for first in range(0, q.shape[1], step):
        rows = grouped[:, :, first : first + step]
        own = chunk.start + every * torch.arange(first, first + rows.shape[2], device=q.device)
        end = chunk.start + every * (first + rows.shape[2] - 1) + 1  # the keys that the last of them sees
        hidden = places[:end] > own[:, None]
        pieces.append(softmax_attention(rows, k[:, :end], v[:, :end], hidden, scale, features.softcap))
    out, lse = (torch.cat(parts, dim=2).flatten(0, 1) for parts in zip(*pieces, strict=True))
    return with_sinks(out, lse, features.sinks, q.dtype).out
