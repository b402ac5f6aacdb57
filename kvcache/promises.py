"""Promises: how many pages every live sequence may come to hold, so that none is ever refused one.

    own       pages that this sequence alone counts on; at most what it was promised
    columns   pages of the prefix cache that it pinned; counted once, however many pinned them
    family    full pages that a sequence shares with its forks; counted once

promised pages of all + pages of pinned columns + pages of families <= pages of the pool.
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

    def __init__(self, num_pages: int, num_slots: int, prefix: PrefixCache) -> None:
        self._num_pages = num_pages
        self._prefix = prefix
        self._family_pages = 0
        self._promised = np.zeros(num_slots, dtype=np.int64)  # own pages
        self._own = np.zeros(num_slots, dtype=np.int64)
        self._columns: list[Columns] = [NO_COLUMNS] * num_slots
        self._families: list[Family | None] = [None] * num_slots

    @property
    def total(self) -> int:
        """Pages that are spoken for."""
        return int(self._promised.sum()) + self._prefix.pinned_pages + self._family_pages

    def fits(self, pages: int, columns: Columns = NO_COLUMNS) -> bool:
        """Could so many be promised, of which these columns are a part?"""
        own = pages - columns.size * self._prefix.pages_per_column
        return self.total + own + self._prefix.unpinned_pages(columns) <= self._num_pages

    def of(self, slot: int) -> int:
        """What the sequence may hold in all."""
        return int(self._promised[slot]) + self._shared(slot)

    def columns(self, slot: int) -> Columns:
        """The columns this sequence pinned, from the first block on."""
        return self._columns[slot]

    def make(self, slot: int, pages: int) -> None:
        self._promised[slot] = pages

    def lower(self, slot: int, pages: int) -> None:
        """From now on the sequence holds at most so many, shared ones included."""
        own = pages - self._shared(slot)
        assert self._own[slot] <= own <= self._promised[slot], (
            f"slot {slot}: {own} pages promised, {self._promised[slot]} before, {self._own[slot]} held"
        )
        self._promised[slot] = own

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
        self._prefix.pin(columns)
        self._columns[slot] = np.concatenate((self._columns[slot], columns))

    def publish(self, slot: int, columns: Columns) -> None:
        """Pages that the sequence held as its own are columns now."""
        self._own[slot] -= columns.size * self._prefix.pages_per_column
        self.borrow(slot, columns)

    def fork(self, slot: int, forks: Slots, pages: int) -> None:
        """So many own pages are held by all of these from now on, and every column, too."""
        assert self._families[slot] is None, f"slot {slot} was forked before"
        self._own[slot] -= pages
        self._promised[slot] -= pages
        self._family_pages += pages
        family = Family(pages, 1 + len(forks))
        self._families[slot] = family
        for fork in forks:
            self._families[fork] = family
            self._columns[fork] = self._columns[slot]
            self._prefix.pin(self._columns[slot])

    def own_all(self, slot: int, held: int) -> None:
        """The sequence copied what it keeps: it counts on its own pages only, and holds so many."""
        assert self._families[slot] is None, f"slot {slot} has forks"
        self._prefix.unpin(self._columns[slot])
        self._columns[slot] = NO_COLUMNS
        self._own[slot] = held
        self.take(slot, 0)

    def end(self, slot: int) -> None:
        """Nothing is promised to this slot any more."""
        self._prefix.unpin(self._columns[slot])
        self._columns[slot] = NO_COLUMNS
        family, self._families[slot] = self._families[slot], None
        if family is not None:
            family.members -= 1
            if family.members == 0:
                self._family_pages -= family.pages
        self._promised[slot] = self._own[slot] = 0

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

    def _shared(self, slot: int) -> int:
        family = self._families[slot]
        columns = self._columns[slot].size * self._prefix.pages_per_column
        return columns + (family.pages if family is not None else 0)
