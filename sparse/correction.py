"""Mean correction: pages that a selection leaves out still count, each as one key in the same softmax.

A page of 64 keys with mean key k and mean value v is read as 64 keys k with values v: one score, plus log 64.
Attention over the selected keys alone is merged with it by log-sum-exp, so every kernel that gives one has
the correction. It is no part of recall, which judges what was selected.
"""

import math

import torch
from torch import Tensor

from configs.features import Features
from configs.model import PAGE_SIZE
from sparse.base import Chunk, KeyView
from sparse.page_scores import SCORE_ELEMS, block_pages, held_pages, mean_pages, query_pages
from sparse.selection import ALL, Correction, Selection


def mean_correction(pages: Tensor, keys: KeyView, chunk: Chunk) -> Correction:
    """For all pages but the selected, bool [H, B, P], that lie before a block of 64 rows and are held."""
    num_tokens = chunk.start + chunk.length
    past = torch.arange(pages.shape[2], device=pages.device) < block_pages(chunk, pages.device)[:, None]
    held = held_pages(keys, num_tokens)
    # What is dropped may hold anything, and 0 * NaN is NaN.
    means = mean_pages if chunk.index is None else chunk.index.mean_pages
    k, v = (
        means(keys, num_tokens, values=of_values).masked_fill(~held[..., None], 0)
        for of_values in (False, True)
    )
    if pages.shape[0] < held.shape[0]:  # one list for all heads: a page counts where all of them hold it
        held = held.all(0, keepdim=True)
    held = held.repeat_interleave(pages.shape[0] // held.shape[0], 0)[:, None]
    return Correction(k, v, past & held & ~pages)


def corrected(
    out: Tensor, lse: Tensor, q: Tensor, chunk: Chunk, selection: Selection, scale: float, features: Features
) -> tuple[Tensor, Tensor]:
    """out [Hq, Tq, D] and lse [Hq, Tq] once the pages that were left out count, too. No host sync."""
    correction = selection.correction
    if correction is None:
        return out, lse
    num_kv_heads, num_pages, head_dim = correction.k.shape
    counted = correction.left_out & (selection.pages.counts != ALL)[..., None]  # [H, B, P]
    counted = counted.repeat_interleave(max(1, num_kv_heads // counted.shape[0]), 0)
    counted = counted.view(num_kv_heads, -1, *counted.shape[1:])  # [Hkv, 1 or G, B, P]
    rows = query_pages(q, chunk.start)  # [Hq, B, 64, D]
    rows = rows.view(num_kv_heads, -1, *rows.shape[1:])  # [Hkv, G, B, 64, D]
    outs, lses = [], []
    step = max(1, SCORE_ELEMS // (q.shape[0] * PAGE_SIZE * num_pages))
    for block in range(0, rows.shape[2], step):
        some = rows[:, :, block : block + step].to(correction.k.dtype)
        scores = scale * (some.flatten(1, 3) @ correction.k.mT).view(*some.shape[:4], num_pages)
        if features.softcap is not None:
            scores = features.softcap * torch.tanh(scores / features.softcap)
        hidden = ~counted[:, :, block : block + some.shape[2], None]
        scores = (scores + math.log(PAGE_SIZE)).masked_fill_(hidden, float("-inf"))
        total = scores.logsumexp(-1)  # [Hkv, G, b, 64]
        weights = (scores - total.masked_fill(total == float("-inf"), 0)[..., None]).exp()
        outs.append((weights.flatten(1, 3) @ correction.v).view(some.shape))
        lses.append(total)
    first = chunk.start % PAGE_SIZE
    here = slice(first, first + chunk.length)
    part = torch.cat(outs, 2).flatten(2, 3).flatten(0, 1)[:, here]
    part_lse = torch.cat(lses, 2).flatten(2).flatten(0, 1)[:, here]
    whole = torch.logaddexp(lse, part_lse)
    finite = whole.masked_fill(whole == float("-inf"), 0)  # a row that reads nothing keeps out 0
    merged = out * (lse - finite).exp()[..., None] + part * (part_lse - finite).exp()[..., None]
    return merged.to(out.dtype), whole.to(lse.dtype)
