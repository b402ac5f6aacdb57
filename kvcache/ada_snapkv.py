"""Ada-SnapKV: SnapKV whose heads share the budget of their layer by score. https://arxiv.org/abs/2407.11550"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from kvcache.pool import pages_for
from kvcache.snapkv import SnapKV, largest


@dataclass
class AdaSnapKV(SnapKV):
    """`budget` is the mean over the KV heads of a layer. Heads whose attention is scattered keep more."""

    safeguard: float = 0.2  # part of its even share that every head keeps, whatever the scores

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard ({self.safeguard}) must be between 0 and 1 (1 = every head alike)")

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        """Heads share the tokens of a layer exactly, but nobody knows how yet.

        A row of n tokens takes at most (n + PAGE_SIZE - 1) / PAGE_SIZE pages, so the rows of a layer together
        take less than one page each beyond what their tokens fill; and no row takes more than the whole text.
        """
        if prompt <= self.budget:
            return super().pages_after_prefill(prompt, total)
        heads = self._num_kv_heads
        tokens = heads * (self.budget + total - prompt)
        shared = (tokens + heads * (PAGE_SIZE - 1)) // PAGE_SIZE
        return min(self._num_layers * shared, self._num_rows * pages_for(total))

    def _choose(self, layer: int, scores: Tensor) -> Tensor:
        return largest_by_row(scores, shares(scores, self._past_budget, self.safeguard))


def shares(scores: Tensor, mean: int, safeguard: float) -> Tensor:
    """Tokens per head: int64 [H], their sum exactly H * mean. scores [H, N], mean <= N.

    Published: every head keeps floor(safeguard * mean), and the rest is shared as the layer's best H * mean
    scores are. Rounded there, so that totals drift; here fractions are cut, and the tokens left over go one
    each to the largest of them (ties to the lower head). So a share lies between the even one and the one by
    score: none passes N, and together they retain at least the score that even shares would.
    """
    num_heads, num_tokens = scores.shape
    wanted = num_heads * mean
    # Position before head, so that ties (equal scores, plateaus of the pooling) are shared out evenly.
    best = largest(scores.T.reshape(1, -1), wanted).view(num_tokens, num_heads).sum(0)
    safe = int(safeguard * mean)
    by_score = best * (mean - safe)  # in units of 1 / mean: whole numbers, so that nothing is lost
    even_and_score = safe + by_score // mean
    left_over = wanted - even_and_score.sum()
    order = (by_score % mean).argsort(descending=True, stable=True)
    return even_and_score.scatter_add(
        0, order, (torch.arange(num_heads, device=order.device) < left_over).long()
    )


def largest_by_row(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts` largest of each row, ties to the lower index. scores [R, N], counts [R] -> bool [R, N].

    Sorts, where `snapkv.largest` need not: counts stay on the device.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    is_kept = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]  # by rank
    return torch.zeros_like(is_kept).scatter_(1, order, is_kept)
