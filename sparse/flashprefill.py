"""FlashPrefill: a block of queries reads the pages whose mean key is within a factor of the best one's."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.index import index_of
from sparse.page_rules import check_range, forced_pages, read_pages, visible_pages
from sparse.page_scores import block_pages, held_pages
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
        index = index_of(chunk)
        mean_k = index.mean_pages(keys, num_tokens)
        energy = index.log_energy(q, mean_k, chunk, scale=scale)  # [Hkv, B, P]
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
