"""MInference: the last queries of a chunk tell which columns and diagonals of attention all of it needs."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.estimator import estimate
from sparse.selection import (
    ExactRows,
    Selection,
    dense,
    lists_from_ids,
    lists_from_mask,
    num_query_blocks,
    pack,
)

NUM_SINKS = 30  # first keys that are always read, as published
NUM_LOCAL = 100  # distances that are always read, as published
PATTERN = "vertical_and_slash"


@dataclass
class MInference:
    """Read the vertical and slash lines that the last queries look at most. https://arxiv.org/abs/2407.02490

    Budgets count lines, those forced included (30 verticals, 100 slashes); a smaller budget means the forced
    ones alone. What it costs depends on how much the slashes cluster: they are widened to whole pages.
    """

    vertical: int = 512  # keys per head that every later query reads
    slash: int = 512  # distances per head at which every query reads; of 8K tokens, 6% each
    last_q: int = 64  # last rows of a chunk that decide
    heads: Path | None = (
        None  # JSON of (pattern, vertical, slash) per layer and query head; replaces the two above
    )
    vertical_budgets: Tensor = field(init=False, repr=False, compare=False)  # [L, Hq] int64
    slash_budgets: Tensor = field(init=False, repr=False, compare=False)  # [L, Hq] int64
    most_verticals: list[int] = field(init=False, repr=False, compare=False)  # per layer, for the host
    most_slashes: list[int] = field(init=False, repr=False, compare=False)

    grid = True

    def __post_init__(self) -> None:
        for name in ("vertical", "slash"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 1 <= self.last_q <= 64:
            raise ValueError(
                f"last_q ({self.last_q}) must be 1 to 64: only 64 rows are sure to end every chunk"
            )

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Read the budgets of every (layer, head)."""
        if self.heads is None:
            budgets = [[(self.vertical, self.slash)] * model.num_query_heads] * model.num_layers
        else:
            budgets = read_heads(files / self.heads, model)
        table = torch.tensor(budgets)  # [L, Hq, 2]
        # The forced lines are part of the budget. A smaller one would keep an arbitrary few of them, perhaps
        # without the diagonal itself: rows without keys.
        self.vertical_budgets = table[..., 0].clamp_min(NUM_SINKS)
        self.slash_budgets = table[..., 1].clamp_min(NUM_LOCAL)
        self.most_verticals = self.vertical_budgets.amax(1).tolist()
        self.most_slashes = self.slash_budgets.amax(1).tolist()

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_rows = min(self.last_q, chunk.length)
        if num_rows == chunk.length:  # the estimator would compute every row of the chunk
            return replace(dense(q.device), estimator_rows=num_rows)
        num_tokens = chunk.start + chunk.length
        seen = estimate(q[:, -num_rows:], num_tokens - num_rows, keys, scale=scale)
        if self.vertical_budgets.device != q.device:
            self.vertical_budgets = self.vertical_budgets.to(q.device)
            self.slash_budgets = self.slash_budgets.to(q.device)
        most_verticals = min(self.most_verticals[layer], num_tokens)
        most_slashes = min(self.most_slashes[layer], num_tokens)
        verticals = keep_lines(seen.columns, self.vertical_budgets[layer], NUM_SINKS, most_verticals)
        slashes = keep_lines(seen.diagonals, self.slash_budgets[layer], NUM_LOCAL, most_slashes)

        num_blocks = num_query_blocks(chunk.start, chunk.length, PAGE_SIZE)
        block_page = chunk.start // PAGE_SIZE + torch.arange(
            num_blocks, device=q.device
        )  # [B] page of its rows
        pages = pages_on_diagonals(page_diagonals(slashes), block_page)  # [Hq, B, P]
        columns = pack(
            torch.arange(num_tokens, device=q.device), verticals, most_verticals
        )  # [Hq, K] ascending
        alone = outside_pages(columns, verticals.sum(-1), pages, block_page)  # [Hq, B, K]
        return Selection(
            query_block=PAGE_SIZE,
            pages=lists_from_mask(pages, PAGE_SIZE),
            gathered=lists_from_ids(columns[:, None], alone, 1),
            exact=ExactRows(seen.out, seen.lse),
            estimator_rows=num_rows,
        )


