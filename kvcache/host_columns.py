"""HostColumns: columns that left the pool, kept in a part of the host's arena and found by the same keys.

A column goes there when the pool wants its pages, and stays when it is copied back: it may leave again for
nothing. Those used least recently make room for others, tails before heads.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE
from kvcache.host import HostArena
from kvcache.pool import PagePool
from kvcache.prefix import NO_PARENT, Columns, PrefixCache


class HostColumns:
    """Arrays over columns of R pages each, beside those of the prefix cache."""

    def __init__(self, arena: HostArena, capacity: int, pool: PagePool, prefix: PrefixCache) -> None:
        self._arena, self._pool, self._prefix = arena, pool, prefix
        self._by_key: dict[bytes, int] = {}
        self._free = list(reversed(range(capacity)))
        self._keys: list[bytes | None] = [None] * capacity
        self._pages = np.full((capacity, prefix.pages_per_column), -1, dtype=np.int32)
        self._tokens = np.zeros((capacity, PAGE_SIZE), dtype=np.int32)
        self._depth = np.zeros(capacity, dtype=np.int64)
        self._last_used = np.zeros(capacity, dtype=np.int64)
        self._clock = 0
        self.restored = 0  # columns that were copied back since the start

    @property
    def owned(self) -> NDArray[np.int32]:
        """The pages of the arena that columns are in."""
        pages: NDArray[np.int32] = self._pages[list(self._by_key.values())].ravel()
        return pages

    def count(self, keys: Sequence[bytes], tokens: NDArray[np.int32]) -> int:
        """How many of these blocks, from the first on, are here. tokens [len(keys) * PAGE_SIZE, or more]."""
        for block, key in enumerate(keys):
            column = self._by_key.get(key)
            span = tokens[block * PAGE_SIZE : (block + 1) * PAGE_SIZE]
            if column is None or not np.array_equal(self._tokens[column], span):
                return block
        return len(keys)

    def keep(self, leaving: Columns) -> None:
        """Columns are about to leave the pool. Where there is room for some only, it is for heads: no tail is
        found without them."""
        keys, depth = self._prefix.keys(leaving), self._prefix.depth(leaving)
        self.touch(keys)
        new = np.array([place for place, key in enumerate(keys) if key not in self._by_key], dtype=np.int64)
        new = new[np.argsort(depth[new], kind="stable")][: len(self._keys)]
        self._make_room(new.size)
        if not new.size:
            return
        saved = self._arena.save(self._prefix.pages(leaving[new]).ravel())
        columns = [self._free.pop() for _ in new]
        for column, place in zip(columns, new, strict=True):
            self._by_key[keys[place]] = column
            self._keys[column] = keys[place]
        self._pages[columns] = saved.reshape(len(columns), -1)
        self._tokens[columns] = self._prefix.tokens(leaving[new]).reshape(-1, PAGE_SIZE)
        self._depth[columns] = depth[new]
        self._last_used[columns] = self._clock

    def restore(self, keys: Sequence[bytes], tokens: NDArray[np.int32]) -> None:
        """Of these blocks, copy back those that follow what the pool has, as far as it has room."""
        prefix, pool = self._prefix, self._pool
        self.touch(keys)
        chain = prefix.find(keys, tokens)
        keys, tokens = keys[chain.size :], tokens[chain.size * PAGE_SIZE :]
        room = (pool.num_free + prefix.pages_to_spare(chain)) // prefix.pages_per_column
        wanted = min(self.count(keys, tokens), room)
        if not wanted:
            return
        prefix.pin(chain)  # room is made of others
        pages = pool.allocate(wanted * prefix.pages_per_column)
        prefix.unpin(chain)
        count = self.count(keys[:wanted], tokens)  # the others came here, where some may have made room
        columns = pages.reshape(wanted, -1)[:count]
        try:
            self._load(keys[:count], columns)
            parent = int(chain[-1]) if chain.size else NO_PARENT
            added = prefix.add(parent, keys[:count], tokens[: count * PAGE_SIZE], columns)
        finally:
            pool.release(pages)  # from here on the columns alone refer to them
        prefix.touch(np.concatenate((chain, added)))
        self.restored += count

    def touch(self, keys: Sequence[bytes]) -> None:
        """Those of these that are here were of use just now."""
        self._clock += 1
        self._last_used[[self._by_key[key] for key in keys if key in self._by_key]] = self._clock

    def clear(self) -> None:
        """Forget every column."""
        self._forget(np.array(list(self._by_key.values()), dtype=np.int64))

    def check(self) -> None:
        """Every column has its key and its pages."""
        named = [column for column, key in enumerate(self._keys) if key is not None]
        assert named == sorted(self._by_key.values()), f"columns {named} have a key, {self._by_key} by key"
        assert all(self._keys[column] == key for key, column in self._by_key.items())
        assert len(named) + len(self._free) == len(self._keys), f"{len(self._free)} column ids are free"
        assert ((self._pages >= 0).all(1) == np.isin(np.arange(len(self._keys)), named)).all()

    def _load(self, keys: Sequence[bytes], pages: NDArray[np.int32]) -> None:
        """Copy these columns to pages of the pool, [n, R]."""
        self._arena.load(self._pages[[self._by_key[key] for key in keys]].ravel(), pages.ravel())

    def _make_room(self, count: int) -> None:
        """For so many columns, which were not here."""
        known = np.array(list(self._by_key.values()), dtype=np.int64)
        order = np.lexsort((-self._depth[known], self._last_used[known]))
        self._forget(known[order[: max(0, count - len(self._free))]])

    def _forget(self, leaving: Columns) -> None:
        self._arena.release(self._pages[leaving].ravel())
        self._pages[leaving] = -1
        for column in leaving:
            key, self._keys[column] = self._keys[column], None
            assert key is not None
            del self._by_key[key]
            self._free.append(int(column))
