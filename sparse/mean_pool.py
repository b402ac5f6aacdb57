"""MeanPool: a block of queries reads the pages whose mean key its mean query looks at. The baseline."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs.model import ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.index import index_of
from sparse.page_rules import (
    check_range,
    check_share,
    forced_pages,
    pages_with_mass,
    read_pages,
    visible_pages,
)
from sparse.page_scores import block_pages, held_pages
from sparse.pattern_masks import page_means
from sparse.selection import Selection


@dataclass(frozen=True)
class MeanPool:
    """Score pages by mean query times mean key, the way MoBA's gate does. https://arxiv.org/abs/2502.13189

    The softmax of these scores over pages stands for the attention that a block pays to each.
    """

    threshold: float = 0.9  # share of the attention, as far as means can tell, after which pages stop
    top_k: int | None = None  # most pages beside the forced ones; none = the threshold alone decides
    sink: int = 64  # first keys that are always read
    window: int = 64  # nearest keys that are always read
    last_rows_dense: int = 0  # last rows of a prompt that read everything
    correct_means: bool = False  # pages left out count by their mean key and value
    grid = False

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        check_range(self, {"sink": 0, "window": 1, "last_rows_dense": 0})
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be at least 0")

    @property
    def last_rows(self) -> int:
        return self.last_rows_dense

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state: it fits every model."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        mean_k = index_of(chunk).mean_pages(keys, num_tokens)  # [Hkv, P, D]
        mean_q = page_means(q, chunk.start % 64)  # [Hq, B, D]
        block_page = block_pages(chunk, q.device)
        num_heads, num_blocks = mean_q.shape[:2]
        num_kv_heads, num_pages = mean_k.shape[:2]
        scores = scale * mean_q.view(num_kv_heads, -1, mean_q.shape[2]) @ mean_k.mT
        scores = scores.view(num_kv_heads, -1, num_blocks, num_pages)
        allowed = visible_pages(block_page, num_pages) & held_pages(keys, num_tokens)[:, None, None]
        mass = scores.masked_fill(~allowed, float("-inf")).softmax(-1).flatten(0, 1)
        allowed = allowed.expand(scores.shape).flatten(0, 1)  # [Hq, B, P]
        forced = forced_pages(self.sink, self.window, block_page, num_pages)
        pages = pages_with_mass(mass, forced, allowed, self.threshold, self.top_k)
        return read_pages(pages, chunk, self.last_rows_dense, keys if self.correct_means else None)
