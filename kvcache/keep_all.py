"""KeepAll: the cache forgets nothing that the model can still read."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcache.pool import pages_for
from kvcache.reach import FOREVER, Reach
from kvcache.static_policy import StaticPolicy


@dataclass
class KeepAll(StaticPolicy):
    """Keep every token of every head; behind a sliding window of the model, nobody reads, and pages leave."""

    masks = False  # the model's attention does, where it has windows

    def prefill_key(self, total_length: int) -> bytes:
        return b""

    def page_reach(self, total_length: int) -> NDArray[np.int32]:
        rows = (self.model.num_layers, self.model.num_kv_heads, pages_for(total_length))
        return np.full(rows, FOREVER, dtype=np.int32)

    def _reach(self, total_length: int) -> Reach | None:
        return super()._reach(total_length) if any(self.model.windows) else None
