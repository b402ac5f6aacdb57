"""Holdings: what every live sequence holds by itself, from its first chunk to its last token, by slot.

    prefill   (reserve, sync, forward: write and view, advance, drop)*     an index is a logical block
    compact | pack                                                         if the policy forgets something
    decode    (reserve_next, sync, forward: write and read, advance)*      a table index is a place in the row

Three lengths stay apart: `computed` (logical tokens of a sequence), `held` (tokens of a row), `pages_held`.
Everything here runs between forwards, except `write`, `keep_up` and `view`, which use what was prepared.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.quantised import dequantise
from kvcache.compaction import own_pages
from kvcache.decode import Rows, StoredKeys
from kvcache.moves import Moves
from kvcache.origins import Origins
from kvcache.pool import PagePool, pages_for
from kvcache.promises import Promises
from kvcache.state import NewKeys, StateRegistry
from kvcache.table import PageTable, SlotArray, Slots
from kvcache.view import KeyView


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """A copy of what one slot holds."""

    pages: NDArray[np.int32]  # [L, Hkv, P] its row of the page table, -1 = none
    held: NDArray[np.int32]  # [L, Hkv] tokens
    computed: int
    reserved: int
    origins: Origins | None


class Holdings:
    """Pages per (sequence, layer, KV head): each row keeps its own set of tokens.

    A slot that is not live holds nothing. Pages are taken as far as they were promised.
    """

    table: PageTable  # [S, L, Hkv, P] -> page id, -1 = none
    held: SlotArray  # [S, L, Hkv] tokens held per row
    computed: NDArray[np.int64]  # [S] logical tokens per sequence

    def __init__(
        self,
        model: ModelInfo,
        num_slots: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        pool: PagePool,
        promises: Promises,
        states: StateRegistry,
        moves: Moves,
    ) -> None:
        self.dtype = dtype  # that keys and values come in, and are read in
        self.num_layers, self.num_kv_heads = model.num_layers, model.num_kv_heads
        self.pool, self.promises, self.states, self.moves = pool, promises, states, moves
        rows = (num_slots, model.num_layers, model.num_kv_heads)
        device = pool.k.device
        self.table = PageTable(*rows, pages_for(max_length), device)
        self.held = SlotArray(rows, 0, device)
        self.computed = np.zeros(num_slots, dtype=np.int64)
        self._is_live = np.zeros(num_slots, dtype=bool)
        self._reserved = np.zeros(num_slots, dtype=np.int64)  # logical blocks given pages in prefill
        self._origins: list[Origins | None] = [None] * num_slots  # set once a sequence is packed

    @property
    def num_rows(self) -> int:
        """L * Hkv: rows of a sequence, pages of a column."""
        return self.num_layers * self.num_kv_heads

    # Before a forward: pages for what it will write, and where that goes.

    def reserve(self, slot: int, length: int) -> None:
        """Prefill: every row gets pages for the positions [0, length) that no earlier chunk reserved."""
        assert self._is_live[slot] and self._origins[slot] is None, (
            f"slot {slot} is free, packed or compacted"
        )
        first, last = int(self._reserved[slot]), pages_for(length)
        if last <= first:
            return
        shape = (self.num_layers, self.num_kv_heads, last - first)
        self.promises.take(slot, math.prod(shape))
        self.table.host[slot, :, :, first:last] = self.pool.allocate(math.prod(shape)).reshape(shape)
        self.table.touch(slot)
        self._reserved[slot] = last

    def reserve_next(self, slots: Slots) -> None:
        """Decode: every row of these slots whose pages are full gets one more."""
        index = np.asarray(slots, dtype=np.int64)
        for slot in slots:
            if self._origins[slot] is None:
                assert not self._holes(slot).any(), f"slot {slot}: pack rows with dropped pages before decode"
                self._reserved[slot] = pages_for(int(self.computed[slot]) + 1)
        owner, layer, head, place = self._next_places(index)
        self.promises.take(*np.unique(owner, return_counts=True))
        self.table.host[owner, layer, head, place] = self.pool.allocate(owner.size)
        self.table.touch(owner)

    def _next_places(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Where the next token of these slots has no page yet: slot, layer, head, place [n] each."""
        held = self.held.host[slots].astype(np.int64)  # [B, L, Hkv]
        b, layer, head = np.nonzero(held % PAGE_SIZE == 0)
        place = held[b, layer, head] // PAGE_SIZE
        owner = slots[b]
        wanting = self.table.host[owner, layer, head, place] < 0  # not so if a step was prepared and given up
        return owner[wanting], layer[wanting], head[wanting], place[wanting]

    def prefill_destinations(self, slot: int, start: int, length: int) -> Tensor:
        """Where positions [start, start + length) go: int64 [L, Hkv, length], page * PAGE_SIZE + offset."""
        assert self._origins[slot] is None and not self.table.is_stale
        assert start % PAGE_SIZE == 0 or not self.states.is_kept_up, f"slot {slot}: a chunk from {start} on"
        blocks = self.table.host[slot, :, :, start // PAGE_SIZE : pages_for(start + length)]
        assert (blocks >= 0).all(), f"slot {slot}: positions {start}..{start + length} are not reserved"
        position = torch.arange(start, start + length, device=self.table.device.device)
        pages = self.table.device[slot].index_select(2, position // PAGE_SIZE).long()
        return pages * PAGE_SIZE + position % PAGE_SIZE

    def decode_destinations(self, slots: Slots) -> Tensor:
        """Where one new token of each of B slots goes: int64 [L, B, Hkv], page * PAGE_SIZE + offset."""
        index = np.asarray(slots, dtype=np.int64)
        held = self.held.host[index].swapaxes(0, 1)  # [L, B, Hkv]
        layer = np.arange(self.num_layers)[:, None, None]
        pages = self.table.host[index[:, None], layer, np.arange(self.num_kv_heads), held // PAGE_SIZE]
        assert (pages >= 0).all(), f"slots {slots}: no page for the next token"
        destinations = pages.astype(np.int64) * PAGE_SIZE + held % PAGE_SIZE
        return torch.from_numpy(destinations).to(self.table.device.device)

    def decode_rows(self, slots: Slots) -> Rows:
        """What one decode step over B slots reads, its new tokens included."""
        assert not self.table.is_stale and not self.held.is_stale
        index = torch.tensor(slots, dtype=torch.int64, device=self.table.device.device)
        max_held = int(self.held.host[slots].max()) + 1
        pages = self.table.device[..., : pages_for(max_held)].transpose(0, 1)
        return Rows(
            slots=index,
            pages=pages[:, index].contiguous(),
            held=(self.held.device.transpose(0, 1)[:, index] + 1).contiguous(),
            max_held=max_held,
            keys=StoredKeys(self.pool.k, self.pool.k_scales),
        )

    def sync(self) -> None:
        """Let the device see what changed in the tables: once, before each forward."""
        self.table.sync()
        self.held.sync()

    # In a forward: what was prepared is written and read.

    def write(self, k: Tensor, v: Tensor, destinations: Tensor) -> None:
        """Store the tokens of one layer. k, v [*, *, D] of any strides; destinations [*, *] of that layer.

        A chunk comes as [Hkv, T, D], the tokens of a decode step as [B, Hkv, D].
        """
        self.moves.store(self.pool, k, v, destinations)

    def keep_up(self, new: NewKeys) -> None:
        """After `write`: page state follows, by the keys as they will be read."""
        if not self.states.is_kept_up:
            return
        if self.pool.k_scales is not None:
            codes = self.pool.k.flatten(0, 1)[new.destinations]
            read = dequantise(codes, self.pool.k_scales.flatten()[new.destinations], self.dtype)
            new = replace(new, k=read)
        self.states.write(new)

    def view(self, slot: int, layer: int, num_tokens: int) -> KeyView:
        """Keys and values of positions [0, num_tokens): what is computed, and the chunk of this forward."""
        assert not self.table.is_stale and not self.held.is_stale
        new = num_tokens - int(self.computed[slot])
        assert new >= 0, f"slot {slot}: a view of {num_tokens} tokens, {self.computed[slot]} are computed"
        origins = self._origins[slot]
        held = self.held.host[slot, layer] + new
        max_held = int(held.max())
        width = pages_for(num_tokens if origins is None else max_held)
        return KeyView(
            k_pool=self.pool.k,
            v_pool=self.pool.v,
            k_scales=self.pool.k_scales,
            v_scales=self.pool.v_scales,
            dtype=self.dtype,
            pages=self.table.device[slot, layer, :, :width],
            num_tokens=num_tokens,
            num_held=self.held.device[slot, layer] + new,
            max_held=max_held,
            layer=layer,
            has_holes=origins is None and bool((held < num_tokens).any()),
            origins=origins,
        )

    # After a forward.

    def advance(self, slots: int | Slots, tokens: int) -> None:
        """So many new tokens of each of these slots were computed, and are held by every row."""
        self.computed[slots] += tokens
        self.held.host[slots] += tokens
        self.held.touch(slots)

    def drop(self, slot: int, blocks: Tensor) -> None:
        """Whole pages leave. blocks bool [L, Hkv, up to P] of complete logical blocks, True = drop.

        A prompt keeps the holes until it is packed; rows that are packed close them at once. Compacted rows
        hold no whole blocks.
        """
        origins = self._origins[slot]
        assert self._is_live[slot] and (origins is None or origins.unit == PAGE_SIZE), (
            f"slot {slot} is free or compacted"
        )
        complete = int(self.computed[slot]) // PAGE_SIZE
        wanted = blocks.cpu().numpy()
        assert not wanted[..., complete:].any(), f"slot {slot}: only the first {complete} blocks are complete"
        pages = self.table.host[slot, :, :, : wanted.shape[-1]]
        if origins is not None:
            pages = self.table.host[slot]
            block = np.minimum(origins.blocks(pages.shape[-1]), wanted.shape[-1])
            wanted = np.take_along_axis(np.pad(wanted, ((0, 0), (0, 0), (0, 1))), block, axis=-1)
        leaving = wanted & (pages >= 0)
        if not leaving.any():
            return
        places = (pages >= 0).sum(-1)  # [L, Hkv] in use, before any page leaves
        self.pool.release(pages[leaving])
        pages[leaving] = -1
        self.table.touch(slot)
        self.held.host[slot] -= leaving.sum(-1, dtype=np.int32) * PAGE_SIZE
        self.held.touch(slot)
        self.promises.give_back(slot, int(leaving.sum()))
        if origins is not None:
            standing = origins.blocks(int(places.max()) + 1)
            following = np.take_along_axis(standing, places[..., None], axis=-1).ravel()  # block to come next
            assert (following == following[0]).all(), f"slot {slot}: rows go on at blocks {following}"
            self._close_holes(slot, standing[..., :-1], int(following[0]))

    def pack(self, slot: int) -> None:
        """Before decode: close the holes that dropped pages left. Moves page ids, no keys or values."""
        assert self._is_live[slot], f"slot {slot} is free"
        if self._origins[slot] is not None or not self._holes(slot).any():
            return  # packed, or a logical block is already the place in the row
        reserved = int(self._reserved[slot])
        blocks = np.broadcast_to(
            np.arange(reserved, dtype=np.int32), self.table.host[slot, :, :, :reserved].shape
        )
        self._close_holes(slot, blocks, reserved)

    def _close_holes(self, slot: int, blocks: NDArray[np.int32], end: int) -> None:
        """Rows become dense. blocks [L, Hkv, W]: which one stands at each place; the next is block `end`."""
        pages = self.table.host[slot, :, :, : blocks.shape[-1]]
        order = np.argsort(pages < 0, axis=-1, kind="stable")  # held first, ascending
        held = np.take_along_axis(pages, order, axis=-1)
        pages[:] = held
        self.table.touch(slot)
        blocks = np.where(held >= 0, np.take_along_axis(blocks, order, axis=-1), -1)
        self._origins[slot] = Origins.of_blocks(blocks, end * PAGE_SIZE, self.table.device.device)

    def compact(self, slot: int, keep: Tensor) -> None:
        """After prefill: keep only these tokens, packed in order. keep bool [L, Hkv, N], counts may differ.

        A row that owns its pages is compacted in place and takes nothing new. Of pages that others read, what
        is kept is copied to pages of the row's own. Tokens of dropped pages stay dropped.
        """
        assert self._is_live[slot] and self._origins[slot] is None, (
            f"slot {slot} is free, packed or compacted"
        )
        assert keep.shape[-1] == self.computed[slot], (
            f"keep {keep.shape}, {self.computed[slot]} tokens computed"
        )
        assert not self.table.is_stale
        if self._holes(slot).any():
            present = self.table.device[slot, :, :, : self._reserved[slot]] >= 0
            keep = keep & present.repeat_interleave(PAGE_SIZE, dim=-1)[..., : keep.shape[-1]]
        counts = keep.sum(-1, dtype=torch.int32)  # [L, Hkv]
        kept = counts.cpu().numpy()
        ids = torch.full((*counts.shape, int(kept.max())), -1, dtype=torch.int32, device=keep.device)
        for layer in range(self.num_layers):
            new, leaving = own_pages(self.pool, self.table.host[slot, layer], kept[layer])
            old = self.table.device[slot, layer]
            pages = torch.from_numpy(new).to(old.device)
            self.moves.move_kept(self.pool, keep[layer], counts[layer], old, pages, ids[layer])
            self._rebuild_state(new, kept[layer])
            self.pool.release(leaving)
            self.table.host[slot, layer] = new
        self.table.touch(slot)
        self.held.host[slot] = kept
        self.held.touch(slot)
        self.promises.own_all(slot, int((self.table.host[slot] >= 0).sum()))
        self._origins[slot] = Origins(ids=ids, counts=counts, unit=1, start=keep.shape[-1])

    def _rebuild_state(self, pages: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        """Page state of rows that were compacted. pages [Hkv, P] by place, counts [Hkv] tokens."""
        if not self.states.is_kept_up:
            return
        head, place = np.nonzero(pages >= 0)
        held = np.minimum(counts[head] - place * PAGE_SIZE, PAGE_SIZE)
        ids = torch.from_numpy(pages[head, place]).long().to(self.pool.k.device)
        self.states.rebuild(ids, self.pool.keys(ids, self.dtype), torch.from_numpy(held).to(ids.device))

    # All that a slot holds, at once.

    def _contents(self, slot: int) -> Contents:
        return Contents(
            pages=self.table.host[slot].copy(),
            held=self.held.host[slot].copy(),
            computed=int(self.computed[slot]),
            reserved=int(self._reserved[slot]),
            origins=self._origins[slot],
        )

    def _fill(self, slot: int, contents: Contents) -> None:
        """The slot holds this from now on. References and promises are the caller's to see to."""
        self.table.host[slot] = contents.pages
        self.table.touch(slot)
        self.held.host[slot] = contents.held
        self.held.touch(slot)
        self.computed[slot], self._reserved[slot] = contents.computed, contents.reserved
        self._origins[slot] = contents.origins

    def _clear(self, slot: int) -> None:
        """Its pages go back, and it holds nothing."""
        self.pool.release(self.table.host[slot].ravel())
        nothing = np.full_like(self.table.host[slot], -1)
        self._fill(slot, Contents(nothing, np.zeros_like(self.held.host[slot]), 0, 0, None))

    def _begin_with(self, slot: int, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """Its first blocks are computed, and in these pages, [L, Hkv, n], -1 = left. Returns those before."""
        before = self._exchange(slot, 0, pages)
        self._reserved[slot] = pages.shape[-1]
        self.computed[slot] = pages.shape[-1] * PAGE_SIZE
        self.held.host[slot] = (pages >= 0).sum(-1) * PAGE_SIZE
        self.held.touch(slot)
        return before

    def _exchange(self, slot: int, first: int, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """The blocks from `first` on are read in these pages, [L, Hkv, n], -1 = none. Returns what was."""
        table = self.table.host[slot, :, :, first : first + pages.shape[-1]]
        before = table.copy()
        changed = pages != before
        if changed.any():
            self.pool.retain(pages[changed])
            self.pool.release(before[changed])
            table[:] = pages
            self.table.touch(slot)
        return before

    # What is held.

    def kept_tokens(self, slot: int) -> float:
        """Tokens held per row, mean over layers and KV heads."""
        return float(self.held.host[slot].mean())

    def held_by_head(self, slot: int) -> NDArray[np.int32]:
        """Tokens held by this sequence's rows: [L, Hkv]."""
        held: NDArray[np.int32] = self.held.host[slot]
        return held

    def bytes_of(self, slot: int) -> int:
        """Bytes of the pages that this sequence holds."""
        return self._pages_held(slot) * self.pool.page_bytes

    def check(self) -> None:
        """Rows hold what fits their pages and what their pages explain; promises and mirrors hold."""
        pages = (self.table.host >= 0).sum(-1)  # [S, L, Hkv]
        over = np.argwhere(self.held.host > pages * PAGE_SIZE)
        assert over.size == 0, f"rows {over[:4].tolist()} hold more tokens than their pages have room for"
        held = pages.sum((1, 2))
        self.promises.check(held)
        unpacked = np.array([origins is None for origins in self._origins])
        dropped = self._reserved[:, None, None] - pages  # blocks that were reserved and have no page
        expected = self.computed[:, None, None] - dropped * PAGE_SIZE
        wrong = np.argwhere(unpacked[:, None, None] & (self.held.host != expected))
        assert wrong.size == 0, (
            f"unpacked rows {wrong[:4].tolist()} hold tokens that their pages do not explain"
        )
        for slot in np.flatnonzero(~self._is_live):
            left = (held[slot], self.held.host[slot].sum(), self.computed[slot], self.promises.of(int(slot)))
            assert not any(left) and unpacked[slot], f"free slot {slot} still has {left}"
        self.table.check()
        self.held.check()

    def _holes(self, slot: int) -> NDArray[np.bool_]:
        """[L, Hkv]: rows of an unpacked slot that lost pages."""
        holes: NDArray[np.bool_] = self.held.host[slot] != self.computed[slot]
        return holes

    def _pages_held(self, slot: int) -> int:
        return int((self.table.host[slot] >= 0).sum())
