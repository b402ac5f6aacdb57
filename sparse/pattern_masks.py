"""Which pages and columns a head pattern reads, for many heads at once. None of it waits for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import PAGE_SIZE


def keep_lines(
    scores: Tensor, budgets: Tensor, num_forced: int, most: int, threshold: float | None = None
) -> Tensor:
    """The first `num_forced` lines, and the best others up to each head's budget. Ties: lower index first.

    scores [Hq, N] -> bool [Hq, N]; budgets [Hq] >= num_forced lines, at most `most` of the N there are. With
    a threshold, the fewest of these whose scores add up to that share of the sum of all.
    """
    bar = line_bar(scores, budgets, num_forced, most, threshold)
    above, equal = scores > bar.score[:, None], scores == bar.score[:, None]
    above[:, :num_forced], equal[:, :num_forced] = True, False
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= bar.room[:, None]))


@dataclass(frozen=True, slots=True)
class LineBar:
    """Which lines of a head are kept: the forced, those above a score, and the first that equal it."""

    score: Tensor  # [Hq] the lowest that is kept; infinite where only forced lines are
    room: Tensor  # [Hq] int64: how many that equal it, if there are so many


def line_bar(scores: Tensor, budgets: Tensor, num_forced: int, most: int, threshold: float | None) -> LineBar:
    """The bar of `keep_lines`, from the values of topk, which are sure; among equals its indices are not."""
    ranked = scores.clone()
    ranked[:, :num_forced] = float("inf")
    best = ranked.topk(most).values
    if threshold is not None:
        mass = best.clone()  # by rank, the forced lines first
        mass[:, :num_forced] = scores[:, :num_forced]
        short = mass.cumsum(-1) < threshold * scores.sum(-1, keepdim=True)
        budgets = torch.minimum(budgets, (short.sum(-1) + 1).clamp_min(num_forced))
    lowest = best.gather(-1, (budgets.clamp_max(scores.shape[-1]) - 1)[:, None])
    return LineBar(lowest[:, 0], budgets - (best > lowest).sum(-1))


def _keep_best(scores: Tensor, best: Tensor, budgets: Tensor) -> Tensor:
    """The highest budgets[...] of scores [..., N], whose highest are best [..., most]: bool [..., N].

    From the values of topk, which are sure; among equals its indices are not. Ties: lower index first.
    """
    last = best.gather(-1, (budgets.clamp_max(scores.shape[-1]) - 1)[..., None])  # the lowest score kept
    above, equal = scores > last, scores == last
    room = budgets[..., None] - above.sum(-1, keepdim=True)
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
    distance = _pages_back(block_page, diagonals.shape[1] - 1)
    return diagonals[:, distance.clamp_min(0)] & (distance >= 0)


def _pages_back(block_page: Tensor, num_pages: int) -> Tensor:
    """How far before the page of block b each page lies: [B, P], negative for those after it."""
    return block_page[:, None] - torch.arange(num_pages, device=block_page.device)


def window_pages(init: Tensor, local: Tensor, block_page: Tensor, num_pages: int) -> Tensor:
    """Pages that hold the first `init` keys or a distance below `local`: [Hq], [Hq], [B] -> [Hq, B, P]."""
    distance = _pages_back(block_page, num_pages)  # [B, P]
    reach = (local + PAGE_SIZE - 2) // PAGE_SIZE  # ceil((local - 1) / 64): the farthest distance
    pages = torch.arange(num_pages, device=block_page.device)
    near = distance <= reach[:, None, None]
    return (near | (pages * PAGE_SIZE < init[:, None, None])) & (distance >= 0)


def best_pages(scores: Tensor, held: Tensor, top_k: Tensor, most: int, block_page: Tensor) -> Tensor:
    """The top_k [Hq] pages by score, none after the rows' own, and beside them the first and the rows' own.

    scores [Hq, B, P]: mean query times mean key, of which only the order counts. held bool [Hq, P]: pages
    that are dropped use no budget. Gives bool [Hq, B, P].
    """
    distance = _pages_back(block_page, held.shape[1])
    scores = scores.masked_fill((distance < 0) | ~held[:, None], float("-inf"))
    best = scores.topk(min(most, held.shape[1])).values
    kept = _keep_best(scores, best, top_k[:, None].expand(scores.shape[:2]))
    forced = distance == 0
    forced[:, 0] = True
    return (kept & (scores > float("-inf"))) | forced


def page_means(x: Tensor, offset: int) -> Tensor:
    """Means of x [H, T, D] by page, over the rows there are: [H, pages, D] float32 (float64 if x is).

    The first row stands `offset` rows into its page.
    """
    num_heads, length, head_dim = x.shape
    num_pages = -(-(offset + length) // PAGE_SIZE)
    if padding := num_pages * PAGE_SIZE - length:
        x = torch.nn.functional.pad(x, (0, 0, offset, padding - offset))
    by_page = x.reshape(num_heads, num_pages, PAGE_SIZE, head_dim)
    sums = by_page.sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
    first = PAGE_SIZE * torch.arange(num_pages, device=x.device) - offset  # row that each page starts with
    counts = (first + PAGE_SIZE).clamp_max(length) - first.clamp_min(0)
    return sums / counts[:, None]
