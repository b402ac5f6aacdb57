"""XAttention: pages scored by sums over antidiagonals of the score matrix, read until they hold enough."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs.model import ModelInfo
from sparse.antidiagonals import STRIDES
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
from sparse.selection import Selection


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
        mass = index_of(chunk).antidiagonal_mass(q, keys, chunk, stride=self.stride, scale=scale)
        num_pages = held.shape[1]
        group = q.shape[0] // held.shape[0]
        allowed = visible_pages(block_page, num_pages) & held.repeat_interleave(group, 0)[:, None]
        forced = forced_pages(self.sink, self.window, block_page, num_pages)
        pages = pages_with_mass(mass, forced, allowed, self.threshold, most=None)
        return read_pages(pages, chunk, self.last_rows_dense, keys if self.correct_means else None)
