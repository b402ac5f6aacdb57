"""FlexPrefill: each head reads as many columns and diagonals as it needs, or what means of pages tell."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.index import index_of
from sparse.page_rules import check_range, check_share, visible_pages
from sparse.page_scores import block_pages, held_pages
from sparse.pattern_masks import keep_lines, page_means, pages_on_diagonals
from sparse.selection import ExactRows, Selection, dense, lists_from_mask


@dataclass(frozen=True)
class FlexPrefill:
    """Decide pattern and budget of every head in every chunk. https://arxiv.org/abs/2502.20766

    The last queries of a chunk show where a head looks. As many pages of columns and of diagonals are read as
    hold a share of it; where mean queries and mean keys tell the same story as the queries themselves, pages
    are added block by block by their means.
    """

    threshold: float = 0.95  # share of the attention at which columns, diagonals and pooled pages stop
    distance: float = 0.1  # heads read by means if these are nearer than this to the truth: 0 = none does
    min_budget: int = 1024  # least keys of columns and of diagonals, each
    max_budget: int | None = None  # most keys of columns and of diagonals, each
    last_q: int = 64  # last rows of a chunk that decide
    grid = True
    last_rows = 0

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        if not 0 <= self.distance <= 1:
            raise ValueError(f"distance ({self.distance}) must be 0 to 1")
        check_range(self, {"min_budget": 1})
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ValueError(
                f"max_budget ({self.max_budget}) must be at least min_budget ({self.min_budget})"
            )
        if not 1 <= self.last_q <= 64:
            raise ValueError(
                f"last_q ({self.last_q}) must be 1 to 64: only 64 rows are sure to end every chunk"
            )

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state: it fits every model."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        num_rows = min(self.last_q, chunk.length)
        if num_rows == chunk.length:  # the estimator would compute every row
            return replace(dense(q.device), estimator_rows=chunk.length)
        last = q[:, -num_rows:]
        index = index_of(chunk)
        seen = index.estimate(last, num_tokens - num_rows, keys, scale=scale)
        block_page = block_pages(chunk, q.device)
        mean_k = index.mean_pages(keys, num_tokens).repeat_interleave(q.shape[0] // keys.pages.shape[0], 0)
        held = held_pages(keys, num_tokens).repeat_interleave(q.shape[0] // keys.pages.shape[0], 0)  # [Hq, P]

        columns, diagonals = seen.columns / num_rows, seen.diagonals / num_rows  # [Hq, N], each adds up to 1
        by_column, by_diagonal = _by_page(columns), _by_page(diagonals)  # [Hq, P]
        pooled_last = _page_softmax(
            last.to(mean_k.dtype).mean(1, keepdim=True), mean_k, held[:, None], scale
        )[:, 0]
        by_means = jensen_shannon(pooled_last, by_column).sqrt() < self.distance  # bool [Hq]
        least = torch.full_like(by_means, self._pages(self.min_budget), dtype=torch.int64)

        def lines(shares: Tensor, by_page: Tensor) -> Tensor:
            budget = torch.where(by_means, least, self._budget(shares))
            num_pages = by_page.shape[1]
            return keep_lines(by_page, budget.clamp_max(num_pages), 1, num_pages)

        kept = lines(diagonals, by_diagonal)
        # Rows of a page reach the keys at the distances of one page diagonal in two pages.
        reached = pad(kept, (0, 1)) | pad(kept, (1, 0))  # [Hq, P + 1]
        visible = visible_pages(block_page, held.shape[1])
        pages = (lines(columns, by_column)[:, None] & visible) | pages_on_diagonals(reached, block_page)
        seen_by_means = _page_softmax(
            page_means(q, chunk.start % PAGE_SIZE), mean_k, visible & held[:, None], scale
        )
        pages = (pages | (self._covering(seen_by_means) & by_means[:, None, None] & visible)) & held[:, None]
        return Selection(
            query_block=PAGE_SIZE,
            pages=lists_from_mask(pages, PAGE_SIZE),
            exact=ExactRows(seen.out, seen.lse),
            estimator_rows=num_rows,
        )

    def _pages(self, num_keys: int) -> int:
        return -(-num_keys // PAGE_SIZE)

    def _budget(self, shares: Tensor) -> Tensor:
        """Pages that as many lines fill as hold the threshold: shares [Hq, N] -> int64 [Hq]."""
        if self.threshold < 1:
            within = shares.sort(dim=-1, descending=True).values.cumsum(-1) <= self.threshold
            budget = (within.sum(-1) + 1) // PAGE_SIZE + 1
        else:
            budget = torch.full_like(shares[:, 0], shares.shape[1], dtype=torch.int64)
        budget = budget.clamp_min(self._pages(self.min_budget))
        return budget if self.max_budget is None else budget.clamp_max(self._pages(self.max_budget))

    def _covering(self, shares: Tensor) -> Tensor:
        """The fewest cells of a head's map that hold the threshold of it all: shares [Hq, B, P] -> bool."""
        if self.threshold == 1:
            return torch.ones_like(shares, dtype=torch.bool)
        values, order = shares.flatten(1).sort(dim=-1, descending=True, stable=True)
        before = pad(values.cumsum(-1)[:, :-1], (1, 0))
        kept = before < self.threshold * shares.shape[1]
        return torch.zeros_like(kept).scatter_(1, order, kept).view(shares.shape)


def _by_page(x: Tensor) -> Tensor:
    """Sums of x [Hq, N] over the keys, or the distances, of each page: [Hq, P]."""
    return pad(x, (0, -x.shape[1] % PAGE_SIZE)).view(x.shape[0], -1, PAGE_SIZE).sum(-1)


def _page_softmax(mean_q: Tensor, mean_k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Attention of mean queries [Hq, B, D] to mean keys [Hq, P, D]: [Hq, B, P], allowed broadcasts to it."""
    scores = scale * mean_q.to(mean_k.dtype) @ mean_k.mT
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence of distributions [..., n] in nats, between 0 and ln 2. What is impossible counts as 0."""
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    from_p, from_q = (torch.special.xlogy(x, x / middle).sum(-1) for x in (p, q))
    divergence: Tensor = (from_p + from_q) / 2
    return divergence.clamp_min(0)
