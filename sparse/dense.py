"""Dense: every block of queries reads every causal key."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs.model import ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.selection import Selection, dense


@dataclass(frozen=True)
class Dense:
    """Skip nothing: exact attention."""

    grid = False
    last_rows = 0

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state: dense attention fits every model."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        return dense(q.device)
