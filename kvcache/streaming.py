"""Streaming: every head reads the first tokens and the nearest ones. https://arxiv.org/abs/2309.17453"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE
from kvcache.pool import pages_for
from kvcache.reach import FOREVER
from kvcache.static_policy import StaticPolicy


@dataclass
class Streaming(StaticPolicy):
    """Both are rounded up to pages: a query reads the page it lies in and those before it in the window."""

    sink: int = 64  # first tokens, always read: attention rests on them, whatever they say
    window: int = 1024  # nearest tokens, the page of the query among them

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"sink ({self.sink}) must be at least 0 (0 = none)")
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1: a query reads itself")

    @property
    def budget(self) -> int:
        """Tokens kept per KV head."""
        return PAGE_SIZE * (pages_for(self.sink) + pages_for(self.window))

    def prefill_key(self, total_length: int) -> bytes:
        return f"streaming {pages_for(self.sink)} {pages_for(self.window)}".encode()

    def page_reach(self, total_length: int) -> NDArray[np.int32]:
        rows = (self.model.num_layers, self.model.num_kv_heads, pages_for(total_length))
        reach = np.full(rows, pages_for(self.window), dtype=np.int32)
        reach[..., : pages_for(self.sink)] = FOREVER
        return reach
