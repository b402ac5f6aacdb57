"""Gates of the prefill method seerattention: a query head, looking at a page with 64 rows at once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from engine.gate_features import Features, Recorder, Weights, mean_key_weights
from engine.rope import Rotation
from sparse.base import Chunk, KeyView
from sparse.gate_files import Gate, write_gates
from sparse.page_scores import key_pages, pooled_keys
from sparse.pattern_masks import page_means
from sparse.seerattention import gate_scores
from sparse.selection import Selection, dense


class PrefillGates:
    """Rows are pages of queries, by their means; the features hold all of them."""

    def recorder(self, model: ModelInfo, length: int, device: torch.device) -> Recorder:
        heads, rows = model.num_query_heads, length // PAGE_SIZE
        return _Recorder(model, length, heads=heads, rows=rows, seen=model.head_dim, device=device)

    def start(self, features: Features) -> Weights:
        num_heads, size = features.q.shape[1], features.q.shape[3]
        own = torch.eye(size, device=features.q.device)
        return Weights(mean_key_weights(features), own.repeat(num_heads, 1, 1))

    def scores(self, weights: Weights, features: Features, rotation: Rotation | None) -> Tensor:
        blocks = _blocks(features)
        return gate_scores(
            Gate(weights.k, weights.q), features.q[..., -len(blocks) :, :], features.k, blocks, rotation
        )

    def pages(self, features: Features) -> tuple[Tensor, Tensor]:
        own = _blocks(features)[:, None]
        page = torch.arange(features.k.shape[-2], device=own.device)
        return page <= own, (page < own) & (page != 0)

    def write(self, path: Path, layers: Sequence[Weights]) -> None:
        write_gates(path, [Gate(weights.k.half(), weights.q.half()) for weights in layers])


def _blocks(features: Features) -> Tensor:
    """Pages of queries to learn from: early ones have little to choose from, and would rule the mean."""
    num_pages = features.k.shape[-2]
    return torch.arange(num_pages // 4, num_pages, device=features.k.device)


class _Recorder(Recorder):
    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        assert chunk.start % PAGE_SIZE == num_tokens % PAGE_SIZE == 0, chunk
        blocks = slice(chunk.start // PAGE_SIZE, num_tokens // PAGE_SIZE)
        self.found.q[layer, :, blocks] = page_means(chunk.pre_rope()[0], 0).float()
        by_page = key_pages(keys, num_tokens)
        self.found.k[layer, :, : blocks.stop] = pooled_keys(by_page, num_tokens, chunk.rotation)
        k = by_page.flatten(1, 2)
        for block in range(blocks.start, blocks.stop):
            first = block * PAGE_SIZE - chunk.start
            top, mass = page_attention(
                q[:, first : first + PAGE_SIZE], k[:, : (block + 1) * PAGE_SIZE], scale
            )
            self.found.top[layer, :, block, : block + 1] = top
            self.found.mass[layer, :, block, : block + 1] = mass
        return dense(q.device)


def page_attention(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the 64 rows of the last page pay to each page: the largest probability, and the mean of the sums.

    q [Hq, 64, D], k [Hkv, 64 P, D] after RoPE -> [Hq, P] float32 each.
    """
    num_kv_heads, num_tokens, head_dim = k.shape
    rows = (q.float() * scale).reshape(num_kv_heads, -1, head_dim)  # [Hkv, G * 64, D]
    scores = rows @ k.float().mT
    own = scores.view(num_kv_heads, -1, PAGE_SIZE, num_tokens)[..., -PAGE_SIZE:]
    own.masked_fill_(
        torch.ones(PAGE_SIZE, PAGE_SIZE, dtype=torch.bool, device=q.device).triu(1), float("-inf")
    )
    weights = scores.softmax(-1).view(q.shape[0], PAGE_SIZE, -1, PAGE_SIZE)
    return weights.amax((1, 3)), weights.sum(3).mean(1)
