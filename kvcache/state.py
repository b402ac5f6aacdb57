"""StateRegistry: the tensors that plug-ins ask the cache to keep per page and per slot."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Declared:
    """What a plug-in asked for: the shape of one page's (or one slot's) part, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StateRegistry:
    """First every plug-in declares (in `attach`), then the cache allocates, then plug-ins read and write.

    A name may be declared again with the same shape and dtype: two plans that share a method share its state.
    """

    def __init__(self) -> None:
        self._declared_pages: dict[str, Declared] = {}
        self._declared_slots: dict[str, Declared] = {}
        self._pages: dict[str, Tensor] = {}
        self._slots: dict[str, Tensor] = {}
        self._allocated = False

    def page_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """One tensor of this shape per page. What a reused page holds is what its last owner left there."""
        self._declare(self._declared_pages, "page", name, Declared(shape, dtype))

    def slot_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """One tensor of this shape per slot, zeroed when the slot is taken."""
        self._declare(self._declared_slots, "slot", name, Declared(shape, dtype))

    @property
    def page_bytes(self) -> int:
        """Bytes that all page state adds to a page."""
        return sum(declared.bytes for declared in self._declared_pages.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes that all slot state costs per slot."""
        return sum(declared.bytes for declared in self._declared_slots.values())

    def allocate(self, num_pages: int, num_slots: int, device: torch.device) -> None:
        """Called once, by the cache, when every plug-in has declared."""
        assert not self._allocated, "state is allocated once"
        self._allocated = True
        for name, one in self._declared_pages.items():
            self._pages[name] = torch.zeros((num_pages, *one.shape), dtype=one.dtype, device=device)
        for name, one in self._declared_slots.items():
            self._slots[name] = torch.zeros((num_slots, *one.shape), dtype=one.dtype, device=device)

    def of_pages(self, name: str) -> Tensor:
        """[num_pages, *shape]."""
        return self._pages[name]

    def of_slots(self, name: str) -> Tensor:
        """[S, *shape]."""
        return self._slots[name]

    def all_pages(self) -> list[Tensor]:
        """What every page carries beside keys and values: [num_pages, ...] each."""
        return list(self._pages.values())

    def copy_slot(self, source: int, target: int) -> None:
        """A fork goes on from where its original is."""
        for state in self._slots.values():
            state[target] = state[source]

    def zero_slot(self, slot: int) -> None:
        """A new sequence inherits nothing."""
        for state in self._slots.values():
            state[slot].zero_()

    def _declare(self, known: dict[str, Declared], kind: str, name: str, wanted: Declared) -> None:
        assert not self._allocated, f"{kind} state {name!r} declared after the cache was allocated"
        if any(size < 1 for size in wanted.shape):
            raise ValueError(f"{kind} state {name!r} has shape {wanted.shape}: every size must be at least 1")
        before = known.setdefault(name, wanted)
        if before != wanted:
            raise ValueError(
                f"{kind} state {name!r} is declared as {before.shape} {before.dtype} and again as "
                f"{wanted.shape} {wanted.dtype}: give one of them another name"
            )
