"""Gates of the decode method seerattention_r: a KV head's query heads, looking at a page with one token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from engine.gate_features import Features, Recorder, Weights, mean_key_weights
from engine.rope import Rotation
from kvcache.seerattention_r import DecodeGate, gate_keys, gate_queries, write_decode_gates
from sparse.base import Chunk, KeyView
from sparse.page_scores import key_pages, pooled_keys
from sparse.selection import Selection, dense

ROWS = 192  # of a piece: neighbours look alike


class DecodeGates:
    """Rows are tokens, `judged_rows` of a piece; the gate speaks of pages before their own."""

    def recorder(self, model: ModelInfo, length: int, device: torch.device) -> Recorder:
        return _Recorder(model, length, device)

    def start(self, features: Features) -> Weights:
        num_heads, size = features.k.shape[1], features.k.shape[3] // 3
        group = features.q.shape[3] // size
        own = torch.eye(size, device=features.q.device)
        return Weights(mean_key_weights(features), own.div(group).repeat(num_heads, group, 1))

    def scores(self, weights: Weights, features: Features, rotation: Rotation | None) -> Tensor:
        gate, num_pages = DecodeGate(weights.q, weights.k, None, None), features.k.shape[-2]
        rows = judged_rows(PAGE_SIZE * num_pages).to(features.k.device)
        starts = PAGE_SIZE * torch.arange(num_pages, device=rows.device)
        q = gate_queries(gate, features.q, rows, rotation)
        scores: Tensor = q @ gate_keys(gate, features.k, starts, rotation).mT / q.shape[-1] ** 0.5
        return scores

    def pages(self, features: Features) -> tuple[Tensor, Tensor]:
        num_pages = features.k.shape[-2]
        page = torch.arange(num_pages, device=features.k.device)
        past = page < judged_rows(PAGE_SIZE * num_pages).to(page.device)[:, None] // PAGE_SIZE
        return past, past & (page != 0)

    def write(self, path: Path, layers: Sequence[Weights]) -> None:
        write_decode_gates(path, [DecodeGate(w.q.half(), w.k.half(), None, None) for w in layers])


def judged_rows(length: int) -> Tensor:
    """Positions in a piece that a gate learns at, ascending: [R] int64, any in its last three quarters."""
    first = length // 4
    drawn = torch.randperm(length - first, generator=torch.Generator().manual_seed(length))
    return first + drawn[:ROWS].sort().values


class _Recorder(Recorder):
    def __init__(self, model: ModelInfo, length: int, device: torch.device) -> None:
        self._rows = judged_rows(length).to(device)
        sizes = {"rows": len(self._rows), "seen": model.group_size * model.head_dim}
        super().__init__(model, length, heads=model.num_kv_heads, **sizes, device=device)

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        by_page = key_pages(keys, num_tokens)
        self.found.k[layer, :, : by_page.shape[1]] = pooled_keys(by_page, num_tokens, chunk.rotation)
        here = (self._rows >= chunk.start) & (self._rows < num_tokens)
        rows = self._rows[here] - chunk.start
        if len(rows):
            heads = by_page.shape[0]
            pre_rope = chunk.pre_rope()[0][:, rows].float()  # [Hq, n, D]
            self.found.q[layer, :, here] = (
                pre_rope.view(heads, -1, *pre_rope.shape[1:]).transpose(1, 2).flatten(2)
            )
            top, mass = row_attention(q[:, rows], by_page, self._rows[here], scale)
            self.found.top[layer, :, here, : by_page.shape[1]] = top
            self.found.mass[layer, :, here, : by_page.shape[1]] = mass
        return dense(q.device)


def row_attention(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the queries of a KV head pay to each page: their largest probability, and the mean of the sums.

    q [Hq, n, D] at positions [n], k [Hkv, P, 64, D], both after RoPE -> [Hkv, n, P] float32 each.
    """
    num_kv_heads, num_pages, _, head_dim = k.shape
    rows = (q.float() * scale).reshape(num_kv_heads, -1, head_dim)  # [Hkv, G * n, D]
    scores = (rows @ k.flatten(1, 2).float().mT).view(num_kv_heads, -1, len(positions), num_pages * PAGE_SIZE)
    future = torch.arange(scores.shape[-1], device=q.device) > positions[:, None]
    weights = scores.masked_fill_(future, float("-inf")).softmax(-1)
    by_page = weights.view(*weights.shape[:3], num_pages, PAGE_SIZE)  # [Hkv, G, n, P, 64]
    return by_page.amax((1, 4)), by_page.sum(4).mean(1)