def keep_lines(scores: Tensor, budgets: Tensor, num_forced: int, most: int) -> Tensor:
    """The first `num_forced` lines, and the best others up to each head's budget. Ties: lower index first.

    scores [Hq, N] -> bool [Hq, N]; budgets [Hq] >= num_forced lines, at most `most` of the N there are.
    """
    scores = scores.clone()
    scores[:, :num_forced] = float("inf")
    best = scores.topk(most).values  # the values are sure, among equals the indices of topk are not
    last = best.gather(1, (budgets.clamp_max(scores.shape[1]) - 1)[:, None])  # [Hq, 1] the lowest score kept
    above, equal = scores > last, scores == last
    room = budgets[:, None] - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def page_diagonals(slashes: Tensor) -> Tensor:
    """Diagonals of pages that cover the kept distances. slashes [Hq, N] -> bool [Hq, P + 1], P pages of N.

    At distance d, the rows of a page reach the pages d // 64 and ceil(d / 64) before it:

        rows of page r:     |  r - 2  |  r - 1  |    r    |
        d = 100               |----d----|                 64 keys, in two pages
    """
    num_heads, num_tokens = slashes.shape
    num_pages = -(-num_tokens // PAGE_SIZE)
    by_floor = slashes.new_zeros(num_heads, num_pages * PAGE_SIZE)
    by_floor[:, :num_tokens] = slashes
    by_ceil = slashes.new_zeros(num_heads, num_pages * PAGE_SIZE)
    by_ceil[:, : num_tokens - 1] = slashes[:, 1:]  # ceil(d / 64) = (d - 1) // 64 + 1
    diagonals = slashes.new_zeros(num_heads, num_pages + 1)
    diagonals[:, :-1] = by_floor.view(num_heads, num_pages, PAGE_SIZE).any(-1)
    diagonals[:, 1:] |= by_ceil.view(num_heads, num_pages, PAGE_SIZE).any(-1)
    return diagonals


def pages_on_diagonals(diagonals: Tensor, block_page: Tensor) -> Tensor:
    """Pages that the rows of page block_page[b] read, none after it. diagonals [Hq, P + 1] -> [Hq, B, P]."""
    num_pages = diagonals.shape[1] - 1
    distance = block_page[:, None] - torch.arange(num_pages, device=diagonals.device)  # [B, P] in pages
    return diagonals[:, distance.clamp_min(0)] & (distance >= 0)


def outside_pages(columns: Tensor, counts: Tensor, pages: Tensor, block_page: Tensor) -> Tensor:
    """Which verticals a query block must gather: those in earlier pages that it does not read anyway.

    columns [Hq, K] ascending, of which the first counts [Hq] are real; pages [Hq, B, P] -> bool [Hq, B, K].
    """
    page = (columns // PAGE_SIZE).long()[:, None].expand(-1, block_page.shape[0], -1)  # [Hq, B, K]
    real = torch.arange(columns.shape[1], device=columns.device) < counts[:, None, None]
    return real & (page < block_page[:, None]) & ~pages.gather(2, page)


def read_heads(path: Path, model: ModelInfo) -> list[list[tuple[int, int]]]:
    """(vertical, slash) of every layer and query head, from a file in the published form.

    A list of layers, each an object by query head: {"0": ["vertical_and_slash", 1000, 6096, 0.61], ...}. The
    last number says how well the pattern did when it was searched, and is not used. ValueError names the key.
    """
    try:
        layers = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"heads: cannot read {path}: {error}") from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"heads: {path} must be a list of layers, each an object by query head")
    if len(layers) != model.num_layers:
        raise ValueError(f"heads: {path} has {len(layers)} layers, {model.name} has {model.num_layers}")
    wanted = [str(head) for head in range(model.num_query_heads)]
    for index, layer in enumerate(layers):
        if set(layer) != set(wanted):
            raise ValueError(
                f"heads: {path}[{index}] has {len(layer)} heads ({', '.join(list(layer)[:3])}, ...), "
                f'{model.name} has {len(wanted)} query heads ("0" to "{wanted[-1]}")'
            )
    return [
        [_budgets(layer[head], f'{path}[{index}]["{head}"]') for head in wanted]
        for index, layer in enumerate(layers)
    ]


def _budgets(entry: Any, where: str) -> tuple[int, int]:
    if not isinstance(entry, list) or len(entry) not in (3, 4):
        raise ValueError(f'heads: {where} must be ["{PATTERN}", vertical, slash, score], not {entry!r}')
    if entry[0] != PATTERN:
        raise ValueError(f'heads: {where}[0] is {entry[0]!r}; only "{PATTERN}" is accepted')
    for place, name in ((1, "vertical"), (2, "slash")):
        if type(entry[place]) is not int or entry[place] < 1:
            raise ValueError(
                f"heads: {where}[{place}], {name}, must be an integer of at least 1, not {entry[place]!r}"
            )
    return entry[1], entry[2]
