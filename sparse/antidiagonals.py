"""Scores of pages by antidiagonals: one number for each square of neighbouring queries and keys."""

from typing import Protocol

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from sparse.base import Chunk, KeyView
from sparse.page_scores import SCORE_ELEMS, held_pages, key_pages, query_pages, rows_present

STRIDES = (4, 8, 16, 32)  # tokens of a square's side


class AntidiagonalMass(Protocol):
    """How much each block of queries looks at each page: see `antidiagonal_mass`."""

    def __call__(self, q: Tensor, keys: KeyView, chunk: Chunk, *, stride: int, scale: float) -> Tensor: ...


def antidiagonal_mass(q: Tensor, keys: KeyView, chunk: Chunk, *, stride: int, scale: float) -> Tensor:
    """How much of the attention of each query block falls on each page: [Hq, B, P] float32.

    q [Hq, Tq, D]. Of a square of `stride` queries t and keys u, the mean score over its antidiagonal stands
    for all of it:

        logit[t, u] = scale / stride * sum over s of q[t * stride + stride - 1 - s] . k[u * stride + s]

    Both sides gather their `stride` tokens into one long vector, queries backwards, and one product gives all
    sums. The softmax runs over squares up to the diagonal, which sees stride - 1 keys ahead: of the rows' own
    page, which is read anyway.
    """
    num_heads, _, head_dim = q.shape
    num_tokens = chunk.start + chunk.length
    k, held = key_pages(keys, num_tokens), held_pages(keys, num_tokens)  # [Hkv, P, 64, D], [Hkv, P]
    num_kv_heads, num_pages = held.shape
    squares = PAGE_SIZE // stride  # of a page, along one side
    present = rows_present(chunk, q.device).view(-1, squares, stride).sum(-1)  # [B, squares] rows of a square
    by_page = query_pages(q, chunk.start)
    num_blocks = by_page.shape[1]
    backwards = by_page.view(num_heads, num_blocks, squares, stride, head_dim).flip(3)
    # A square that the chunk cuts through has fewer pairs to take the mean over.
    long_q = backwards.flatten(3) * (scale / present.clamp_min(1)).to(q.dtype)[..., None]
    long_q = long_q.view(num_kv_heads, -1, num_blocks, squares, stride * head_dim)  # [Hkv, G, B, squares, SD]
    long_k = k.view(num_kv_heads, num_pages * squares, -1).to(q.dtype)
    hidden = ~held.repeat_interleave(squares, 1)[:, None]  # [Hkv, 1, U]
    mass = q.new_zeros(*long_q.shape[:3], num_pages, dtype=torch.float32)
    first_page = chunk.start // PAGE_SIZE
    step = max(1, SCORE_ELEMS // (num_heads * squares * num_pages * squares))
    for block in range(0, num_blocks, step):
        rows = long_q[:, :, block : block + step]  # [Hkv, G, b, squares, SD]
        end_page = first_page + block + rows.shape[2]
        num_squares = end_page * squares
        scores = (rows.flatten(1, 3) @ long_k[:, :num_squares].mT).float()
        scores = scores.view(num_kv_heads, rows.shape[1], -1, num_squares)
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device)
        later = later.triu(num_squares - scores.shape[2] + 1)
        scores.masked_fill_(later | hidden[..., None, :num_squares], float("-inf"))
        weights = scores.softmax(-1).view(*rows.shape[:4], end_page, squares).sum(-1)
        weights = weights * (present[block : block + step] > 0)[..., None]
        mass[:, :, block : block + step, :end_page] = weights.sum(3)
    return mass.flatten(0, 1)
