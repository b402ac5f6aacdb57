"""PrefixCache: columns of prompts already computed, found by a chain of hashes. Refers to their pages.

    column   one block of 64 tokens over all layers and heads: R = L * Hkv pages
    chain    key(block) = SHA-256(key(block before), tokens); the first one's seed says how KV was made
    pin      a live sequence counts on the column: it cannot leave

A column that nobody pins stays until its pages are wanted: least recently used first, tails before heads.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE
from kvcache.pool import PagePool

Columns = NDArray[np.int64]  # ids, in the order of their blocks
NO_COLUMNS: Columns = np.empty(0, dtype=np.int64)
NO_PARENT = -1


def chain_keys(seed: bytes, tokens: NDArray[np.int32]) -> list[bytes]:
    """The key of every whole block of these tokens, each a hash over all tokens up to its end."""
    keys, key = [], seed
    for first in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        key = hashlib.sha256(key + tokens[first : first + PAGE_SIZE].tobytes()).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """Arrays over columns. `pages_per_column` is R."""

    def __init__(self, pool: PagePool, pages_per_column: int) -> None:
        capacity = pool.num_pages // pages_per_column
        self._pool = pool
        self._by_key: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * capacity
        self._free = list(reversed(range(capacity)))
        self._pages = np.full((capacity, pages_per_column), -1, dtype=np.int32)
        self._tokens = np.zeros((capacity, PAGE_SIZE), dtype=np.int32)
        self._parent = np.full(capacity, NO_PARENT, dtype=np.int64)
        self._depth = np.zeros(capacity, dtype=np.int64)
        self._pins = np.zeros(capacity, dtype=np.int64)
        self._last_used = np.zeros(capacity, dtype=np.int64)
        self._clock = 0
        self.holds = np.zeros(pool.num_pages, dtype=bool)  # [num_pages]: is the page of a column?
        self.leaving: Callable[[Columns], None] = lambda columns: (
            None
        )  # told before their pages are given back

    @property
    def capacity(self) -> int:
        """Columns that the pool could hold."""
        return len(self._keys)

    @property
    def num_columns(self) -> int:
        return len(self._by_key)

    @property
    def pages_per_column(self) -> int:
        return self._pages.shape[1]

    @property
    def pinned_pages(self) -> int:
        """Pages of the columns that live sequences count on, each once."""
        return int((self._pins > 0).sum()) * self.pages_per_column

    def pages_to_spare(self, staying: Columns) -> int:
        """Pages that would be free if every column left that can, but for these."""
        known, frees = self._unpinned()
        return int(frees[~np.isin(known, staying)].sum())

    def unpinned_pages(self, columns: Columns) -> int:
        """How many pages pinning these would add."""
        return int((self._pins[columns] == 0).sum()) * self.pages_per_column

    def find(self, keys: Sequence[bytes], tokens: NDArray[np.int32]) -> Columns:
        """The longest known chain of these blocks; tokens [at least len(keys) * PAGE_SIZE] are compared."""
        found: list[int] = []
        for block, key in enumerate(keys):
            column = self._by_key.get(key)
            if column is None:
                break
            if not np.array_equal(self._tokens[column], tokens[block * PAGE_SIZE : (block + 1) * PAGE_SIZE]):
                break  # two texts with one hash: as good as unknown
            found.append(column)
        return np.array(found, dtype=np.int64)

    def pages(self, columns: Columns) -> NDArray[np.int32]:
        """[n, R] page ids, in the order in which they were added."""
        pages: NDArray[np.int32] = self._pages[columns]
        return pages

    def keys(self, columns: Columns) -> list[bytes]:
        return [key for column in columns if (key := self._keys[column]) is not None]

    def tokens(self, columns: Columns) -> NDArray[np.int32]:
        """[n * PAGE_SIZE]."""
        tokens: NDArray[np.int32] = self._tokens[columns].ravel()
        return tokens

    def depth(self, columns: Columns) -> NDArray[np.int64]:
        """[n]: blocks before each."""
        depth: NDArray[np.int64] = self._depth[columns]
        return depth

    def add(
        self, parent: int, keys: Sequence[bytes], tokens: NDArray[np.int32], pages: NDArray[np.int32]
    ) -> Columns:
        """Make computed blocks known, behind the column `parent`. tokens [n * PAGE_SIZE], pages [n, R]."""
        assert (pages >= 0).all(), "a column has a page for every row"
        assert not self.holds[pages].any(), "a page is of one column at most"
        added = [self._free.pop() for _ in keys]
        for place, (column, key) in enumerate(zip(added, keys, strict=True)):
            assert key not in self._by_key, "these blocks are known"
            self._by_key[key] = column
            self._keys[column] = key
            self._parent[column] = parent if place == 0 else added[place - 1]
        columns = np.array(added, dtype=np.int64)
        self._pages[columns] = pages
        self._tokens[columns] = tokens.reshape(-1, PAGE_SIZE)
        first = 0 if parent == NO_PARENT else self._depth[parent] + 1
        self._depth[columns] = first + np.arange(len(keys))
        self._pool.retain(pages.ravel())
        self.holds[pages] = True
        return columns

    def touch(self, chain: Columns) -> None:
        """These blocks, a chain from the first block on, were of use just now."""
        self._clock += 1
        self._last_used[chain] = self._clock

    def pin(self, columns: Columns) -> None:
        self._pins[columns] += 1

    def unpin(self, columns: Columns) -> None:
        assert (self._pins[columns] > 0).all(), f"columns {columns[self._pins[columns] <= 0]} are not pinned"
        self._pins[columns] -= 1

    def make_room(self, count: int) -> None:
        """Let columns go until so many more pages are free, or no column is left that would free any."""
        known, frees = self._unpinned()
        known, frees = known[frees > 0], frees[frees > 0]
        order = np.lexsort((-self._depth[known], self._last_used[known]))
        enough = int(np.searchsorted(frees[order].cumsum(), count)) + 1
        columns = self._with_descendants(known[order[:enough]])
        self.leaving(columns)
        self._forget(columns)

    def clear(self) -> None:
        """Forget every column that nobody pins."""
        columns, _ = self._unpinned()
        self._forget(columns)

    def check(self) -> None:
        """Keys, parents and pages agree, and every column has its references."""
        known = np.array(sorted(self._by_key.values()), dtype=np.int64)
        named = [column for column, key in enumerate(self._keys) if key is not None]
        assert named == known.tolist() and all(self._by_key[self._keys[c] or b""] == c for c in named), (
            f"columns {known} by key, {named} have one"
        )
        assert len(self._free) + known.size == len(self._keys), f"{len(self._free)} column ids are free"
        pages = self._pages[known].ravel()
        assert (pages >= 0).all() and np.unique(pages).size == pages.size, "a page stands in two columns"
        assert np.array_equal(np.flatnonzero(self.holds), np.sort(pages)), "pages of columns are miscounted"
        assert (self._pool.references[pages] > 0).all(), "a column refers to a free page"
        parents = self._parent[known]
        rooted = parents == NO_PARENT
        assert np.isin(parents[~rooted], known).all(), "a column lost the one before it"
        assert (self._depth[known] == np.where(rooted, 0, self._depth[parents] + 1)).all()
        assert (self._last_used[known] <= np.where(rooted, self._clock, self._last_used[parents])).all()
        unknown = np.setdiff1d(np.arange(len(self._keys)), known)
        assert not self._pins[unknown].any(), "a column that left is pinned"

    def _unpinned(self) -> tuple[Columns, NDArray[np.int64]]:
        """Columns that can leave, and how many pages each would free: those that only it refers to."""
        known = np.array(list(self._by_key.values()), dtype=np.int64)
        known = known[self._pins[known] == 0]
        return known, (self._pool.references[self._pages[known]] == 1).sum(1)

    def _with_descendants(self, columns: Columns) -> Columns:
        """These and all that follow them: a block without the one before it cannot be found."""
        leaving = np.zeros(len(self._keys), dtype=bool)
        leaving[columns] = True
        known = np.array(list(self._by_key.values()), dtype=np.int64)
        for column in known[np.argsort(self._depth[known], kind="stable")]:
            if self._parent[column] != NO_PARENT:
                leaving[column] |= leaving[self._parent[column]]
        return np.flatnonzero(leaving)

    def _forget(self, columns: Columns) -> None:
        assert not self._pins[columns].any(), "a pinned column cannot leave"
        for column in columns:
            key = self._keys[column]
            assert key is not None
            del self._by_key[key]
            self._keys[column] = None
            self._free.append(int(column))
        pages = self._pages[columns].ravel()
        self.holds[pages] = False
        self._pool.release(pages)
        self._pages[columns] = -1
