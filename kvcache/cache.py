"""KVCache: what every live sequence holds, by slot. Owns the pool, the page table, promises and lengths.

    admit     (borrow)                                                     columns of an equal beginning
    prefill   (reserve, sync, forward: write and view, advance, publish, drop)*    an index is a logical block
    compact | pack                                                         if the policy forgets something
    fork                                                                   one prompt, several answers
    decode    (reserve_next, sync, forward: write and read, advance)*      a table index is a place in the row
    swap_out, swap_in                                                      at any time, with a host tier
    release

Three lengths stay apart: `computed` (logical tokens of a sequence), `held` (tokens of a row), `pages_held`.
Everything here runs between forwards, except `view` and `write`, which use what was prepared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.quantised import dequantise
from kvcache.compaction import copy_pages, own_pages
from kvcache.decode import Rows
from kvcache.host import HostArena, Swapped
from kvcache.host_columns import HostColumns
from kvcache.moves import TORCH_MOVES, Moves
from kvcache.origins import Origins
from kvcache.pool import PagePool, pages_for
from kvcache.prefix import NO_COLUMNS, NO_PARENT, Columns, PrefixCache
from kvcache.promises import Promises
from kvcache.state import NewKeys, StateRegistry
from kvcache.table import PageTable, SlotArray, Slots
from kvcache.view import KeyView


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How much the cache can hold: measured or configured at start."""

    num_pages: int
    num_slots: int  # sequences that may live at once
    max_length: int  # tokens of the longest sequence, prompt and generated
    host_pages: int = 0  # of the host tier; 0 = there is none
    host_columns: int = 0  # of those, for columns that leave the pool


@dataclass(frozen=True, slots=True)
class PageUsage:
    """Where the pages are: free + private + borrowed + cached == num_pages."""

    free: int
    private: int  # one row reads it, whether a column holds it or not
    borrowed: int  # several rows read it
    cached: int  # no row reads it; a column holds it for a later prompt
    held_bytes: int  # of the pages that sequences hold


