"""StaticPolicy: what policies share that know how long a page is read from lengths alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.model import ModelInfo
from kvcache.pool import pages_for
from kvcache.reach import Reach
from kvcache.state import StateRegistry
from kvcache.view import KeyView

REMEMBERED = 64  # reaches of recent lengths: admission asks for the same ones again and again


@dataclass
class StaticPolicy(ABC):
    """Its mask holds in every prompt and answer, dense or not, and what it hides leaves as it goes."""

    masks = True
    compacts = False
    query_window = 0
    _model: ModelInfo | None = field(init=False, default=None, repr=False, compare=False)

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        self._model = model
        self._remembered = lru_cache(REMEMBERED)(self._reach)

    @abstractmethod
    def page_reach(self, total_length: int) -> NDArray[np.int32]:
        """Query pages that read each page, its own first: [L, Hkv, P], P pages of the total length."""

    @abstractmethod
    def prefill_key(self, total_length: int) -> bytes:
        """What of this policy changes the KV that prefill computes: part of the seed of the prefix cache."""

    def reach(self, total_length: int) -> Reach | None:
        return self._remembered(total_length)

    def pages_needed(self, prompt: int, total: int, chunk: int) -> int:
        reach = self.reach(total)
        return (
            self._num_rows * pages_for(total) if reach is None else reach.pages_needed(prompt, total, chunk)
        )

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        reach = self.reach(total)
        return (
            self._num_rows * pages_for(total) if reach is None else reach.pages_after_prefill(prompt, total)
        )

    def after_prefill(self, layer: int, q_tail: Tensor, keys: KeyView, *, scale: float) -> Tensor | None:
        return None

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "attach first"
        return self._model

    @property
    def _num_rows(self) -> int:
        """L * Hkv."""
        return self.model.num_layers * self.model.num_kv_heads

    def _reach(self, total_length: int) -> Reach | None:
        return Reach.of(self.page_reach(total_length), self.model)


def by_kv_head(reach: NDArray[np.int32], model: ModelInfo) -> NDArray[np.int32]:
    """A page stays for as long as any query head of the group reads it. [L, Hq, ...] -> [L, Hkv, ...]."""
    groups = (reach.shape[0], model.num_kv_heads, model.group_size, *reach.shape[2:])
    longest: NDArray[np.int32] = reach.reshape(groups).max(2)
    return longest


def density(reach: NDArray[np.int32], prompt: int) -> float:
    """Part of a prompt's pages that its last queries read, mean over rows. reach [..., P]."""
    pages = pages_for(prompt)
    distance = pages - np.arange(pages)
    return float((reach[..., :pages] >= distance).mean())
