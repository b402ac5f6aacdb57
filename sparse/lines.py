"""Columns and diagonals as lists: from what an estimator saw to what each block of queries reads."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from sparse.estimator import Estimate
from sparse.head_patterns import NUM_LOCAL, NUM_SINKS, HeadGroup
from sparse.pattern_masks import keep_lines, page_diagonals
from sparse.selection import BlockLists, lists_from_ids, pack


@dataclass(frozen=True, slots=True)
class LineLists:
    """What the n heads of a group read in B query blocks: no key is in both lists of a block."""

    pages: BlockLists  # [n, B] those that kept diagonals run through
    columns: BlockLists  # [n, B] kept keys before the block, outside of these pages


class ListLines(Protocol):
    """The best columns and diagonals of a group of heads, as lists: see `line_lists`."""

    def __call__(
        self, seen: Estimate, group: HeadGroup, first_page: int, threshold: float | None = None
    ) -> LineLists: ...


def line_lists(
    seen: Estimate, group: HeadGroup, first_page: int, threshold: float | None = None
) -> LineLists:
    """Lists of the query blocks from page `first_page` to the last, by the sums that the estimator gave.

    The group's budgets are (columns, diagonals), the forced ones among them; with a threshold, the fewest of
    them that hold this share of the attention. Buffers grow with budgets and blocks, never with blocks times
    pages. No host sync.
    """
    columns, diagonals = of_group(seen.columns, group), of_group(seen.diagonals, group)  # [n, N]
    num_tokens, device = columns.shape[1], columns.device
    most_columns, most_diagonals = (min(most, num_tokens) for most in group.most)
    kept = keep_lines(columns, group.budgets[0], NUM_SINKS, most_columns, threshold)
    by_page = page_diagonals(
        keep_lines(diagonals, group.budgets[1], NUM_LOCAL, most_diagonals, threshold)
    )  # [n, P + 1]
    num_pages = by_page.shape[1] - 1
    block_page = torch.arange(first_page, num_pages, device=device)[:, None]  # [B, 1]

    farthest_first = torch.arange(num_pages, -1, -1, device=device)
    width = min(num_pages + 1, 2 * most_diagonals)  # a diagonal of tokens runs through at most two of pages
    distances = pack(farthest_first, by_page.flip(1), width)[:, None]  # [n, 1, W]
    real = torch.arange(width, device=device) < by_page.sum(1)[:, None, None]
    pages = lists_from_ids(block_page - distances, real & (distances <= block_page), PAGE_SIZE)

    ids = pack(torch.arange(num_tokens, device=device), kept, most_columns)[:, None]  # [n, 1, K]
    real = torch.arange(most_columns, device=device) < kept.sum(1)[:, None, None]
    back = block_page - ids // PAGE_SIZE  # [n, B, K] pages from the block's own back to that of the column
    is_read = by_page[:, None].expand(-1, back.shape[1], -1).gather(2, back.clamp_min(0))
    return LineLists(pages, lists_from_ids(ids, real & (back > 0) & ~is_read, 1))


def of_group(x: Tensor, group: HeadGroup) -> Tensor:
    """The heads of a group [n, N] out of those of the layer, x [Hq, N]: itself where these are all."""
    return x if group.heads.shape[0] == x.shape[0] else x[group.heads]
