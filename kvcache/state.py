"""StateRegistry: the tensors that plug-ins ask the cache to keep per page and per slot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.rotation import Rotation


@dataclass(frozen=True, slots=True, eq=False)
class NewKeys:
    """Keys of one layer, just written: a chunk of a prompt, or a token of every decoding sequence."""

    layer: int
    k: Tensor  # after RoPE: [Hkv, T, D] of a chunk, which begins with a page; [B, Hkv, D] of a decode step
    destinations: Tensor  # [Hkv, T] or [B, Hkv] int64, page * PAGE_SIZE + offset
    positions: Tensor  # [T] or [B] int64
    rotation: Rotation | None  # None = the layer rotates nothing
    is_chunk: bool

    def pre_rope(self) -> Tensor:
        """The same keys before RoPE."""
        if self.rotation is None:
            return self.k
        if self.is_chunk:
            return self.rotation.undo(self.k, self.positions)
        return self.rotation.undo(self.k.transpose(0, 1), self.positions).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Upkeep:
    """How the state of pages follows what is written into them. All tokens at once, no host sync."""

    write: Callable[[Tensor, NewKeys], None]
    """Into the state [num_pages, ...]: what new keys change. A page's first token ends what was before."""
    rebuild: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
    """(state, pages [n] int64, keys [n, PAGE_SIZE, D], counts [n]): of compacted pages, from the keys that
    they hold. None = not to be had from them."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a plug-in asked for: the shape of one page's (or one slot's) part, its dtype, and its upkeep."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    upkeep: Upkeep | None = field(default=None, compare=False)  # of a page's; None = the plug-in writes it

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

    def page_state(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        upkeep: Upkeep | None = None,
    ) -> None:
        """One tensor of this shape per page. What a reused page holds is what its last owner left there.

        With upkeep it is written for every page, whichever plan the page's sequence has: pages are shared.
        """
        self._declare(self._declared_pages, "page", name, Declared(shape, dtype, upkeep))

    def slot_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """One tensor of this shape per slot, zeroed when the slot is taken."""
        self._declare(self._declared_slots, "slot", name, Declared(shape, dtype))

    @property
    def page_bytes(self) -> int:
        """Bytes that all page state adds to a page."""
        return sum(declared.bytes for declared in self._declared_pages.values())

    @property
    def is_kept_up(self) -> bool:
        """Does some page state follow what is written?"""
        return any(declared.upkeep is not None for declared in self._declared_pages.values())

    @property
    def follows_compaction(self) -> bool:
        """Can all page state be rebuilt for a page into which kept tokens were moved?"""
        upkeeps = [declared.upkeep for declared in self._declared_pages.values()]
        return all(upkeep is not None and upkeep.rebuild is not None for upkeep in upkeeps)

    def include(self, other: "StateRegistry") -> None:
        """Declare what another registry has declared."""
        for name, one in other._declared_pages.items():
            self._declare(self._declared_pages, "page", name, one)
        for name, one in other._declared_slots.items():
            self._declare(self._declared_slots, "slot", name, one)

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
        """[num_pages, *shape], the page of nobody included: see PagePool.scratch_page."""
        return self._pages[name]

    def of_slots(self, name: str) -> Tensor:
        """[S, *shape], a slot of nobody included, the last."""
        return self._slots[name]

    def all_pages(self) -> list[Tensor]:
        """What every page carries beside keys and values: [num_pages, ...] each."""
        return list(self._pages.values())

    def write(self, new: NewKeys) -> None:
        """Page state follows keys that were just written."""
        for name, declared in self._declared_pages.items():
            if declared.upkeep is not None:
                declared.upkeep.write(self._pages[name], new)

    def rebuild(self, pages: Tensor, keys: Tensor, counts: Tensor) -> None:
        """Of compacted pages [n]: what can be had from their keys [n, PAGE_SIZE, D], `counts` [n] of them."""
        for name, declared in self._declared_pages.items():
            if declared.upkeep is not None and declared.upkeep.rebuild is not None:
                declared.upkeep.rebuild(self._pages[name], pages, keys, counts)

    def copy_slot(self, source: int, target: int) -> None:
        """A fork goes on from where its original is."""
        for state in self._slots.values():
            state[target] = state[source]

    def zero_slot(self, slot: int) -> None:
        """A new sequence inherits nothing."""
        for state in self._slots.values():
            state[slot].zero_()

    def save_slot(self, slot: int) -> list[Tensor]:
        """A copy on the host of what a sequence is about to take along: one tensor per state."""
        return [state[slot].to("cpu", copy=True) for state in self._slots.values()]

    def load_slot(self, slot: int, saved: list[Tensor]) -> None:
        """A sequence goes on where it was, in another slot."""
        for state, content in zip(self._slots.values(), saved, strict=True):
            state[slot] = content.to(state.device)

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
