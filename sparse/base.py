"""What a prefill method is given and what it owes: the protocol, and the two things it sees of a chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from configs.model import ModelInfo
from configs.rotation import Rotation
from sparse.selection import Selection

if TYPE_CHECKING:
    from sparse.index import Index


class KeyView(Protocol):
    """Keys and values that one sequence holds in one layer. Borrowed for one call; never written through."""

    @property
    def num_tokens(self) -> int:
        """Logical length N: the positions [0, N) have been computed (this chunk included)."""

    @property
    def k_pool(self) -> Tensor:
        """[num_pages, PAGE_SIZE, D], shared by every row of the server."""

    @property
    def v_pool(self) -> Tensor:
        """[num_pages, PAGE_SIZE, D]."""

    @property
    def k_scales(self) -> Tensor | None:
        """[num_pages, PAGE_SIZE] float32 where the pools hold codes (configs/quantised.py), else None."""

    @property
    def v_scales(self) -> Tensor | None:
        """[num_pages, PAGE_SIZE]."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values once they are read."""

    @property
    def pages(self) -> Tensor:
        """[Hkv, P] int32 page ids by logical block, -1 = dropped."""

    @property
    def has_holes(self) -> bool:
        """Was a page of this layer dropped? Known on the host."""

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [Hkv, N, D] each, gathered once per layer call; zeros where pages are dropped."""


class StateRegistry(Protocol):
    """Where a plug-in declares, in `attach`, the state that the cache keeps for it: see kvcache/state.py."""

    def page_state(self, name: str, shape: tuple[int, ...]) -> None:
        """One tensor of this shape per page."""

    def slot_state(self, name: str, shape: tuple[int, ...]) -> None:
        """One tensor of this shape per slot, zeroed when the slot is taken."""


def _no_pre_rope() -> tuple[Tensor, Tensor]:
    raise AssertionError("only the model's seam knows the rotation")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of a prompt in this forward."""

    start: int  # position of the first row
    length: int  # Tq rows
    prompt_length: int  # tokens of the whole prompt, frozen at admission
    total_length: int  # prompt + the most that may be generated, frozen at admission
    slot: int
    pre_rope: Callable[[], tuple[Tensor, Tensor]] = _no_pre_rope
    """q [Hq, Tq, D] and k [Hkv, Tq, D] of this chunk and layer before RoPE, computed when asked for."""
    index: "Index | None" = None
    """What methods select with on this device; None = torch: see sparse/index.py."""
    rotation: Rotation | None = None
    """RoPE of this layer, for keys of earlier chunks; None = the layer rotates nothing."""

    @property
    def is_last(self) -> bool:
        return self.start + self.length >= self.prompt_length


class PrefillMethod(Protocol):
    """A dataclass whose fields are its YAML options. Selects; the kernel attends. Serves all sequences."""

    @property
    def grid(self) -> bool:
        """Do a row's choices depend on later rows of its chunk? Then chunks follow a fixed grid."""

    @property
    def last_rows(self) -> int:
        """Last rows of a prompt that read more because they are last: a longer prompt must not reuse them."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Once, before weights load: read per-head tables and weights, declare state; or raise ValueError.

        `files` is the folder that relative paths in the plan start from.
        """

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        """Choose the keys that each block of queries reads. q [Hq, Tq, D], after RoPE. No host sync."""
