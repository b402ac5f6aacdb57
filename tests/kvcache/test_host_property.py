"""Random swaps among random sharing: what comes back is what left, and the books of pool and host balance."""

from dataclasses import dataclass

import numpy as np
import pytest

from kvcache.host import Swapped
from tests.kvcache import test_sharing_property as sharing
from tests.kvcache.builders import make_cache
from tests.kvcache.test_cache_property import MAX_LENGTH, Sequence
from tests.kvcache.test_sharing_property import ROWS, SharingDriver

WEIGHTS = sharing.WEIGHTS | dict(
    admit=8,
    promise=1,
    decode=1,
    fork=1,
    release=3,
    grow=6,
    secure=3,
    swap_out=4,
    swap_in=4,
    forget=1,
    make_room=2,
)
GARBAGE = -1e6  # what is in pages that nobody has


@dataclass
class Out:
    """A sequence that is out, and its plain model."""

    swapped: Swapped
    sequence: Sequence
    text: np.ndarray | None
    pin: bool


class HostDriver(SharingDriver):
    """Most sequences are promised less than they may come to hold."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.weights = WEIGHTS
        self.cache = make_cache(
            num_pages=100, num_slots=8, max_length=MAX_LENGTH, host_pages=480, host_columns=20
        )
        self.out: list[Out] = []

    def spoil(self) -> None:
        free = np.flatnonzero(self.cache.pool.references == 0)
        self.cache.pool.k[free] = self.cache.pool.v[free] = GARBAGE

    def find(self, keys: list[bytes], text: np.ndarray) -> np.ndarray:
        """Those on the host, too."""
        self.spoil()
        return self.cache.restore(keys, text)

    def more(self) -> int:
        return ROWS * self.random.randint(0, 3)

    def grow(self) -> bool:
        slot = self.pick()
        if slot is None or self.cache.promises.most_of(slot) < self.held(slot) + ROWS:
            return False
        before = self.promised(slot)
        done = self.cache.grow(slot)
        assert done or self.cache.promises.total + ROWS > self.cache.pool.num_pages
        return self.promised(slot) > before

    def held(self, slot: int) -> int:
        return int((self.cache.table.host[slot] >= 0).sum())

    def secure(self) -> bool:
        slot = self.pick_covered()
        if slot is None:
            return False
        self.cache.secure(slot)
        return not self.cache.can_swap_out(slot)

    def pick_covered(self) -> int | None:
        slots = [slot for slot in self.sequences if self.cache.can_swap_out(slot)]
        return self.random.choice(slots) if slots else None

    def swap_out(self) -> bool:
        slot = self.pick_covered()
        if slot is None:
            return False
        text, pin = self.texts.pop(slot, None), self.pins[slot]
        self.out.append(Out(self.cache.swap_out(slot), self.sequences.pop(slot), text, pin))
        self.spoil()
        return True

    def swap_in(self) -> bool:
        if not self.out:
            return False
        one = self.random.choice(self.out)
        if not self.cache.can_swap_in(one.swapped):
            return False
        self.out.remove(one)
        slot = self.cache.swap_in(one.swapped)
        self.sequences[slot], self.pins[slot] = one.sequence, one.pin
        if one.text is not None:
            self.texts[slot] = one.text
        self.spoil()
        self.compare(slot)
        return True

    def make_room(self) -> bool:
        """Columns go to the host."""
        before = self.cache.prefix.num_columns
        self.cache.prefix.make_room(self.random.randint(1, 40))
        return self.cache.prefix.num_columns < before

    def forget(self) -> bool:
        if not self.out:
            return False
        self.cache.forget(self.out.pop(self.random.randrange(len(self.out))).swapped)
        return True

    def can_fork(self, slot: int, pages: int, count: int) -> bool:
        """All that share stay."""
        stays = not self.cache.can_swap_out(slot) and self.cache.promises.can_secure(pages)
        return stays and super().can_fork(slot, pages, count)


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_back_is_what_left(seed: int) -> None:
    driver = HostDriver(seed)
    for _ in range(700):
        driver.step()
    assert min(driver.done[name] for name in ("swap_out", "swap_in")) >= 5, driver.done
    assert driver.values < 2**22, "beyond, quarters are not exact in float32"
    while driver.out or driver.sequences:
        driver.swap_in()
        for slot in list(driver.sequences):
            driver.compare(slot)
            driver.cache.release(slot)
            del driver.sequences[slot]
        driver.cache.check()
    promises, host, columns = driver.cache.promises, driver.cache.host, driver.cache.host_columns
    assert host is not None and columns is not None and driver.cache.columns_restored > 0
    assert host.num_free == host.num_pages - columns.owned.size
    assert promises.total == promises.secured == promises.covered == 0
