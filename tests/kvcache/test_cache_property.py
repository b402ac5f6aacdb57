"""Thousands of random operations: the cache holds what a plain model of it holds, and its books balance."""

import random
from dataclasses import dataclass

import pytest
import torch

from kvcache.cache import KVCache
from tests.kvcache.builders import decode, make_cache, prefill

LAYERS, HEADS, MAX_LENGTH = 2, 2, 440
WEIGHTS = dict(admit=2, prefill=5, drop=2, pack=2, drop_packed=2, compact=1, promise=1, decode=3, release=1)
Token = tuple[int, float]  # position, value


@dataclass
class Sequence:
    """The plain model of a sequence."""

    rows: list[list[Token]]  # of (layer, head), flattened
    computed: int = 0
    is_packed: bool = False  # compacted, or packed with holes closed
    is_compacted: bool = False


class Driver:
    """Does the same to a cache and to its plain model."""

    def __init__(self, seed: int, weights: dict[str, int] = WEIGHTS) -> None:
        self.weights = weights
        self.random = random.Random(seed)
        self.torch_random = torch.Generator().manual_seed(seed)
        self.cache: KVCache = make_cache(num_pages=70, num_slots=4, max_length=MAX_LENGTH)
        self.sequences: dict[int, Sequence] = {}
        self.values = 0  # every token ever written has a value of its own
        self.done: dict[str, int] = {}

    def step(self) -> None:
        (name,) = self.random.choices(list(self.weights), list(self.weights.values()))
        if getattr(self, name)():
            self.done[name] = self.done.get(name, 0) + 1
        self.cache.check()

    def new_values(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        self.values += count
        return torch.arange(self.values - count, self.values).view(shape).float()

    def pick(self, *, packed: bool | None = None) -> int | None:
        slots = [s for s, one in self.sequences.items() if packed is None or one.is_packed is packed]
        return self.random.choice(slots) if slots else None

    def admit(self) -> bool:
        pages = 4 * self.random.randint(1, 7)
        expected = (
            len(self.sequences) < 4
            and sum(map(self.promised, self.sequences)) + pages <= self.cache.pool.num_pages
        )
        assert self.cache.can_admit(pages) is expected
        if expected:
            self.sequences[self.cache.admit(pages)] = Sequence([[] for _ in range(LAYERS * HEADS)])
        return expected

    def promised(self, slot: int) -> int:
        return self.cache.promises.of(slot)

    def prefill(self) -> bool:
        slot = self.pick(packed=False)
        if slot is None:
            return False
        one = self.sequences[slot]
        length = self.random.choice([1, 7, 63, 64, 65, 100])
        blocks = -(-(one.computed + length) // 64)
        if one.computed + length > MAX_LENGTH or 4 * blocks > self.promised(slot):
            return False
        values = self.new_values(LAYERS, HEADS, length)
        k = values.unsqueeze(-1) + torch.tensor([0, 0.25, 0.5, 0.75])
        prefill(self.cache, slot, k, -k)
        for row, row_values in zip(one.rows, values.flatten(0, 1).tolist(), strict=True):
            row.extend(enumerate(row_values, one.computed))
        one.computed += length
        return True

    def drop(self) -> bool:
        slot = self.pick(packed=False)
        if slot is None or self.sequences[slot].computed < 64:
            return False
        self.drop_some(slot)
        return True

    def drop_packed(self) -> bool:
        """Pages leave while the sequence answers, appended ones among them."""
        slots = [slot for slot, one in self.sequences.items() if one.is_packed and not one.is_compacted]
        if not slots:
            return False
        self.drop_some(self.random.choice(slots))
        return True

    def drop_some(self, slot: int) -> None:
        one = self.sequences[slot]
        complete = one.computed // 64
        blocks = torch.rand(LAYERS, HEADS, complete, generator=self.torch_random) < 0.3
        self.cache.drop(slot, blocks)
        for row, gone in zip(one.rows, blocks.flatten(0, 1).tolist(), strict=True):
            row[:] = [t for t in row if t[0] // 64 >= complete or not gone[t[0] // 64]]

    def pack(self) -> bool:
        slot = self.pick(packed=False)
        if slot is None:
            return False
        one = self.sequences[slot]
        self.cache.pack(slot)
        one.is_packed = any(len(row) < one.computed for row in one.rows)
        return one.is_packed

    def compact(self) -> bool:
        slot = self.pick(packed=False)
        if slot is None:
            return False
        self.compact_some(slot)
        return True

    def compact_some(self, slot: int) -> None:
        one = self.sequences[slot]
        density = torch.tensor(self.random.choices([0, 0.05, 0.5, 1], k=4)).view(LAYERS, HEADS, 1)
        keep = torch.rand(LAYERS, HEADS, one.computed, generator=self.torch_random) < density
        self.cache.compact(slot, keep)
        for row, mask in zip(one.rows, keep.flatten(0, 1).tolist(), strict=True):
            row[:] = [t for t in row if mask[t[0]]]
        one.is_packed = one.is_compacted = True

    def promise(self) -> bool:
        slot = self.pick(packed=True)
        if slot is None:
            return False
        held = int((self.cache.table.host[slot] >= 0).sum())
        self.cache.promise(slot, self.random.randint(held, self.promised(slot)))
        return True

    def decode(self) -> bool:
        slots = []
        for slot, one in self.sequences.items():
            pages = sum(-(-(len(row) + 1) // 64) for row in one.rows)
            whole = one.is_packed or all(len(row) == one.computed for row in one.rows)
            fits = max(one.computed, *map(len, one.rows)) < MAX_LENGTH and pages <= self.promised(slot)
            if whole and fits and self.random.random() < 0.7:
                slots.append(slot)
        if not slots:
            return False
        self.random.shuffle(slots)
        for _ in range(self.random.choice([1, 3, 40])):
            values = self.new_values(LAYERS, len(slots), HEADS)
            k = values.unsqueeze(-1) + torch.tensor([0, 0.25, 0.5, 0.75])
            decode(self.cache, slots, k, -k)
            for b, slot in enumerate(slots):
                one = self.sequences[slot]
                for row, value in zip(one.rows, values[:, b].flatten().tolist(), strict=True):
                    row.append((one.computed, value))
                one.computed += 1
            full = [
                slot
                for slot in slots
                if self.sequences[slot].computed >= MAX_LENGTH
                or sum(-(-(len(row) + 1) // 64) for row in self.sequences[slot].rows) > self.promised(slot)
            ]
            if full:
                break
        return True

    def release(self) -> bool:
        slot = self.pick()
        if slot is None:
            return False
        self.cache.release(slot)
        del self.sequences[slot]
        return True

    def compare(self, slot: int) -> None:
        """Every row: the tokens, their order, their positions."""
        one = self.sequences[slot]
        assert self.cache.computed[slot] == one.computed
        for layer in range(LAYERS):
            view = self.cache.view(slot, layer, one.computed)
            keys, values = view.contiguous()
            rows = one.rows[layer * HEADS : (layer + 1) * HEADS]
            assert view.num_held.tolist() == [len(row) for row in rows]
            assert view.max_held == max(map(len, rows))
            for head, row in enumerate(rows):
                positions = [position for position, _ in row]
                padding = [-1] * (view.max_held - len(row))
                assert view.positions[head].tolist() == positions + padding
                places = list(range(len(row))) if one.is_packed else positions
                expected = torch.zeros(keys.shape[1], 4)
                if row:
                    held = torch.tensor([value for _, value in row]).unsqueeze(-1)
                    expected[places] = held + torch.tensor([0, 0.25, 0.5, 0.75])
                assert torch.equal(keys[head], expected) and torch.equal(values[head], -expected)


@pytest.mark.parametrize("seed", range(6))
def test_the_cache_agrees_with_a_plain_model(seed: int) -> None:
    driver = Driver(seed)
    for _ in range(600):
        driver.step()
        slot = driver.pick()
        if slot is not None:
            driver.compare(slot)
    assert driver.values < 2**22, "beyond, quarters are not exact in float32"
    assert len(driver.done) == 9 and min(driver.done.values()) >= 5, driver.done
    for slot in list(driver.sequences):
        driver.compare(slot)
        driver.cache.release(slot)
    driver.cache.check()
    assert driver.cache.usage().free == driver.cache.pool.num_pages
