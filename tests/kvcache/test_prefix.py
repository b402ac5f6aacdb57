"""The prefix cache: what is found is what was published, and what leaves is what was used least."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvcache.cache import KVCache
from kvcache.prefix import NO_COLUMNS, chain_keys
from tests.kvcache.builders import filled, make_cache, prefill, random_tokens

R = 4  # rows of the tiny model: pages of a column


def text(*blocks: int) -> NDArray[np.int32]:
    """Tokens of whole blocks, each of one token."""
    return np.repeat(np.array(blocks, dtype=np.int32), 64)


def keys(tokens: NDArray[np.int32], seed: bytes = b"seed") -> list[bytes]:
    return chain_keys(seed, tokens)


def found(cache: KVCache, tokens: NDArray[np.int32], seed: bytes = b"seed") -> int:
    return cache.prefix.find(keys(tokens, seed), tokens).size


def publish(cache: KVCache, tokens: NDArray[np.int32], *, alive: bool = False) -> int:
    """A sequence of these tokens computed and published; it ends, or stays alive."""
    slot, _, _ = filled(cache, tokens.size, pages=R * (tokens.size // 64))
    cache.publish(slot, keys(tokens), tokens, pin=True)
    if not alive:
        cache.release(slot)
    cache.check()
    return slot


def test_a_key_speaks_for_everything_before_it() -> None:
    first, second = keys(text(1, 2, 3)), keys(text(9, 2, 3))
    assert len(first) == 3 and not set(first) & set(second)
    assert keys(text(1, 2)) == first[:2] == keys(np.append(text(1, 2), np.int32(5)))
    assert not set(first) & set(keys(text(1, 2, 3), b"other seed"))
    assert chain_keys(b"", np.empty(0, dtype=np.int32)) == []


def test_the_longest_equal_beginning_is_found() -> None:
    cache = make_cache()
    publish(cache, text(1, 2, 3))
    assert found(cache, text(1, 2, 3, 4)) == 3
    assert found(cache, text(1, 2, 4)) == 2
    assert found(cache, text(2, 1)) == 0
    assert found(cache, text(1, 2, 3), b"other seed") == 0


def test_tokens_are_compared_not_only_their_hash() -> None:
    cache = make_cache()
    tokens = text(1, 2, 3)
    publish(cache, tokens)
    other = tokens.copy()
    other[70] = 8
    assert cache.prefix.find(keys(tokens), other).size == 1


def test_a_column_stays_until_pages_are_wanted_and_tails_leave_first() -> None:
    cache = make_cache(num_pages=R * 6)
    publish(cache, text(1, 2, 3))
    publish(cache, text(4, 5))
    assert cache.usage().cached == R * 5 and cache.can_admit(R * 6)
    slot = cache.admit(R * 3)
    cache.reserve(slot, 128)  # one column is free, one has to leave: the tail of the older text
    assert found(cache, text(1, 2, 3)) == 2 and found(cache, text(4, 5)) == 2
    cache.reserve(slot, 192)
    assert found(cache, text(1, 2, 3)) == 1 and found(cache, text(4, 5)) == 2
    cache.check()


def test_what_was_used_last_stays_longest() -> None:
    cache = make_cache(num_pages=R * 6)
    publish(cache, text(1, 2, 3))
    publish(cache, text(4, 5, 6))
    reader = cache.admit(R * 3, columns=cache.prefix.find(keys(text(1, 2)), text(1, 2)))
    cache.release(reader)
    slot = cache.admit(R * 4)
    cache.reserve(slot, 256)
    assert found(cache, text(4, 5, 6)) == 0
    assert found(cache, text(1, 2, 3)) == 2
    cache.check()


def test_pinned_columns_never_leave_and_are_promised_once() -> None:
    cache = make_cache(num_pages=R * 6, num_slots=4)
    tokens = text(1, 2, 3)
    owner = publish(cache, tokens, alive=True)
    chain = cache.prefix.find(keys(tokens), tokens)
    assert not cache.can_admit(R * 4) and cache.can_admit(R * 6, columns=chain)
    reader = cache.admit(R * 4, columns=chain)
    second = cache.admit(R * 5, columns=chain)
    assert not cache.can_admit(1)
    for slot, length in ((reader, 64), (second, 128)):
        prefill(cache, slot, *random_tokens(cache, length))
    cache.release(owner)
    cache.check()
    assert found(cache, tokens) == 3
    cache.release(reader)
    cache.release(second)
    assert cache.promises.total == 0 and cache.usage().cached == R * 3


def test_two_who_computed_the_same_end_with_one_copy() -> None:
    cache = make_cache(num_pages=R * 6)
    tokens = text(1, 2, 3)
    first, k, _ = filled(cache, 192, pages=R * 3)
    second, other, _ = filled(cache, 192, pages=R * 3)
    cache.publish(first, keys(tokens), tokens, pin=True)
    assert cache.usage().free == 0
    cache.publish(second, keys(tokens), tokens, pin=True)
    cache.check()
    assert cache.usage().free == R * 3
    for layer in range(2):
        assert np.array_equal(cache.view(second, layer, 192).contiguous()[0], k[layer])


def test_a_compacted_sequence_gives_its_columns_back() -> None:
    cache = make_cache(num_pages=R * 6)
    tokens = text(1, 2, 3)
    slot, k, _ = filled(cache, 192, pages=R * 4)
    cache.publish(slot, keys(tokens), tokens, pin=True)
    keep = np.zeros((2, 2, 192), dtype=bool)
    keep[..., ::4] = True

    cache.compact(slot, torch.from_numpy(keep))
    cache.check()
    assert cache.usage().private == R and cache.usage().cached == R * 3
    assert np.array_equal(cache.view(slot, 1, 192).contiguous()[0], k[1][:, ::4])
    cache.reserve(cache.admit(R * 5), 64 * 5)  # the columns leave, what was kept does not
    assert found(cache, tokens) == 0
    assert np.array_equal(cache.view(slot, 1, 192).contiguous()[0], k[1][:, ::4])
    cache.check()


def test_one_who_drops_pages_borrows_only_what_is_still_read() -> None:
    cache = make_cache(num_pages=R * 8)
    tokens = text(1, 2, 3)
    publish(cache, tokens)
    slot = cache.admit(R)
    left = np.zeros((2, 2, 3), dtype=bool)
    left[..., :2] = True
    cache.borrow(slot, cache.prefix.find(keys(tokens), tokens), left=left)
    cache.check()
    assert cache.usage().private == R and cache.usage().cached == R * 2
    assert cache.promises.total == R


def test_a_block_that_lost_a_page_ends_what_can_be_published() -> None:

    cache = make_cache(num_pages=R * 8)
    tokens = text(1, 2, 3)
    slot, _, _ = filled(cache, 192)
    drop = torch.zeros(2, 2, 3, dtype=torch.bool)
    drop[1, 0, 1] = True
    cache.drop(slot, drop)
    cache.publish(slot, keys(tokens), tokens, pin=False)
    cache.check()
    assert found(cache, tokens) == 1


def test_a_fork_copies_only_the_last_page() -> None:
    cache = make_cache(num_pages=R * 8)
    slot, k, v = filled(cache, 150, pages=R * 4)
    forks = [cache.admit(R * 2) for _ in range(2)]
    cache.fork(slot, forks, pin=True)
    cache.check()
    usage = cache.usage()
    assert usage.borrowed == R * 2 and usage.private == R * 3
    for one in (slot, *forks):
        assert np.array_equal(cache.view(one, 1, 150).contiguous()[0], k[1])
    cache.release(slot)
    cache.check()
    assert np.array_equal(cache.view(forks[0], 0, 150).contiguous()[1], v[0])
    for fork in forks:
        cache.release(fork)
    assert cache.usage().free == R * 8 and cache.promises.total == 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p._by_key.popitem(), "by key"),
        (lambda p: p.holds.__setitem__(p._pages[0, 0], False), "miscounted"),
        (lambda p: p._parent.__setitem__(1, 9), "lost the one before"),
        (lambda p: p._pins.__setitem__(5, 1), "pinned"),
    ],
)
def test_check_finds(break_it, message) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache()
    publish(cache, text(1, 2, 3))
    cache.prefix.check()
    break_it(cache.prefix)
    with pytest.raises(AssertionError, match=message):
        cache.prefix.check()


def test_nothing_known_is_nothing_found() -> None:
    cache = make_cache()
    assert np.array_equal(cache.prefix.find([], text()), NO_COLUMNS)
    cache.prefix.make_room(5)
    assert cache.prefix.num_columns == 0
