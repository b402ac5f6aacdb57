"""SeerAttention: a small trained gate tells which pages a block of queries reads."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.rotation import Rotation
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.gate_files import Gate, read_gates
from sparse.index import index_of
from sparse.page_rules import check_range, forced_pages, read_pages, visible_pages
from sparse.page_scores import block_pages, held_pages
from sparse.pattern_masks import page_means
from sparse.selection import Selection


@dataclass
class SeerAttention:
    """Read the pages that a gate over pooled queries and keys gives weight to. https://arxiv.org/abs/2410.13276

    Gates see queries and keys before RoPE, and are rotated themselves to the start of their page. The first
    and the rows' own page are always read, or a row might read nothing.
    """

    gates: Path | None = None  # weights of every layer's gate, .pth or .safetensors; must be given
    threshold: float | None = 5e-4  # pages with more of the gate's softmax than this are read
    ratio: float | None = None  # or this share of the pages up to the row, the best ones
    last_rows_dense: int = 128  # last rows of a prompt that read everything
    correct_means: bool = False  # pages left out count by their mean key and value
    layers: list[Gate] = field(init=False, repr=False, compare=False, default_factory=list)  # [L]
    grid = False

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.ratio is None):
            raise ValueError(f"ratio ({self.ratio}) needs threshold: null, and one of the two must be given")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold ({self.threshold}) must be at least 0 and below 1")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio ({self.ratio}) must be above 0 and at most 1")
        check_range(self, {"last_rows_dense": 0})

    @property
    def last_rows(self) -> int:
        return self.last_rows_dense

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Read the gates of this model."""
        if self.gates is None:
            raise ValueError("gates: seerattention needs a file of gates that were trained for the model")
        self.layers = read_gates(files / self.gates, model)

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        block_page = block_pages(chunk, q.device)
        mean_q = page_means(chunk.pre_rope()[0], chunk.start % PAGE_SIZE)  # [Hq, B, D]
        pooled_k = index_of(chunk).pool_pages(keys, num_tokens, chunk.rotation)  # [Hkv, P, 3 D]
        scores = gate_scores(self._gate(layer, q.device), mean_q, pooled_k, block_page, chunk.rotation)
        held = held_pages(keys, num_tokens).repeat_interleave(q.shape[0] // pooled_k.shape[0], 0)
        allowed = visible_pages(block_page, held.shape[1]) & held[:, None]  # [Hq, B, P]
        scores = scores.masked_fill(~allowed, float("-inf"))
        if self.ratio is None:
            assert self.threshold is not None
            kept = scores.softmax(-1) > self.threshold
        else:
            rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            kept = rank < torch.ceil(self.ratio * (block_page + 1))[:, None]
        forced = forced_pages(1, 1, block_page, held.shape[1])
        return read_pages(
            (kept & allowed) | forced, chunk, self.last_rows_dense, keys if self.correct_means else None
        )

    def _gate(self, layer: int, device: torch.device) -> Gate:
        """The gate of a layer, moved to the device when it is first used."""
        if self.layers[layer].k.device != device:
            self.layers[layer] = self.layers[layer].to(device)
        return self.layers[layer]


def gate_scores(
    gate: Gate, mean_q: Tensor, pooled_k: Tensor, block_page: Tensor, rotation: Rotation | None
) -> Tensor:
    """Logits of the gate: [Hq, B, P] float32. mean_q [Hq, B, D], pooled_k [Hkv, P, 3 D], before RoPE.

    Pieces of text may stand side by side, as a first axis of all three.
    """
    num_heads, head_dim = mean_q.shape[-3], mean_q.shape[-1]
    k = _gate_keys(gate.k, pooled_k)
    q = mean_q.float() if gate.q is None else mean_q.float() @ gate.q
    if rotation is not None:
        starts = PAGE_SIZE * torch.arange(k.shape[-2], device=k.device)
        q, k = rotation.apply(q, PAGE_SIZE * block_page), rotation.apply(k, starts)
    k = k.repeat_interleave(num_heads // k.shape[-3], -3)
    return q @ k.mT / float(head_dim**0.5)


def _gate_keys(weights: Tensor, pooled_k: Tensor) -> Tensor:
    """[H, P, D] of weights [H, 3 D, D], by KV head or by query head; for the latter nothing is repeated."""
    num_kv_heads = pooled_k.shape[-3]
    if weights.shape[0] == num_kv_heads:
        return pooled_k @ weights
    grouped = weights.view(num_kv_heads, -1, *weights.shape[1:])  # [Hkv, G, 3 D, D]
    k = pooled_k @ grouped.transpose(1, 2).flatten(2)  # [Hkv, P, G * D]
    return k.view(*k.shape[:-1], -1, weights.shape[2]).transpose(-3, -2).flatten(-4, -3)
