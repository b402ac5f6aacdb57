"""Random sharing: sequences with equal beginnings borrow, publish, fork, drop and compact in a small pool."""

import numpy as np
import pytest

from kvcache.prefix import chain_keys
from tests.kvcache.builders import make_cache
from tests.kvcache.test_cache_property import HEADS, LAYERS, MAX_LENGTH, Driver, Sequence, Token

ROWS = LAYERS * HEADS
WEIGHTS = dict(
    admit=4, prefill=8, publish=6, drop=5, pack=3, compact=3, promise=2, decode=2, fork=3, release=3
)
Block = list[list[Token]]  # [ROWS][64]


class SharingDriver(Driver):
    """Most sequences pin what they borrow and publish, and never drop; the others never pin, and may."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, WEIGHTS)
        self.cache = make_cache(num_pages=120, num_slots=6, max_length=MAX_LENGTH)
        self.texts: dict[int, np.ndarray] = {}  # by slot
        self.pins: dict[int, bool] = {}
        self.written: dict[bytes, Block] = {}  # what each published block holds, by key
        self.hits = 0

    def keys(self, slot: int) -> list[bytes]:
        return chain_keys(b"seed", self.texts[slot])

    def new_text(self) -> np.ndarray:
        """One of few beginnings, one of few endings: prefixes are equal often, and of any length."""
        text = np.full(MAX_LENGTH, self.random.choice([0, 0, 0, 1]), dtype=np.int32)
        turn = 64 * self.random.randint(2, 6) + self.random.choice([0, 5])
        text[turn:] = self.random.randint(2, 4)
        return text

    def admit(self) -> bool:
        text, pin = self.new_text(), self.random.random() < 0.7
        keys = chain_keys(b"seed", text)
        chain = self.find(keys, text)[: self.random.randint(1, 6)]
        pages = ROWS * self.random.randint(chain.size + 1, 8)
        most, pinned = pages + self.more(), chain if pin else chain[:0]
        if not self.cache.can_admit(pages, most=most, columns=pinned):
            return False
        slot = self.cache.admit(pages, most=most, columns=pinned)
        self.texts[slot], self.pins[slot] = text, pin
        left = np.array([self.random.random() < 0.2 for _ in range(ROWS * chain.size)], dtype=bool)
        left = left.reshape(LAYERS, HEADS, chain.size)
        if not pin:  # in two steps, as a late hit is: pages may leave in between
            half = chain.size // 2
            self.cache.borrow(slot, chain[:half], left=np.zeros((LAYERS, HEADS, half), dtype=bool))
            self.cache.borrow(slot, chain, left=left)
        rows: list[list[Token]] = [[] for _ in range(ROWS)]
        for block, key in enumerate(keys[: chain.size]):
            for row, tokens, gone in zip(rows, self.written[key], left[..., block].flat, strict=True):
                row.extend(tokens if pin or not gone else [])
        self.sequences[slot] = Sequence(rows, computed=64 * chain.size)
        self.hits += chain.size
        return True

    def find(self, keys: list[bytes], text: np.ndarray) -> np.ndarray:
        return self.cache.prefix.find(keys, text)

    def more(self) -> int:
        """Pages that a new sequence may grow to beside what it is promised."""
        return 0

    def publish(self) -> bool:
        slot = self.pick(packed=False)
        if slot is None or slot not in self.texts:
            return False
        one, keys = self.sequences[slot], self.keys(slot)[: self.sequences[slot].computed // 64]
        known = self.cache.prefix.find(keys, self.texts[slot]).size
        self.cache.publish(slot, keys, self.texts[slot], pin=self.pins[slot])
        for number, key in enumerate(keys):
            span = slice(64 * number, 64 * number + 64)
            if number < known:
                if self.pins[slot]:  # what another published first is read from now on
                    for row, block in zip(one.rows, self.written[key], strict=True):
                        row[span] = block
            elif self.cache.prefix.find(keys[: number + 1], self.texts[slot]).size == number + 1:
                self.written[key] = [[t for t in row if t[0] // 64 == number] for row in one.rows]
                assert all(len(row) == 64 for row in self.written[key])
        return True

    def drop(self) -> bool:
        slot = self.pick(packed=False)
        if slot is None or self.pins[slot] or self.sequences[slot].computed < 64:
            return False
        self.drop_some(slot)
        return True

    def compact(self) -> bool:
        """Pages that a column holds are copied, so that a promise must cover both for a moment."""
        slot = self.pick(packed=False)
        if slot is None or self.cache.promises._families[slot] is not None:
            return False
        held = int((self.cache.table.host[slot] >= 0).sum())
        shared = self.cache.promises.columns(slot).size * ROWS
        if held - shared + held > self.promised(slot) - shared:
            return False
        self.compact_some(slot)
        self.texts.pop(slot, None)
        return True

    def decode(self) -> bool:
        before = {slot: one.computed for slot, one in self.sequences.items()}
        done = super().decode()
        for slot, computed in before.items():
            if self.sequences[slot].computed > computed:
                self.texts.pop(slot, None)  # what rows hold is no longer what the text says
        return done

    def release(self) -> bool:
        before = set(self.sequences)
        done = super().release()
        for slot in before - set(self.sequences):
            self.texts.pop(slot, None)
        return done

    def can_fork(self, slot: int, pages: int, count: int) -> bool:
        return self.cache.can_admit(pages, slots=count)

    def fork(self) -> bool:
        slot = self.pick()
        if slot is None or self.cache.promises._families[slot] is not None:
            return False
        one, pin = self.sequences[slot], self.pins[slot]
        partial = sum(len(row) % 64 > 0 for row in one.rows)
        own = partial + ROWS if pin else sum(-(-len(row) // 64) for row in one.rows) + ROWS
        count = self.random.randint(1, 2)
        if not self.can_fork(slot, count * own, count):
            return False
        forks = [self.cache.admit(own) for _ in range(count)]
        self.cache.fork(slot, forks, pin=pin)
        one.is_packed = one.is_packed or any(len(row) < one.computed for row in one.rows)
        for fork in forks:
            self.sequences[fork] = Sequence([list(row) for row in one.rows], one.computed, one.is_packed)
            self.pins[fork] = pin
            self.texts.pop(fork, None)
        self.texts.pop(slot, None)
        return True


@pytest.mark.parametrize("seed", range(5))
def test_sharing_changes_nobodys_contents(seed: int) -> None:
    driver = SharingDriver(seed)
    for _ in range(600):
        driver.step()
        slot = driver.pick()
        if slot is not None:
            driver.compare(slot)
    assert driver.values < 2**22, "beyond, quarters are not exact in float32"
    assert len(driver.done) == len(WEIGHTS), driver.done
    assert driver.hits > 10
    for slot in list(driver.sequences):
        driver.compare(slot)
        driver.cache.release(slot)
    driver.cache.check()
    usage = driver.cache.usage()
    assert usage.free + usage.cached == driver.cache.pool.num_pages and usage.cached > 0
    driver.cache.prefix.make_room(usage.cached)
    driver.cache.check()
    assert driver.cache.usage().free == driver.cache.pool.num_pages