class KVCache:
    """Pages per (sequence, layer, KV head): each row keeps its own set of tokens."""

    pool: PagePool
    table: PageTable  # [S, L, Hkv, P] -> page id, -1 = none
    prefix: PrefixCache  # columns that prompts may share
    promises: Promises
    held: SlotArray  # [S, L, Hkv] tokens held per row
    computed: NDArray[np.int64]  # [S] logical tokens per sequence

    def __init__(
        self,
        model: ModelInfo,
        size: CacheSize,
        *,
        dtype: torch.dtype,
        device: torch.device,
        states: StateRegistry,
        moves: Moves = TORCH_MOVES,
        page_dtype: torch.dtype | None = None,  # of quantised pages; None = pages hold keys as they come
    ) -> None:
        self.dtype = dtype  # that keys and values come in, and are read in
        self.num_layers, self.num_kv_heads = model.num_layers, model.num_kv_heads
        self.num_slots = size.num_slots
        self.states, self.moves = states, moves
        states.allocate(size.num_pages, size.num_slots, device)
        self.pool = PagePool(
            size.num_pages, model.head_dim, dtype=page_dtype or dtype, device=device, states=states
        )
        self.prefix = PrefixCache(self.pool, self.num_rows)
        self.pool.make_room = self.prefix.make_room
        self.host = HostArena(size.host_pages, self.pool) if size.host_pages else None
        self.host_columns = None
        if self.host is not None and size.host_columns:
            self.host_columns = HostColumns(self.host, size.host_columns, self.pool, self.prefix)
            self.prefix.leaving = self.host_columns.keep
        for_swaps = size.host_pages - size.host_columns * self.num_rows
        self.promises = Promises(size.num_pages, size.num_slots, self.prefix, for_swaps)
        rows = (size.num_slots, model.num_layers, model.num_kv_heads)
        self.table = PageTable(*rows, pages_for(size.max_length), device)
        self.held = SlotArray(rows, 0, device)
        self.computed = np.zeros(size.num_slots, dtype=np.int64)
        self._is_live = np.zeros(size.num_slots, dtype=bool)
        self._reserved = np.zeros(size.num_slots, dtype=np.int64)  # logical blocks given pages in prefill
        self._origins: list[Origins | None] = [None] * size.num_slots  # set once a sequence is packed
        self._swapped: list[Swapped] = []  # sequences that are out

    @property
    def num_rows(self) -> int:
        """L * Hkv: rows of a sequence, pages of a column."""
        return self.num_layers * self.num_kv_heads

    # Admission: a promise is a count; pages are taken later.

    def can_admit(
        self, pages: int, *, most: int | None = None, slots: int = 1, columns: Columns = NO_COLUMNS
    ) -> bool:
        """So many slots are free, and every promise could be kept beside `pages`, which include `columns`.

        most: pages it may `grow` to; none = as many. Several slots must be secured together: see `Promises`.
        """
        most = most or pages
        return (
            int((~self._is_live).sum()) >= slots
            and self.promises.fits(pages, columns)
            and (self.promises.can_secure(most, columns) or (slots == 1 and self.promises.can_cover(most)))
        )

    def admit(self, pages: int, *, most: int | None = None, columns: Columns = NO_COLUMNS) -> int:
        """Promise so many pages to a new sequence, and give it a slot with zeroed state.

        `columns` are its first blocks, borrowed and pinned: a part of what it is promised.
        """
        assert self.can_admit(pages, most=most, columns=columns), (
            f"{pages} pages promised on top of {self.promises.total} of {self.pool.num_pages}, "
            f"{self._is_live.sum()} of {self.num_slots} slots taken"
        )
        slot = int(self._is_live.argmin())
        self._is_live[slot] = True
        self.promises.make(slot, pages, most or pages, columns)
        self.states.zero_slot(slot)
        if columns.size:
            self.borrow(slot, columns)
        return slot

    def promise(self, slot: int, pages: int) -> None:
        """Lower what was promised, once a prompt is computed: others may be admitted on the difference.

        With a host tier it keeps what it holds and a page for every row, until it grows.
        """
        assert self._is_live[slot]
        now = None if self.host is None else self._pages_held(slot) + self.num_rows
        self.promises.lower(slot, pages, now)

    def grow(self, slot: int) -> bool:
        """Promise the pages that the next token of a decoding sequence takes, if others leave them to it."""
        return self.promises.grow(slot, self._next_places(np.array([slot]))[0].size)

    def secure(self, slot: int) -> None:
        """From now on this sequence is not swapped out, if the pool has room for its most."""
        self.promises.secure(slot)

    def can_swap_out(self, slot: int) -> bool:
        return self.promises.is_covered(slot)

    def release(self, slot: int) -> None:
        """The sequence is over: pages, promise and slot go back."""
        assert self._is_live[slot], f"slot {slot} is not taken"
        self.pool.release(self.table.host[slot].ravel())
        self.table.host[slot] = -1
        self.table.touch(slot)
        self.held.host[slot] = 0
        self.held.touch(slot)
        self.prefix.touch(self.promises.columns(slot))
        self.promises.end(slot)
        self.computed[slot] = self._reserved[slot] = 0
        self._origins[slot] = None
        self._is_live[slot] = False

    # The host tier: a sequence leaves with all it holds, and comes back as if it had never left.

    def swap_out(self, slot: int) -> Swapped:
        """Copy what it holds to the host, bit for bit. Its pages and its slot are free then."""
        assert self.host is not None and self.can_swap_out(slot), f"slot {slot} is free or secured"
        slot_state = self.states.save_slot(slot)
        pages = self.table.host[slot].copy()
        present = pages >= 0
        pages[present] = self.host.save(pages[present])
        columns, promises = self.promises.columns(slot), self.promises
        most = promises.most_of(slot)
        swapped = Swapped(
            pages=pages,
            held=self.held.host[slot].copy(),
            computed=int(self.computed[slot]),
            reserved=int(self._reserved[slot]),
            origins=self._origins[slot],
            slot_state=slot_state,
            keys=self.prefix.keys(columns),
            tokens=self.prefix.tokens(columns),
            promised=min(most, max(promises.of(slot), self._pages_held(slot) + self.num_rows)),
            most=most,
        )
        promises.swap_out(slot)
        self.release(slot)
        self._swapped.append(swapped)
        return swapped

    def can_swap_in(self, swapped: Swapped) -> bool:
        """A slot is free, and what it needs to go on could be promised."""
        chain = self.prefix.find(swapped.keys, swapped.tokens)
        return not self._is_live.all() and self.promises.fits(swapped.promised, chain)

    def swap_in(self, swapped: Swapped) -> int:
        """Give it a slot and pages again. Columns that are still there are borrowed, all else is copied."""
        assert self.host is not None and self.can_swap_in(swapped)
        chain = self.prefix.find(swapped.keys, swapped.tokens)
        slot = int(self._is_live.argmin())
        self.promises.swap_in(swapped.most)
        self.promises.make(slot, swapped.promised, swapped.most, chain)
        self.promises.borrow(slot, chain)  # pinned before pages are taken: those could be its own
        host = swapped.pages[:, :, chain.size :]
        present = host >= 0
        own = self.pool.allocate(int(present.sum()))
        try:
            self.host.load(host[present], own)
        except Exception:
            self.pool.release(own)
            self.promises.end(slot)
            self.promises.swap_in(-swapped.most)
            raise
        self.promises.take(slot, own.size)
        table = self.table.host[slot]
        table[:, :, chain.size :][present] = own
        table[:, :, : chain.size] = self._pages_of(chain)
        self.pool.retain(table[:, :, : chain.size].ravel())
        self.table.touch(slot)
        self.held.host[slot] = swapped.held
        self.held.touch(slot)
        self.computed[slot], self._reserved[slot] = swapped.computed, swapped.reserved
        self._origins[slot] = swapped.origins
        self.states.load_slot(slot, swapped.slot_state)
        self._is_live[slot] = True
        self.prefix.touch(chain)
        self._leave_host(swapped)
        return slot

    def forget(self, swapped: Swapped) -> None:
        """A sequence that is out has ended."""
        self.promises.swap_in(swapped.most)
        self._leave_host(swapped)

    def known(self, keys: Sequence[bytes], tokens: NDArray[np.int32]) -> int:
        """How many of these blocks, from the first one on, are in the prefix cache or on the host."""
        known = self.prefix.find(keys, tokens).size
        if self.host_columns is not None:
            known += self.host_columns.count(keys[known:], tokens[known * PAGE_SIZE :])
        return known

    def restore(self, keys: Sequence[bytes], tokens: NDArray[np.int32]) -> Columns:
        """The columns of these blocks, from the first one on; those on the host are copied back first."""
        if self.host_columns is not None:
            self.host_columns.restore(keys, tokens)
        return self.prefix.find(keys, tokens)

    def _leave_host(self, swapped: Swapped) -> None:
        assert self.host is not None
        self.host.release(swapped.pages[swapped.pages >= 0])
        self._swapped.remove(swapped)

    # Sharing: an equal beginning is computed once, and read by all.

    def borrow(self, slot: int, chain: Columns, *, left: NDArray[np.bool_] | None = None) -> None:
        """Before a prompt's first chunk: its first blocks are these columns, computed by another.

        The sequence pins them: it counts on them until it ends or is compacted. One whose pages leave as it
        goes says which of these have left, bool [L, Hkv, n]; what it borrows is a part of what it may hold.
        May be called again with a longer chain, as long as nothing was computed.
        """
        assert self._is_live[slot] and self._origins[slot] is None
        had = int(self._reserved[slot])
        assert had * PAGE_SIZE == self.computed[slot], f"slot {slot} has computed tokens of its own"
        self.prefix.touch(chain)
        pages = self._pages_of(chain)
        if left is not None:
            pages = np.where(left, np.int32(-1), pages)
        before = self.table.host[slot, :, :, : chain.size].copy()
        self.pool.retain(pages[pages != before])
        self.pool.release(before[pages != before])
        self.table.host[slot, :, :, : chain.size] = pages
        self.table.touch(slot)
        self._reserved[slot] = chain.size
        self.computed[slot] = chain.size * PAGE_SIZE
        self.held.host[slot] = (pages >= 0).sum(-1) * PAGE_SIZE
        self.held.touch(slot)
        if left is None:
            pinned = self.promises.columns(slot).size  # fewer than it had, if some were swapped in as its own
            self.promises.give_back(slot, int((before[:, :, pinned:] >= 0).sum()))
            self.promises.borrow(slot, chain[pinned:])
        else:
            self.promises.give_back(slot, int((before >= 0).sum()))
            self.promises.take(slot, int((pages >= 0).sum()))

    def publish(self, slot: int, keys: Sequence[bytes], tokens: NDArray[np.int32], *, pin: bool) -> None:
        """Let others borrow the first blocks of this sequence. keys of the blocks, tokens of at least them.

        Blocks that another published meanwhile are swapped for its pages, if the sequence pins. Ends where
        a block has lost a page.
        """
        assert self._is_live[slot] and self._origins[slot] is None
        assert len(keys) * PAGE_SIZE <= self.computed[slot], f"slot {slot}: blocks that are not computed"
        chain = self.prefix.find(keys, tokens)
        mine = self.promises.columns(slot)
        if pin:
            assert np.array_equal(chain[: mine.size], mine), f"slot {slot}: a pinned column left"
            self._swap(slot, chain[mine.size :], first=mine.size)
        count = len(keys) - chain.size
        pages = self.table.host[slot, :, :, chain.size : len(keys)].reshape(self.num_rows, count).T
        complete = (pages >= 0).all(1) & ~self.prefix.holds[pages].any(1)
        count = int(complete.argmin()) if not complete.all() else count
        if count:
            last = chain.size + count
            added = self.prefix.add(
                int(chain[-1]) if chain.size else NO_PARENT,
                keys[chain.size : last],
                tokens[chain.size * PAGE_SIZE : last * PAGE_SIZE],
                pages[:count],
            )
            if pin:
                self.promises.publish(slot, added)
            chain = np.concatenate((chain, added))
        self.prefix.touch(chain)

    def fork(self, slot: int, forks: Sequence[int], *, pin: bool) -> None:
        """Several answers to one prompt: each of the empty slots `forks` gets all that this slot holds.

        Full pages are shared; of the last page of a row, which will be written, every fork gets a copy.
        pin: nobody will drop a full page, so that they count once for all.
        """
        assert self._is_live[slot] and all(self._is_live[fork] for fork in forks)
        if self._origins[slot] is None:
            self.pack(slot)
        pages, held = self.table.host[slot], self.held.host[slot]
        place = np.arange(pages.shape[-1])
        full = np.where(place < (held // PAGE_SIZE)[..., None], pages, -1)
        partial = np.where(
            (place == (held // PAGE_SIZE)[..., None]) & (held % PAGE_SIZE > 0)[..., None], pages, -1
        )
        layer, head, last = np.nonzero(partial >= 0)
        if pin:
            columns = self.promises.columns(slot).size * self.num_rows
            self.promises.fork(slot, forks, int((full >= 0).sum()) - columns)
        for fork in forks:
            assert self.computed[fork] == 0 and self._reserved[fork] == 0, f"slot {fork} is in use"
            self.promises.take(fork, layer.size + (0 if pin else int((full >= 0).sum())))
            self.table.host[fork] = full
            copies = self.pool.allocate(layer.size)
            self.table.host[fork, layer, head, last] = copies
            copy_pages(self.pool, partial[layer, head, last], copies)
            self.pool.retain(full.ravel())
            self.table.touch(fork)
            self.held.host[fork] = held
            self.held.touch(fork)
            self.computed[fork], self._reserved[fork] = self.computed[slot], self._reserved[slot]
            self._origins[fork] = self._origins[slot]
            self.states.copy_slot(slot, fork)

    def _swap(self, slot: int, columns: Columns, *, first: int) -> None:
        """The blocks from `first` on were computed twice: read what the other published."""
        if not columns.size:
            return
        pages = self._pages_of(columns)
        own = self.table.host[slot, :, :, first : first + columns.size]
        self.pool.retain(pages.ravel())
        self.pool.release(own.ravel())
        own[:] = pages
        self.table.touch(slot)
        self.promises.publish(slot, columns)

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
        device, scales = self.table.device.device, self.pool.k_scales
        ids = torch.from_numpy(pages[head, place]).long().to(device)
        keys = self.pool.k.index_select(0, ids)
        if scales is not None:
            keys = dequantise(keys, scales.index_select(0, ids), self.dtype)
        self.states.rebuild(ids, keys, torch.from_numpy(held).to(device))

    # What is held.

    def usage(self) -> PageUsage:
        """Where the pages are now."""
        readers = self.pool.references - self.prefix.holds
        private, borrowed = int((readers == 1).sum()), int((readers > 1).sum())
        return PageUsage(
            free=self.pool.num_free,
            private=private,
            borrowed=borrowed,
            cached=int(((readers == 0) & self.prefix.holds).sum()),
            held_bytes=(private + borrowed) * self.pool.page_bytes,
        )

    @property
    def pages_on_host(self) -> int:
        """Pages of the host tier that something is in."""
        return 0 if self.host is None else self.host.num_pages - self.host.num_free

    @property
    def columns_restored(self) -> int:
        """That came back from the host since the start."""
        return 0 if self.host_columns is None else self.host_columns.restored

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
        """Every page is free, or referred to by the rows and the column that hold it; promises hold."""
        self.pool.check()
        self.prefix.check()
        entries = self.table.host[self.table.host >= 0]
        found = np.bincount(entries, minlength=self.pool.num_pages) + self.prefix.holds
        for page in np.flatnonzero(found != self.pool.references):
            raise AssertionError(
                f"page {page}: {self.pool.references[page]} references, {found[page]} in tables and columns"
            )
        usage = self.usage()
        counted = usage.free + usage.private + usage.borrowed + usage.cached
        assert counted == self.pool.num_pages, f"{usage} of {self.pool.num_pages} pages"
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
        if self.host is not None:
            owned = [swapped.pages[swapped.pages >= 0] for swapped in self._swapped]
            if self.host_columns is not None:
                self.host_columns.check()
                owned.append(self.host_columns.owned)
            self.host.check(np.concatenate(owned) if owned else np.empty(0, dtype=np.int32))
            uncovered = [swapped for swapped in self._swapped if swapped.num_pages > swapped.most]
            assert not uncovered, f"{len(uncovered)} sequences hold more on the host than is covered"

    def _holes(self, slot: int) -> NDArray[np.bool_]:
        """[L, Hkv]: rows of an unpacked slot that lost pages."""
        holes: NDArray[np.bool_] = self.held.host[slot] != self.computed[slot]
        return holes

    def _pages_of(self, columns: Columns) -> NDArray[np.int32]:
        """Page ids of these columns, as rows of the table have them: [L, Hkv, n]."""
        pages = self.prefix.pages(columns)
        return pages.T.reshape(self.num_layers, self.num_kv_heads, columns.size)

    def _pages_held(self, slot: int) -> int:
        return int((self.table.host[slot] >= 0).sum())
