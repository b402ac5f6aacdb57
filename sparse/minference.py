"""MInference: each head reads by its pattern; most often the columns and diagonals that the last queries of a
chunk look at."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.head_files import read_heads
from sparse.head_patterns import (
    HeadGroup,
    HeadPattern,
    LayerHeads,
    head_pattern,
    layer_heads,
)
from sparse.index import index_of
from sparse.pattern_masks import best_pages, page_means, window_pages
from sparse.selection import (
    ALL,
    BlockLists,
    ExactRows,
    Selection,
    dense,
    lists_from_mask,
)

OPTIONS_OF = {  # what a pattern reads of the options that not all of them do
    "vertical_and_slash": ("vertical", "slash", "last_q", "threshold"),
    "a_shape": ("init", "local"),
    "tri_shape": ("init", "local"),
    "block_sparse": ("top_k",),
}
ESTIMATOR = ("last_q", "threshold")  # the options that go with a file of heads, if any is vertical-slash


@dataclass
class MInference:
    """Read what a head's pattern says. https://arxiv.org/abs/2407.02490

    Vertical-slash heads read the lines that the last queries look at most. Budgets count lines, those forced
    included (30 verticals, 100 slashes); a smaller budget means the forced ones alone. What it costs depends
    on how much the slashes cluster: all but single verticals is widened to whole pages.
    """

    vertical: int = 512  # keys per head that every later query reads
    slash: int = 512  # distances per head at which every query reads; of 8K tokens, 6% each
    pattern: str = "vertical_and_slash"  # of all heads: vertical_and_slash, a_shape, tri_shape, block_sparse
    threshold: float | None = None  # share of the attention, by lines of a kind, after which budgets stop
    last_q: int = 64  # last rows of a chunk that decide
    init: int = 128  # first keys that a_shape and tri_shape read
    local: int = 3968  # nearest distances that they read
    top_k: int = 100  # pages per query block that block_sparse reads, beside the first and its own
    last_rows_dense: int = 0  # last rows of a prompt that read everything, in every head
    heads: Path | None = None  # JSON of (pattern, number, number) per layer and query head
    layers: list[LayerHeads] = field(init=False, repr=False, compare=False)  # [L]
    grid: bool = field(init=False, repr=False, compare=False, default=True)

    def __post_init__(self) -> None:
        least = {"vertical": 1, "slash": 1, "init": 0, "local": 1, "top_k": 1, "last_rows_dense": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {value}")
        if not 1 <= self.last_q <= 64:
            raise ValueError(
                f"last_q ({self.last_q}) must be 1 to 64: only 64 rows are sure to end every chunk"
            )
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold ({self.threshold}) must lie between 0 and 1; without one, budgets alone decide"
            )
        if self.pattern not in OPTIONS_OF:
            raise ValueError(f"pattern ({self.pattern!r}) must be one of {', '.join(OPTIONS_OF)}")
        options = {name for names in OPTIONS_OF.values() for name in names}
        if self.heads is None:
            self._refuse(
                options.difference(OPTIONS_OF[self.pattern]), f"pattern {self.pattern} does not read it"
            )
        else:
            self._refuse({"pattern", *options}.difference(ESTIMATOR), "the file of heads decides")

    @property
    def last_rows(self) -> int:
        return max(layer.most_last_rows for layer in self.layers)

    def _refuse(self, unread: Iterable[str], reason: str) -> None:
        """An option that was given but that no head reads says that someone is mistaken."""
        for name in sorted(unread):
            value = getattr(self, name)
            if value != getattr(MInference, name):
                raise ValueError(f"{name} ({value!r}) has no effect: {reason}; leave it out")

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Group the heads of every layer by pattern."""
        if self.heads is None:
            table = [[self._pattern_of_all()] * model.num_query_heads] * model.num_layers
        else:
            table = read_heads(files / self.heads, model)
        self.layers = [layer_heads(patterns, self.last_rows_dense) for patterns in table]
        # Windows move with the row and blocks are pages: only the estimator looks ahead, to a chunk's end.
        self.grid = any(layer.lines is not None for layer in self.layers)
        if not self.grid:
            self._refuse(ESTIMATOR, f"no head of {self.heads} is vertical_and_slash")

    def _pattern_of_all(self) -> HeadPattern:
        numbers = {"vertical_and_slash": (self.vertical, self.slash), "block_sparse": (0, self.top_k)}
        return head_pattern(self.pattern, *numbers.get(self.pattern, (self.init, self.local)))

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        heads = self._heads_on(q.device, layer)
        num_tokens = chunk.start + chunk.length
        num_rows = 0 if heads.lines is None else min(self.last_q, chunk.length)
        # The estimator would compute every row of the chunk, or all its rows were asked to be dense.
        if num_rows == chunk.length or chunk.start >= chunk.prompt_length - heads.least_last_rows:
            return replace(dense(q.device), estimator_rows=chunk.length)
        num_pages = -(-num_tokens // PAGE_SIZE)
        first_page = chunk.start // PAGE_SIZE
        block_page = torch.arange(first_page, num_pages, device=q.device)  # [B] page of its rows
        pages: list[tuple[Tensor, BlockLists]] = []
        gathered, exact = None, None
        if heads.lines is not None:
            index = index_of(chunk)
            seen = index.estimate(q[:, -num_rows:], num_tokens - num_rows, keys, scale=scale)
            exact = ExactRows(seen.out, seen.lse)
            lines = index.line_lists(seen, heads.lines, first_page, self.threshold)
            pages.append((heads.lines.heads, lines.pages))
            gathered = _joined([(heads.lines.heads, lines.columns)], q.shape[0])
        if heads.windows is not None:
            init, local = heads.windows.budgets
            mask = window_pages(init, local, block_page, num_pages)
            pages.append((heads.windows.heads, lists_from_mask(mask, PAGE_SIZE)))
        if heads.blocks is not None:
            mask = _best_pages(heads.blocks, q, keys, chunk, block_page)
            pages.append((heads.blocks.heads, lists_from_mask(mask, PAGE_SIZE)))
        selection = Selection(
            query_block=PAGE_SIZE,
            pages=_joined(pages, q.shape[0]),
            gathered=gathered,
            exact=exact,
            estimator_rows=num_rows,
        )
        return _with_last_rows_dense(selection, heads, chunk, num_rows)

    def _heads_on(self, device: torch.device, layer: int) -> LayerHeads:
        """The heads of a layer, moved to the device when it is first used."""
        if self.layers[layer].last_rows.device != device:
            self.layers[layer] = self.layers[layer].to(device)
        return self.layers[layer]


def _joined(parts: Sequence[tuple[Tensor, BlockLists]], num_heads: int) -> BlockLists:
    """Lists of all heads from those of groups: (heads [n] int64, lists [n, B]). Others have empty ones."""
    heads, first = parts[0]
    if len(heads) == num_heads:
        return first
    starts = first.starts.new_zeros(num_heads, first.starts.shape[1])
    counts = first.counts.new_zeros(num_heads, first.counts.shape[1])
    before = 0
    for heads, lists in parts:
        starts[heads], counts[heads] = lists.starts + before, lists.counts
        before += lists.indices.shape[0]
    return BlockLists(starts, counts, torch.cat([lists.indices for _, lists in parts]), first.unit)


def _best_pages(group: HeadGroup, q: Tensor, keys: KeyView, chunk: Chunk, block_page: Tensor) -> Tensor:
    """The best pages of the n heads of a group: bool [n, B, P]."""
    mean_k = index_of(chunk).mean_pages(keys, chunk.start + chunk.length)  # [Hkv, P, D]
    held = keys.pages[:, : mean_k.shape[1]] >= 0
    kv_heads = group.heads // (q.shape[0] // mean_k.shape[0])
    mean_q = page_means(q[group.heads], chunk.start % PAGE_SIZE)
    return best_pages(
        mean_q @ mean_k[kv_heads].mT, held[kv_heads], group.budgets[0], group.most[0], block_page
    )


def _with_last_rows_dense(selection: Selection, heads: LayerHeads, chunk: Chunk, num_exact: int) -> Selection:
    """Let the query blocks with the last rows of the prompt read everything, except where they are exact."""
    end = chunk.start + chunk.length - num_exact  # of the rows that lists serve
    first = chunk.prompt_length - heads.most_last_rows  # the first dense row of any head
    if first >= end:
        return selection
    counts = selection.pages.counts
    first_page = chunk.start // PAGE_SIZE
    block_end = PAGE_SIZE * (first_page + 1 + torch.arange(counts.shape[1], device=counts.device))
    read_all = block_end.clamp_max(end) > chunk.prompt_length - heads.last_rows[:, None]  # [Hq, B]
    first_row = max(chunk.start, first // PAGE_SIZE * PAGE_SIZE)
    return replace(
        selection,
        pages=replace(selection.pages, counts=counts.masked_fill(read_all, ALL)),
        # Recall judges what was chosen, and these rows were not.
        estimator_rows=chunk.start + chunk.length - first_row,
    )
