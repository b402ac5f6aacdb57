"""FlashPrefill: a block of queries reads the pages whose mean key is within a factor of the best one's."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.page_rules import check_range, forced_pages, read_pages, visible_pages
from sparse.page_scores import (
    SCORE_ELEMS,
    block_pages,
    held_pages,
    mean_keys,
    query_pages,
    rows_present,
)
from sparse.selection import Selection


@dataclass(frozen=True)
class FlashPrefill:
    """Read the pages whose energy comes near the best page's. https://arxiv.org/abs/2608.19758

    The energy of a page is the sum of exp(scale * q . mean key) over the rows of a block and over the query
    heads that share its keys: one list per KV head. Blocks are pages of 64, aligned to absolute position.
    """

    alpha: float = 0.05  # pages with this part of the best page's energy are read; less reads more
    relative_to: str = "unforced"  # whose best: of all pages, as published, or of those not read anyway
    sink: int = 64  # first keys that are always read
    window: int = 256  # nearest keys that are always read
    last_rows_dense: int = 128  # last rows of a prompt that read everything
    correct_means: bool = False  # pages left out count by their mean key and value
    grid = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha ({self.alpha}) must be 0 to 1, where 0 reads everything")
        if self.relative_to not in ("all", "unforced"):
            raise ValueError(f"relative_to ({self.relative_to!r}) must be all or unforced")
        check_range(self, {"sink": 0, "window": 1, "last_rows_dense": 0})

    @property
    def last_rows(self) -> int:
        return self.last_rows_dense

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state: it fits every model."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        block_page = block_pages(chunk, q.device)
        energy = log_energy(q, mean_keys(keys, num_tokens), chunk, scale=scale)  # [Hkv, B, P]
        num_pages = energy.shape[2]
        complete = torch.arange(num_pages, device=q.device) < num_tokens // PAGE_SIZE
        scored = visible_pages(block_page, num_pages) & (held_pages(keys, num_tokens) & complete)[:, None]
        forced = forced_pages(self.sink, self.window, block_page, num_pages)
        energy = energy.masked_fill(~scored, float("-inf"))
        # A page that is read anyway, the rows' own above all, may set a bar that no other reaches.
        rivals = energy.masked_fill(forced, float("-inf")) if self.relative_to == "unforced" else energy
        least = rivals.amax(-1, keepdim=True) + (math.log(self.alpha) if self.alpha else float("-inf"))
        pages = ((energy >= least) & scored) | forced
        return read_pages(pages, chunk, self.last_rows_dense, keys if self.correct_means else None)


def log_energy(q: Tensor, mean_k: Tensor, chunk: Chunk, *, scale: float) -> Tensor:
    """Log of the sum of exp(scale * q . mean key) over the rows and query heads of a block: [Hkv, B, P].

    q [Hq, Tq, D], mean_k [Hkv, P, D]. In logs, so that no score is too large or too small.
    """
    num_kv_heads, num_pages, head_dim = mean_k.shape
    rows = query_pages(q, chunk.start)  # [Hq, B, 64, D]
    num_heads, num_blocks = rows.shape[:2]
    rows = rows.view(num_kv_heads, -1, num_blocks, PAGE_SIZE, head_dim)
    absent = ~rows_present(chunk, q.device)  # [B, 64]
    energy = mean_k.new_empty(num_kv_heads, num_blocks, num_pages)
    step = max(1, SCORE_ELEMS // (num_heads * PAGE_SIZE * num_pages))
    for block in range(0, num_blocks, step):
        piece = slice(block, block + step)
        some = rows[:, :, piece].to(mean_k.dtype)
        scores = scale * some.flatten(1, 3) @ mean_k.mT
        scores = scores.view(num_kv_heads, -1, some.shape[2], PAGE_SIZE, num_pages)
        scores.masked_fill_(absent[piece][..., None], float("-inf"))
        energy[:, piece] = scores.transpose(1, 2).flatten(2, 3).logsumexp(2)
    return energy
