"""SnapKV: keep the prompt tokens that its last queries look at most. https://arxiv.org/abs/2404.14469"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.model import ModelInfo
from kvcache.pool import pages_for
from kvcache.reach import Reach
from kvcache.state import StateRegistry
from kvcache.view import KeyView


@dataclass
class SnapKV:
    """One choice per KV head: the votes of its query heads are averaged. Generated tokens are always kept.

    Its descendants score alike and share the budget out otherwise: they replace `_choose` and what it costs.
    """

    masks = False
    compacts = True

    budget: int = 2048  # tokens kept per KV head, window included
    query_window: int = 32  # last prompt queries: they vote, and their own tokens stay
    smoothing: int = 7  # tokens whose votes are pooled: neighbours of a peak stay with it
    pooling: Literal["max", "avg"] = "max"
    _num_layers: int = field(init=False, default=0, repr=False)  # L, from attach
    _num_kv_heads: int = field(init=False, default=0, repr=False)  # Hkv, from attach

    def __post_init__(self) -> None:
        if self.query_window < 1:
            raise ValueError(f"query_window ({self.query_window}) must be at least 1: someone has to vote")
        if self.budget <= self.query_window:
            raise ValueError(f"budget ({self.budget}) must exceed query_window ({self.query_window})")
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise ValueError(f"smoothing ({self.smoothing}) must be odd and at least 1 (1 = none)")
        if self.pooling not in ("max", "avg"):
            raise ValueError(f"pooling ({self.pooling!r}) must be 'max' or 'avg'")

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        self._num_layers, self._num_kv_heads = model.num_layers, model.num_kv_heads

    def prefill_key(self, total_length: int) -> bytes:
        return b""  # it acts when the prompt is computed

    def reach(self, total_length: int) -> Reach | None:
        return None  # content decides

    def pages_needed(self, prompt: int, total: int, chunk: int) -> int:
        return max(self._num_rows * pages_for(prompt), self.pages_after_prefill(prompt, total))

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        return self._num_rows * pages_for(min(prompt, self.budget) + total - prompt)

    def after_prefill(self, layer: int, q_tail: Tensor, keys: KeyView, *, scale: float) -> Tensor | None:
        """keep bool [Hkv, N], window included; None if all N fit. q_tail [Hq, query_window, D]."""
        if keys.num_tokens <= self.budget:
            return None
        assert q_tail.shape[1] == self.query_window, f"{q_tail.shape[1]} queries, window {self.query_window}"
        k, _ = keys.contiguous()
        chosen = self._choose(layer, self._smooth(window_votes(q_tail, k, scale)))
        window = chosen.new_ones(chosen.shape[0], self.query_window)
        return torch.cat((chosen, window), dim=1)

    @property
    def _past_budget(self) -> int:
        """Tokens kept per KV head before the window, mean over layers and heads."""
        return self.budget - self.query_window

    @property
    def _num_rows(self) -> int:
        """L * Hkv."""
        assert self._num_layers, "attach first"
        return self._num_layers * self._num_kv_heads

    def _choose(self, layer: int, scores: Tensor) -> Tensor:
        """Which tokens before the window stay: bool like scores [Hkv, N - query_window]."""
        return largest(scores, self._past_budget)

    def _smooth(self, votes: Tensor) -> Tensor:
        """Pool neighbours. avg counts the zeros beyond the ends, as published; max has none to count."""
        edge = self.smoothing // 2
        if self.pooling == "max":
            return F.max_pool1d(votes, self.smoothing, stride=1, padding=edge)
        return F.avg_pool1d(votes, self.smoothing, stride=1, padding=edge, count_include_pad=True)


def window_votes(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the last W queries pay to each earlier key, mean over rows and group: float32 [Hkv, N - W].

    q [Hq, W, D] at the last W positions, k [Hkv, N, D].
    """
    num_kv_heads, num_tokens, head_dim = k.shape
    window = q.shape[1]
    queries = (q.float() * scale).reshape(num_kv_heads, -1, window, head_dim)
    votes = torch.empty(num_kv_heads, num_tokens - window, dtype=torch.float32, device=q.device)
    future = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
    for head in range(num_kv_heads):  # one at a time bounds the scores: G * W * N floats
        scores = queries[head] @ k[head].float().T  # [G, W, N]
        scores[..., -window:].masked_fill_(future, -torch.inf)
        votes[head] = scores.softmax(-1)[..., :-window].mean((0, 1))
    return votes


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, ties to the lower index. scores [R, N] -> bool [R, N]."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, dim=-1, sorted=True).values[:, -1:]
    chosen = scores > least
    ties = scores == least
    room = count - chosen.sum(-1, keepdim=True)
    return chosen | (ties & (ties.cumsum(-1) <= room))
