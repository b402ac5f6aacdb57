"""XAttention: pages scored by sums over antidiagonals of the score matrix, read until they hold enough."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.page_rules import (
    check_range,
    check_share,
    forced_pages,
    pages_with_mass,
    read_pages,
    visible_pages,
)
from sparse.page_scores import (
    SCORE_ELEMS,
    block_pages,
    held_pages,
    key_pages,
    query_pages,
    rows_present,
)
from sparse.selection import Selection

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class XAttention:
    """Read the pages that hold a share of the attention, by its antidiagonals.
    https://arxiv.org/abs/2503.16428

    Every query meets one key of each square of `stride` tokens, and every key one query, so no vertical line
    is missed; of single diagonals, only those at odd distances meet. Blocks are pages of 64 on both sides.
    """

    stride: int = 16  # tokens of a square's side; the cost is 1 / stride of all scores
    threshold: float = 0.9  # share of the attention, by antidiagonals, after which pages stop
    sink: int = 64  # first keys that are always read
    window: int = 64  # nearest keys that are always read
    last_rows_dense: int = 0  # last rows of a prompt that read everything
    correct_means: bool = False  # pages left out count by their mean key and value
    grid = False

    def __post_init__(self) -> None:
        if self.stride not in STRIDES:
            raise ValueError(f"stride ({self.stride}) must be one of {', '.join(map(str, STRIDES))}")
        check_share(self, "threshold")
        check_range(self, {"sink": 0, "window": 1, "last_rows_dense": 0})

    @property
    def last_rows(self) -> int:
        return self.last_rows_dense

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state: it fits every model."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        block_page = block_pages(chunk, q.device)
        held = held_pages(keys, num_tokens)  # [Hkv, P]
        mass = antidiagonal_mass(q, key_pages(keys, num_tokens), held, chunk, stride=self.stride, scale=scale)
        num_pages = held.shape[1]
        group = q.shape[0] // held.shape[0]
        allowed = visible_pages(block_page, num_pages) & held.repeat_interleave(group, 0)[:, None]
        forced = forced_pages(self.sink, self.window, block_page, num_pages)
        pages = pages_with_mass(mass, forced, allowed, self.threshold, most=None)
        return read_pages(pages, chunk, self.last_rows_dense, keys if self.correct_means else None)


def antidiagonal_mass(
    q: Tensor, k: Tensor, held: Tensor, chunk: Chunk, *, stride: int, scale: float
) -> Tensor:
    """How much of the attention of each query block falls on each page: [Hq, B, P] float32.

    q [Hq, Tq, D], k [Hkv, P, 64, D], held bool [Hkv, P]. Of a square of `stride` queries t and keys u, the
    mean score over its antidiagonal stands for all of it:

        logit[t, u] = scale / stride * sum over s of q[t * stride + stride - 1 - s] . k[u * stride + s]

    Both sides gather their `stride` tokens into one long vector, queries backwards, and one product gives all
    sums. The softmax runs over squares up to the diagonal, which sees stride - 1 keys ahead: of the rows' own
    page, which is read anyway.
    """
    num_heads, _, head_dim = q.shape
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
