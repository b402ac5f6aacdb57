"""The arena on the host: what goes there comes back bit for bit, and a fault there loses nothing."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvcache import host
from kvcache.cache import KVCache
from kvcache.host import ArenaFull
from kvcache.pool import pages_for
from kvcache.prefix import chain_keys
from kvcache.state import StateRegistry
from tests.kvcache.builders import decode, make_cache, prefill, random_tokens

ROWS = 4


def states_of_everything() -> StateRegistry:
    states = StateRegistry()
    states.page_state("sums", (3,), torch.float64)
    states.page_state("flags", (1,), torch.bool)
    states.slot_state("turn", (2,), torch.int64)
    return states


def covered(cache: KVCache, length: int) -> int:
    """A slot whose prompt is computed, and which may be swapped out: another has the pool for itself."""
    rest = cache.pool.num_pages - ROWS * pages_for(length)
    other = cache.admit(ROWS, most=rest + 1)
    slot = cache.admit(ROWS * pages_for(length))
    prefill(cache, slot, *random_tokens(cache, length))
    assert cache.can_swap_out(slot) and not cache.can_swap_out(other)
    return slot


def contents(cache: KVCache, slot: int) -> list[torch.Tensor]:
    pages = cache.table.host[slot]
    ids = torch.from_numpy(pages[pages >= 0]).long().to(cache.pool.k.device)
    return [tensor[ids].clone() for tensor in cache.pool.carried]


@pytest.mark.parametrize("piece_bytes", [1, 3000, 64 * 2**20])
def test_everything_that_pages_and_slots_carry_comes_back(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(host, "PIECE_BYTES", piece_bytes)
    cache = make_cache(states=states_of_everything(), host_pages=30)
    slot = covered(cache, 150)
    for state in cache.states.all_pages():
        state.copy_(torch.rand(state.shape) * 2)
    cache.states.of_slots("turn")[slot] = torch.tensor([7, 8])
    before = contents(cache, slot)
    taken = cache.host.save(np.array([5, 3], dtype=np.int32))  # type: ignore[union-attr]
    cache.host.release(taken[:1])  # type: ignore[union-attr]  # so that what follows lies in two runs
    swapped = cache.swap_out(slot)
    for tensor in cache.pool.carried:
        tensor.zero_()
    cache.states.of_slots("turn").zero_()
    other = cache.admit(1, most=12)  # in its slot now
    slot = cache.swap_in(swapped)
    assert other != slot
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache, slot), strict=True))
    assert cache.states.of_slots("turn")[slot].tolist() == [7, 8]
    assert cache.computed[slot] == 150 and cache.kept_tokens(slot) == 150
    cache.host.release(taken[1:])  # type: ignore[union-attr]
    cache.check()


@pytest.mark.gpu
def test_a_sequence_on_a_gpu_comes_back_from_pinned_memory() -> None:
    cache = make_cache(host_pages=30, device=torch.device("cuda"))
    rest = cache.pool.num_pages - ROWS * 3
    cache.admit(ROWS, most=rest + 1)
    slot = cache.admit(ROWS * 3)
    cache.reserve(slot, 150)
    for tensor in cache.pool.carried:
        tensor.copy_(torch.rand(tensor.shape))
    cache.advance(slot, 150)
    before = contents(cache, slot)
    swapped = cache.swap_out(slot)
    for tensor in cache.pool.carried:
        tensor.zero_()
    slot = cache.swap_in(swapped)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache, slot), strict=True))
    cache.check()


def test_what_does_not_fit_the_arena_stays_where_it_is() -> None:
    cache = make_cache(host_pages=20)
    slot = covered(cache, 150)
    before = contents(cache, slot)
    assert cache.host is not None
    taken = cache.host.save(np.arange(10, dtype=np.int32))
    with pytest.raises(ArenaFull, match="12 pages are to be saved, 10 of 20 are free"):
        cache.swap_out(slot)
    cache.host.release(taken)
    cache.check()
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache, slot), strict=True))


@pytest.mark.parametrize("direction", ["save", "load"])
def test_a_copy_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    cache = make_cache(host_pages=20)
    slot = covered(cache, 150)
    before = contents(cache, slot)
    assert cache.host is not None

    def broken(*_: object) -> None:
        raise RuntimeError("the device is lost")

    swapped = cache.swap_out(slot) if direction == "load" else None
    with monkeypatch.context() as patch:
        patch.setattr(cache.host, direction, broken)
        with pytest.raises(RuntimeError, match="lost"):
            cache.swap_in(swapped) if swapped else cache.swap_out(slot)
        cache.check()
    slot = cache.swap_in(swapped) if swapped else slot
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache, slot), strict=True))
    cache.check()


def test_a_sequence_grows_only_into_what_others_leave() -> None:
    cache = make_cache(num_pages=40, host_pages=40)
    first = cache.admit(ROWS * 2, most=ROWS * 8)
    second = cache.admit(ROWS * 7, most=ROWS * 8)
    assert cache.can_swap_out(second) and not cache.can_swap_out(first)
    prefill(cache, first, *random_tokens(cache, 128))
    assert cache.grow(first)
    decode(cache, [first], *(part.transpose(1, 2) for part in random_tokens(cache, 1)))
    cache.advance([first], 63)
    assert not cache.grow(first)  # 3 + 7 of 10 pages per row are promised
    swapped = cache.swap_out(second)
    assert cache.grow(first)
    cache.forget(swapped)
    cache.check()


def test_somebody_alone_can_always_be_secured() -> None:
    cache = make_cache(num_pages=40, host_pages=90)
    slots = [cache.admit(4, most=40) for _ in range(3)]
    assert [cache.can_swap_out(slot) for slot in slots] == [False, True, True]
    assert not cache.can_admit(4, most=11)  # 80 pages are covered
    cache.secure(slots[1])
    assert cache.can_swap_out(slots[1])
    cache.release(slots[0])
    cache.secure(slots[1])
    assert not cache.can_swap_out(slots[1])
    assert cache.can_admit(4, most=40) and not cache.can_admit(4, most=41)
    cache.check()


def published(cache: KVCache, seed: int, blocks: int) -> tuple[list[bytes], NDArray[np.int32]]:
    """A prompt that was computed and is over: its blocks are columns that nobody pins."""
    tokens = np.full(64 * blocks, seed, dtype=np.int32)
    keys = chain_keys(b"seed", tokens)
    slot = cache.admit(ROWS * blocks)
    prefill(cache, slot, *random_tokens(cache, 64 * blocks))
    cache.publish(slot, keys, tokens, pin=True)
    cache.release(slot)
    return keys, tokens


def make_them_leave(cache: KVCache) -> None:
    """Somebody takes every page, writes to it, and goes."""
    slot = cache.admit(cache.pool.num_pages)
    length = 64 * (cache.pool.num_pages // ROWS)
    prefill(cache, slot, *random_tokens(cache, length))
    cache.release(slot)


def of_columns(cache: KVCache, keys: list[bytes], tokens: NDArray[np.int32]) -> list[torch.Tensor]:
    pages = torch.from_numpy(cache.prefix.pages(cache.prefix.find(keys, tokens))).long()
    return [tensor[pages].clone() for tensor in cache.pool.carried]


def test_columns_that_left_come_back_with_what_they_held() -> None:
    cache = make_cache(num_pages=24, host_pages=40, host_columns=5, states=states_of_everything())
    keys, tokens = published(cache, 1, 4)
    for state in cache.states.all_pages():
        state.copy_(torch.rand(state.shape) * 2)
    before = of_columns(cache, keys, tokens)
    make_them_leave(cache)
    for tensor in cache.pool.carried:
        tensor.fill_(9)
    assert cache.prefix.find(keys, tokens).size == 0 and cache.known(keys, tokens) == 4
    assert cache.restore(keys, tokens).size == 4 and cache.columns_restored == 4
    after = of_columns(cache, keys, tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    cache.check()
    assert cache.restore(keys, tokens).size == 4 and cache.columns_restored == 4  # they are there


def test_columns_of_another_text_with_the_same_hash_are_unknown() -> None:
    cache = make_cache(num_pages=24, host_pages=40, host_columns=5)
    keys, tokens = published(cache, 1, 3)
    make_them_leave(cache)
    assert cache.known(keys, np.where(np.arange(192) == 100, 5, tokens)) == 1
    assert cache.known(keys, tokens) == 3


def test_tails_of_what_was_used_least_recently_leave_the_host_first() -> None:
    cache = make_cache(num_pages=24, host_pages=24, host_columns=6)
    first, second = published(cache, 1, 3), published(cache, 2, 3)
    make_them_leave(cache)
    slot = cache.admit(ROWS * 3, columns=cache.restore(*first))
    third = published(cache, 3, 2)
    cache.prefix.make_room(24)
    assert cache.host_columns is not None
    assert [cache.host_columns.count(*one) for one in (first, second, third)] == [3, 1, 2]
    cache.release(slot)
    cache.check()


def test_only_heads_are_kept_where_there_is_room_for_some() -> None:
    cache = make_cache(num_pages=24, host_pages=8, host_columns=2)
    long = published(cache, 1, 5)
    make_them_leave(cache)
    assert cache.known(*long) == 2
    cache.check()


def test_columns_come_back_only_where_nobody_counts_on_the_pages() -> None:
    cache = make_cache(num_pages=24, host_pages=40, host_columns=10)
    known = published(cache, 1, 5)
    make_them_leave(cache)
    slot = cache.admit(16)
    prefill(cache, slot, *random_tokens(cache, 256))
    assert cache.restore(*known).size == 2
    cache.check()
    cache.release(slot)
    assert cache.restore(*known).size == 5
    cache.check()


def test_columns_that_come_back_push_others_out_and_not_themselves() -> None:
    cache = make_cache(num_pages=24, host_pages=24, host_columns=6)
    first = published(cache, 1, 5)
    make_them_leave(cache)
    second = published(cache, 2, 6)
    assert cache.known(*first) == 5
    chain = cache.restore(*first)  # 5 columns of `second` leave the pool; the host has room for one more
    assert chain.size + cache.prefix.find(*second).size <= 6
    assert chain.size == cache.prefix.find(*first).size
    cache.check()


def test_a_column_that_cannot_be_copied_back_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(num_pages=24, host_pages=24, host_columns=6)
    known = published(cache, 1, 5)
    make_them_leave(cache)

    def broken(*_: object) -> None:
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(cache.host, "load", broken)
        with pytest.raises(RuntimeError, match="lost"):
            cache.restore(*known)
    cache.check()
    assert cache.usage().free == 24 and cache.restore(*known).size == 5


def test_who_came_back_without_its_columns_may_borrow_them_when_they_are_there_again() -> None:
    cache = make_cache(num_pages=40, host_pages=40)
    keys, tokens = published(cache, 1, 3)
    other = cache.admit(ROWS, most=40)
    slot = cache.admit(ROWS * 4, columns=cache.prefix.find(keys[:2], tokens))
    swapped = cache.swap_out(slot)
    cache.prefix.make_room(40)
    slot = cache.swap_in(swapped)
    assert cache.promises.columns(slot).size == 0 and cache.kept_tokens(slot) == 128
    cache.check()
    published(cache, 1, 3)
    cache.borrow(slot, cache.prefix.find(keys, tokens))
    assert cache.promises.columns(slot).size == 3
    cache.check()
    cache.release(slot)
    cache.release(other)
    cache.check()
