"""Promises: how many pages every live sequence may come to hold, so that none is ever refused one.

    own       pages that this sequence alone counts on; at most what it was promised
    columns   pages of the prefix cache that it pinned; counted once, however many pinned them
    family    full pages that a sequence shares with its forks; counted once

promised pages of all + pages of pinned columns + pages of families <= pages of the pool.

Without a host tier, the most that a sequence can need is promised at once. With one, it is promised a part,
and may `grow`; the most that it can need is kept for it in one of two places, and nobody else counts on that:

    secured   in the pool: all secured sequences could grow to their most together. They are never swapped out
    covered   on the host: wherever it is, all it holds can be swapped out, so that it gives way to any other

One that is alone in the pool can be secured there, so that somebody always goes on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcache.prefix import NO_COLUMNS, Columns, PrefixCache
from kvcache.table import Slots


@dataclass(slots=True, eq=False)
class Family:
    """Pages that several slots hold since one was forked."""

    pages: int
    members: int


class Promises:
    """Counts by slot. Pages themselves are taken and released elsewhere."""

    def __init__(self, num_pages: int, num_slots: int, prefix: PrefixCache, host_pages: int = 0) -> None:
        self._num_pages = num_pages
        self._host_pages = host_pages
        self._prefix = prefix
        self._family_pages = 0
        self._promised = np.zeros(num_slots, dtype=np.int64)  # own pages
        self._most = np.zeros(num_slots, dtype=np.int64)  # own pages it could be promised in the end
        self._own = np.zeros(num_slots, dtype=np.int64)
        self._is_covered = np.zeros(num_slots, dtype=bool)
        self._secured_pins = np.zeros(prefix.capacity, dtype=np.int64)  # of secured sequences, by column
        self._swapped_pages = 0  # covered, of sequences that are out
        self._columns: list[Columns] = [NO_COLUMNS] * num_slots
        self._families: list[Family | None] = [None] * num_slots

    @property
    def total(self) -> int:
        """Pages that are spoken for."""
        return int(self._promised.sum()) + self._prefix.pinned_pages + self._family_pages

    @property
    def secured(self) -> int:
        """Pages that secured sequences can need at most."""
        columns = int((self._secured_pins > 0).sum()) * self._prefix.pages_per_column
        return int(self._most[~self._is_covered].sum()) + columns + self._family_pages

    @property
    def covered(self) -> int:
        """Pages that the others can need at most, each for itself: kept for them on the host."""
        slots = np.flatnonzero(self._is_covered)
        return sum(self.most_of(int(slot)) for slot in slots) + self._swapped_pages

    def fits(self, pages: int, columns: Columns = NO_COLUMNS) -> bool:
        """Could so many be promised, of which these columns are a part?"""
        own = pages - columns.size * self._prefix.pages_per_column
        return self.total + own + self._prefix.unpinned_pages(columns) <= self._num_pages

    def can_secure(self, most: int, columns: Columns = NO_COLUMNS) -> bool:
        """Could secured sequences grow to their most beside one of so many pages, these columns included?"""
        unpinned = int((self._secured_pins[columns] == 0).sum()) - columns.size  # others are counted
        return self.secured + most + unpinned * self._prefix.pages_per_column <= self._num_pages

    def can_cover(self, most: int) -> bool:
        """Could one of so many pages give way at any time, and go on once it is alone?"""
        return most <= self._num_pages and self.covered + most <= self._host_pages

    def is_covered(self, slot: int) -> bool:
        """May it be swapped out?"""
        return bool(self._is_covered[slot])

    def of(self, slot: int) -> int:
        """What the sequence may hold in all."""
        return int(self._promised[slot]) + self._shared(slot)

    def most_of(self, slot: int) -> int:
        """What it could be promised in the end, in all."""
        return int(self._most[slot]) + self._shared(slot)

    def columns(self, slot: int) -> Columns:
        """The columns this sequence pinned, from the first block on."""
        return self._columns[slot]

    def make(self, slot: int, pages: int, most: int, columns: Columns = NO_COLUMNS) -> None:
        """Pages now and at most; these columns, part of them, are borrowed next. Secured, if that can be."""
        self._is_covered[slot] = not self.can_secure(most, columns)
        self._promised[slot], self._most[slot] = pages, most

    def lower(self, slot: int, pages: int, now: int | None = None) -> None:
        """From now on the sequence holds at most so many, shared ones included; so many until it grows."""
        own = pages - self._shared(slot)
        assert self._own[slot] <= own <= self._most[slot], (
            f"slot {slot}: {own} pages promised, {self._most[slot]} before, {self._own[slot]} held"
        )
        self._most[slot] = own
        soon = own if now is None else min(own, now - self._shared(slot))
        self._promised[slot] = min(self._promised[slot], soon)

    def grow(self, slot: int, count: int) -> bool:
        """Promise that it can take so many more than it holds, unless others leave too little for that."""
        wanted = int(self._own[slot] + count)
        extra = wanted - int(self._promised[slot])
        if extra <= 0:
            return True
        if self.total + extra > self._num_pages:
            return False
        assert wanted <= self._most[slot], f"slot {slot}: {wanted} pages wanted, at most {self._most[slot]}"
        self._promised[slot] = wanted
        return True

    def secure(self, slot: int) -> None:
        """From now on it is not swapped out, if that can be."""
        columns = self._columns[slot]
        if self._is_covered[slot] and self.can_secure(self.most_of(slot), columns):
            self._is_covered[slot] = False
            self._secured_pins[columns] += 1

    def take(self, slots: int | Slots, counts: int | NDArray[np.int64]) -> None:
        """So many pages are about to be taken."""
        self._own[slots] += counts
        assert (self._own[slots] <= self._promised[slots]).all(), (
            f"slots {slots}: pages held {self._own[slots]}, promised {self._promised[slots]}"
        )

    def give_back(self, slot: int, count: int) -> None:
        """So many own pages were released."""
        self._own[slot] -= count
        assert self._own[slot] >= 0

    def borrow(self, slot: int, columns: Columns) -> None:
        """Part of what was promised is there already, as columns."""
        self._promised[slot] -= columns.size * self._prefix.pages_per_column
        self._most[slot] -= columns.size * self._prefix.pages_per_column
        self._pin(slot, columns)

    def publish(self, slot: int, columns: Columns) -> None:
        """Pages that the sequence held as its own are columns now."""
        self._own[slot] -= columns.size * self._prefix.pages_per_column
        self.borrow(slot, columns)

    def fork(self, slot: int, forks: Slots, pages: int) -> None:
        """So many own pages are held by all of these from now on, and every column, too."""
        assert self._families[slot] is None, f"slot {slot} was forked before"
        assert not self._is_covered[[slot, *forks]].any(), f"slots {[slot, *forks]}: not all are secured"
        self._own[slot] -= pages
        self._promised[slot] -= pages
        self._most[slot] -= pages
        self._family_pages += pages
        family = Family(pages, 1 + len(forks))
        self._families[slot] = family
        for fork in forks:
            self._families[fork] = family
            self._pin(fork, self._columns[slot])

    def own_all(self, slot: int, held: int) -> None:
        """The sequence copied what it keeps: it counts on its own pages only, and holds so many."""
        assert self._families[slot] is None, f"slot {slot} has forks"
        self._unpin(slot)
        self._own[slot] = held
        self.take(slot, 0)

    def end(self, slot: int) -> None:
        """Nothing is promised to this slot any more."""
        self._unpin(slot)
        family, self._families[slot] = self._families[slot], None
        if family is not None:
            family.members -= 1
            if family.members == 0:
                self._family_pages -= family.pages
        self._promised[slot] = self._most[slot] = self._own[slot] = 0
        self._is_covered[slot] = False

    def swap_out(self, slot: int) -> None:
        """What it can need at most stays covered, when `end` has taken the rest."""
        assert self._is_covered[slot], f"slot {slot} is secured"
        self._swapped_pages += self.most_of(slot)

    def swap_in(self, most: int) -> None:
        """One of those that are out comes back, or is forgotten: so many are not covered there any more."""
        self._swapped_pages -= most

    def check(self, held: NDArray[np.int64]) -> None:
        """What slots hold is what is counted, and every promise can be kept. held [S] pages."""
        shared = np.array([self._shared(slot) for slot in range(len(held))])
        assert np.array_equal(held, self._own + shared), (
            f"pages held {held}, counted {self._own} own and {shared} shared"
        )
        assert (self._own <= self._promised).all(), f"pages held {self._own}, promised {self._promised}"
        families = {id(family): family for family in self._families if family is not None}
        members = [family.members for family in families.values()]
        assert sum(members) == sum(family is not None for family in self._families)
        assert sum(family.pages for family in families.values()) == self._family_pages
        assert self.total <= self._num_pages, f"{self.total} pages promised of {self._num_pages}"
        assert (self._promised <= self._most).all(), f"promised {self._promised}, at most {self._most}"
        assert self.secured <= self._num_pages, f"{self.secured} pages secured of {self._num_pages}"
        assert self.covered <= self._host_pages, f"{self.covered} pages covered of {self._host_pages}"
        pins = np.zeros_like(self._secured_pins)
        for slot in np.flatnonzero(~self._is_covered):
            pins[self._columns[slot]] += 1
        assert np.array_equal(pins, self._secured_pins), "columns of secured sequences are miscounted"

    def _pin(self, slot: int, columns: Columns) -> None:
        self._prefix.pin(columns)
        if not self._is_covered[slot]:
            self._secured_pins[columns] += 1
        self._columns[slot] = np.concatenate((self._columns[slot], columns))

    def _unpin(self, slot: int) -> None:
        columns, self._columns[slot] = self._columns[slot], NO_COLUMNS
        self._prefix.unpin(columns)
        if not self._is_covered[slot]:
            self._secured_pins[columns] -= 1

    def _shared(self, slot: int) -> int:
        family = self._families[slot]
        columns = self._columns[slot].size * self._prefix.pages_per_column
        return columns + (family.pages if family is not None else 0)
