"""KVCache: how sequences come, share, give way and go. Owns the pool, the prefix cache and the host tier.

    admit, borrow           a slot, a promise of pages, the columns of an equal beginning
    publish                 computed blocks become columns that others may borrow
    fork                    one prompt, several answers
    promise, grow, secure   what it may come to hold, as it becomes known
    swap_out, swap_in       at any time, with a host tier
    release

What a sequence does in between, by itself, is what `Holdings` does. Everything here runs between forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.compaction import copy_pages
from kvcache.holdings import Holdings
from kvcache.host import HostArena, Swapped
from kvcache.host_columns import HostColumns
from kvcache.moves import TORCH_MOVES, Moves
from kvcache.pool import PagePool
from kvcache.prefix import NO_COLUMNS, NO_PARENT, Columns, PrefixCache
from kvcache.promises import Promises
from kvcache.state import StateRegistry


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


class KVCache(Holdings):
    """What all live sequences hold, in one pool of pages. Forwards need no more of it than `Holdings`."""

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
        # One more of each: the scratch page, and the slot of rows that are padding.
        states.allocate(size.num_pages + 1, size.num_slots + 1, device)
        pool = PagePool(
            size.num_pages, model.head_dim, dtype=page_dtype or dtype, device=device, states=states
        )
        rows = model.num_layers * model.num_kv_heads
        self.prefix = PrefixCache(pool, rows)  # columns that prompts may share
        pool.make_room = self.prefix.make_room
        self.host = HostArena(size.host_pages, pool) if size.host_pages else None
        self.host_columns = None
        if self.host is not None and size.host_columns:
            self.host_columns = HostColumns(self.host, size.host_columns, pool, self.prefix)
            self.prefix.leaving = self.host_columns.keep
        for_swaps = size.host_pages - size.host_columns * rows
        promises = Promises(size.num_pages, size.num_slots, self.prefix, for_swaps)
        super().__init__(
            model,
            size.num_slots,
            size.max_length,
            dtype=dtype,
            pool=pool,
            promises=promises,
            states=states,
            moves=moves,
        )
        self._swapped: list[Swapped] = []  # sequences that are out

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
            f"{self._is_live.sum()} of {self._is_live.size} slots taken"
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
        self.prefix.touch(self.promises.columns(slot))
        self._clear(slot)
        self.promises.end(slot)
        self._is_live[slot] = False

    # The host tier: a sequence leaves with all it holds, and comes back as if it had never left.

    def swap_out(self, slot: int) -> Swapped:
        """Copy what it holds to the host, bit for bit. Its pages and its slot are free then."""
        assert self.host is not None and self.can_swap_out(slot), f"slot {slot} is free or secured"
        slot_state = self.states.save_slot(slot)
        contents, columns = self._contents(slot), self.promises.columns(slot)
        pages, most = contents.pages, self.promises.most_of(slot)
        pages[pages >= 0] = self.host.save(pages[pages >= 0])
        swapped = Swapped(
            contents=contents,
            slot_state=slot_state,
            keys=self.prefix.keys(columns),
            tokens=self.prefix.tokens(columns),
            promised=min(most, max(self.promises.of(slot), self._pages_held(slot) + self.num_rows)),
            most=most,
        )
        self.promises.swap_out(slot)
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
        pages = swapped.contents.pages.copy()
        behind = pages[:, :, chain.size :]
        present = behind >= 0
        own = self.pool.allocate(int(present.sum()))
        try:
            self.host.load(behind[present], own)
        except Exception:
            self.pool.release(own)
            self.promises.end(slot)
            self.promises.swap_in(-swapped.most)
            raise
        self.promises.take(slot, own.size)
        behind[present] = own
        pages[:, :, : chain.size] = self._pages_of(chain)
        self.pool.retain(pages[:, :, : chain.size].ravel())
        self._fill(slot, replace(swapped.contents, pages=pages))
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
        self.host.release(swapped.pages)
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
        before = self._begin_with(slot, pages)
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
            meanwhile = chain[mine.size :]
            self._exchange(slot, mine.size, self._pages_of(meanwhile))
            self.promises.publish(slot, meanwhile)
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
        self.pack(slot)
        contents = self._contents(slot)
        pages, num_full = contents.pages, (contents.held // PAGE_SIZE)[..., None]
        place = np.arange(pages.shape[-1])
        full = np.where(place < num_full, pages, np.int32(-1))
        is_last = (place == num_full) & (contents.held % PAGE_SIZE > 0)[..., None]  # and not full
        num_shared, num_copied = int((full >= 0).sum()), int(is_last.sum())
        if pin:
            columns = self.promises.columns(slot).size * self.num_rows
            self.promises.fork(slot, forks, num_shared - columns)
        for fork in forks:
            assert self.computed[fork] == 0 and self._reserved[fork] == 0, f"slot {fork} is in use"
            self.promises.take(fork, num_copied + (0 if pin else num_shared))
            own = full.copy()
            own[is_last] = self.pool.allocate(num_copied)
            copy_pages(self.pool, pages[is_last], own[is_last])
            self.pool.retain(full.ravel())
            self._fill(fork, replace(contents, pages=own))
            self.states.copy_slot(slot, fork)

    def clear_prefixes(self) -> None:
        """Forget every column that no live sequence counts on, and all on the host."""
        self.prefix.clear()
        if self.host_columns is not None:
            self.host_columns.clear()

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
        super().check()
        if self.host is not None:
            owned = [swapped.pages for swapped in self._swapped]
            if self.host_columns is not None:
                self.host_columns.check()
                owned.append(self.host_columns.owned)
            self.host.check(np.concatenate(owned) if owned else np.empty(0, dtype=np.int32))
            uncovered = [swapped for swapped in self._swapped if swapped.pages.size > swapped.most]
            assert not uncovered, f"{len(uncovered)} sequences hold more on the host than is covered"

    def _pages_of(self, columns: Columns) -> NDArray[np.int32]:
        """Page ids of these columns, as rows of the table have them: [L, Hkv, n]."""
        pages = self.prefix.pages(columns)
        return pages.T.reshape(self.num_layers, self.num_kv_heads, columns.size)
