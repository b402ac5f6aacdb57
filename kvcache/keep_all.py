"""KeepAll: the cache forgets nothing."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from configs.model import ModelInfo
from kvcache.pool import pages_for
from kvcache.state import StateRegistry
from kvcache.view import KeyView


@dataclass
class KeepAll:
    """Keep every token of every head."""

    _num_rows: int = field(init=False, default=0, repr=False)  # L * Hkv, from attach

    @property
    def query_window(self) -> int:
        return 0

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        self._num_rows = model.num_layers * model.num_kv_heads

    def prefill_key(self, total_length: int) -> bytes:
        return b""

    def pages_needed(self, prompt: int, total: int, chunk: int) -> int:
        assert self._num_rows, "attach first"
        return self._num_rows * pages_for(total)

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        assert self._num_rows, "attach first"
        return self._num_rows * pages_for(total)

    def after_prefill(self, layer: int, q_tail: Tensor, keys: KeyView, *, scale: float) -> Tensor | None:
        return None
