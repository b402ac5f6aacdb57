"""Oracle: Quest with the attention itself in the place of bounds: the most that units of 16 could reach.

    python -m benchmarks.quality --plans dense:decode.method=oracle,decode.read=512

It reads every key to know which to read, so only its quality means anything.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.decode import Queries, Rows
from kvcache.decode_methods import DECODE_METHODS
from kvcache.quest import UNIT, Quest, top_units
from kvcache.state import NewKeys, StateRegistry, Upkeep

KEYS = "oracle.keys"  # page state [PAGE_SIZE, D]: a method sees no keys, so it keeps them again


@dataclass(frozen=True)
class Oracle(Quest):
    """Read the units with the most attention on their best key, summed over the query heads of a KV head."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        if self.reuse != 1:
            raise ValueError(f"reuse ({self.reuse}) must be 1: an oracle looks anew at every step")
        states.page_state(KEYS, (PAGE_SIZE, model.head_dim), upkeep=Upkeep(write_keys, rebuild_keys))

    def best(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> Tensor:
        pages, held, q = rows.pages[layer], rows.held[layer], queries.q
        keys = states.of_pages(KEYS)[pages.clamp_min(0).long()].flatten(2, 3)  # [B, Hkv, N, D]
        grouped = q.float().view(*held.shape, -1, q.shape[2])  # [B, Hkv, G, D]
        logits = grouped @ keys.mT * q.shape[2] ** -0.5  # [B, Hkv, G, N]
        unheld = torch.arange(keys.shape[2], device=q.device) >= held[..., None]
        weights: Tensor = logits.masked_fill(unheld.unsqueeze(2), float("-inf")).softmax(-1)
        return top_units(weights.view(*weights.shape[:3], -1, UNIT).amax(-1).sum(2), held, self)


def write_keys(state: Tensor, new: NewKeys) -> None:
    """state [num_pages, PAGE_SIZE, D]."""
    state.view(-1, state.shape[2])[new.destinations] = new.k.float()


def rebuild_keys(state: Tensor, pages: Tensor, keys: Tensor, counts: Tensor) -> None:
    state[pages] = keys.float()


def offered() -> AbstractContextManager[None]:
    """While it lasts, plans may name it."""
    return DECODE_METHODS.adding("oracle", Oracle)
