"""The cache: promises bind, what is dropped is memory for others, and the books always balance."""

import numpy as np
import pytest
import torch

from kvcache.cache import KVCache
from kvcache.decode import attend_rows
from kvcache.pool import OutOfPages
from kvcache.prefix import chain_keys
from tests.kvcache.builders import decode, filled, make_cache, make_model, prefill, random_tokens
from tests.reference import attention

ROWS = 4  # L * Hkv of the small cache


def share(cache: KVCache, owner: int, borrower: int, blocks: int, *, pin: bool = True) -> None:
    """Let another slot read the first blocks of this one, as a prefix hit does."""
    tokens = np.arange(blocks * 64, dtype=np.int32)
    keys = chain_keys(b"seed", tokens)
    cache.publish(owner, keys, tokens, pin=pin)
    chain = cache.prefix.find(keys, tokens)
    cache.borrow(borrower, chain, left=None if pin else np.zeros((2, 2, blocks), dtype=bool))


def attended(cache: KVCache, slots: list[int], q: torch.Tensor, layer: int) -> torch.Tensor:
    """What a step over these slots reads, one token being new."""
    rows = cache.decode_rows(slots)
    return attend_rows(
        q,
        cache.pool.k,
        cache.pool.v,
        rows.pages[layer],
        rows.held[layer],
        scale=0.5,
        max_held=rows.max_held,
    )


# Admission


def test_a_promise_binds_pages_before_they_are_taken() -> None:
    cache = make_cache(num_pages=10)
    slot = cache.admit(7)
    assert cache.usage().free == 10
    assert cache.can_admit(3) and not cache.can_admit(4)
    with pytest.raises(AssertionError, match="4 pages promised on top of 7 of 10"):
        cache.admit(4)
    cache.release(slot)
    assert cache.can_admit(10)
    cache.check()


def test_a_lowered_promise_admits_others() -> None:
    cache = make_cache(num_pages=16)
    slot, _, _ = filled(cache, 130, pages=16)
    assert not cache.can_admit(1)
    with pytest.raises(AssertionError, match="11 pages promised, 16 before, 12 held"):
        cache.promise(slot, 11)
    with pytest.raises(AssertionError, match="17 pages promised"):
        cache.promise(slot, 17)
    cache.promise(slot, 12)
    assert cache.can_admit(4)
    cache.check()


def test_slots_are_reused_and_never_exceeded() -> None:
    cache = make_cache(num_slots=2)
    first, second = cache.admit(1), cache.admit(1)
    assert not cache.can_admit(0)
    cache.release(first)
    assert cache.admit(1) == first != second
    with pytest.raises(AssertionError, match="not taken"):
        make_cache().release(0)


def test_taking_more_than_was_promised_is_our_mistake() -> None:
    cache = make_cache()
    slot = cache.admit(3)
    with pytest.raises(AssertionError, match="promised"):
        cache.reserve(slot, 1)


# Prefill


def test_any_chunking_stores_the_same() -> None:
    torch.manual_seed(0)
    whole = make_cache()
    slot, k, v = filled(whole, 200)
    for chunk in (1, 63, 64, 65, 199):
        cache = make_cache()
        other = cache.admit(16)
        for start in range(0, 200, chunk):
            end = min(200, start + chunk)
            prefill(cache, other, k[:, :, start:end], v[:, :, start:end])
        for layer in range(2):
            for one, two in zip(
                cache.view(other, layer, 200).contiguous(),
                whole.view(slot, layer, 200).contiguous(),
                strict=True,
            ):
                assert torch.equal(one, two)
        cache.check()


def test_destinations_are_of_reserved_pages_only() -> None:
    cache = make_cache()
    slot = cache.admit(16)
    cache.reserve(slot, 64)
    with pytest.raises(AssertionError, match="not reserved"):
        cache.prefill_destinations(slot, 0, 65)
    with pytest.raises(AssertionError, match="no page for the next token"):
        cache.decode_destinations([cache.admit(4)])


def test_tokens_of_any_strides_are_stored() -> None:
    cache = make_cache()
    slot = cache.admit(16)
    cache.reserve(slot, 70)
    destinations = cache.prefill_destinations(slot, 0, 70)
    packed = torch.randn(70, 3, 2, 4)  # a fused projection: token, (q, k, v), head
    k, v = packed[:, 1].transpose(0, 1), packed[:, 2].transpose(0, 1)
    cache.write(k, v, destinations[1])
    keys, values = cache.view(slot, 1, 70).contiguous()
    assert torch.equal(keys, k) and torch.equal(values, v)


def test_pages_dropped_in_prefill_are_free_at_once_and_not_reserved_again() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 200, pages=16)
    free = cache.usage().free
    blocks = torch.zeros(2, 2, 7, dtype=torch.bool)
    blocks[:, 0, 1] = True
    cache.drop(slot, blocks)
    cache.drop(slot, blocks)  # what has left can't leave again
    assert cache.usage().free == free + 2
    assert cache.held.host[slot].tolist() == [[136, 200], [136, 200]]
    prefill(cache, slot, *random_tokens(cache, 56))
    assert cache.table.host[slot, 0, 0].tolist()[1] == -1 and cache.kept_tokens(slot) == (192 + 256) / 2
    cache.check()


def test_only_complete_blocks_can_be_dropped() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 100)
    with pytest.raises(AssertionError, match="only the first 1 blocks are complete"):
        cache.drop(slot, torch.ones(2, 2, 2, dtype=torch.bool))


def test_rows_with_holes_are_packed_before_decode() -> None:
    cache = make_cache()
    slot, k, _ = filled(cache, 200, pages=20)
    blocks = torch.zeros(2, 2, 3, dtype=torch.bool)
    blocks[0, 0, :2] = True
    cache.drop(slot, blocks)
    with pytest.raises(AssertionError, match="pack"):
        cache.reserve_next([slot])
    cache.pack(slot)
    cache.check()
    new = torch.randn(2, 1, 2, 4)
    for _ in range(57):  # over the page's edge
        decode(cache, [slot], new, new)
    view = cache.view(slot, 0, 257)
    assert view.positions[0, :129].tolist() == list(range(128, 257)) and view.positions[0, 129] == -1
    assert view.positions[1].tolist() == list(range(257))
    assert torch.equal(view.contiguous()[0][0, :72], k[0, 0, 128:])
    cache.check()


def test_packing_without_holes_changes_nothing() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 130, pages=16)
    before = cache.table.host.copy()
    cache.pack(slot)
    assert np.array_equal(cache.table.host, before)
    decode(cache, [slot], torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))
    cache.check()


# Decode


def test_a_step_takes_pages_only_for_rows_that_are_full() -> None:
    cache = make_cache()
    first, _, _ = filled(cache, 64, pages=8)
    second, _, _ = filled(cache, 70, pages=8)
    free = cache.usage().free
    cache.reserve_next([first, second])
    assert cache.usage().free == free - ROWS
    cache.reserve_next([first, second])  # prepared again: nothing more
    assert cache.usage().free == free - ROWS
    cache.check()


def test_a_step_over_ragged_rows_reads_what_they_keep_and_the_new_token() -> None:
    torch.manual_seed(1)
    cache = make_cache(num_pages=64)
    slots, masks, held = [], [], []
    for length in (64, 130, 200):
        slot, k, v = filled(cache, length, pages=20)
        mask = torch.rand(2, 2, length) < 0.4
        mask[0, 0] = False  # one row keeps nothing
        cache.compact(slot, mask)
        slots, masks, held = [*slots, slot], [*masks, mask], [*held, (k, v)]
    new_k, new_v = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    cache.reserve_next(slots)
    destinations = cache.decode_destinations(slots)
    q = torch.randn(3, 4, 4)
    for layer in range(2):
        cache.write(new_k[layer], new_v[layer], destinations[layer])
        out = attended(cache, slots, q, layer)
        for b, (mask, (k, v)) in enumerate(zip(masks, held, strict=True)):
            keys = torch.cat((k[layer], new_k[layer, b, :, None]), dim=1)
            values = torch.cat((v[layer], new_v[layer, b, :, None]), dim=1)
            seen = torch.cat((mask[layer], torch.ones(2, 1, dtype=torch.bool)), dim=1)
            expected, _ = attention(q[b, :, None], keys, values, seen.repeat_interleave(2, 0)[:, None], 0.5)
            torch.testing.assert_close(out[b], expected[:, 0], atol=2e-6, rtol=0)  # fp32
    cache.advance(slots, 1)
    cache.check()


def test_a_row_that_just_filled_its_pages_shows_the_next_one() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 64, pages=8)
    cache.reserve_next(np.array([slot]))
    rows = cache.decode_rows(np.array([slot]))
    assert rows.max_held == 65 and rows.pages.shape == (2, 1, 2, 2) and (rows.pages >= 0).all()
    assert rows.held.unique().tolist() == [65] and rows.pages[0].is_contiguous()


def test_slots_in_any_order_and_subset_make_a_step() -> None:
    cache = make_cache()
    slots = [filled(cache, length, pages=8)[0] for length in (64, 10, 65)]
    new = torch.randn(2, 2, 2, 4)
    decode(cache, [slots[2], slots[0]], new, new)
    assert cache.computed[slots].tolist() == [65, 10, 66]
    assert torch.equal(cache.view(slots[0], 1, 65).contiguous()[0][:, -1], new[1, 1])
    assert torch.equal(cache.view(slots[2], 0, 66).contiguous()[0][:, -1], new[0, 0])
    cache.check()


# Compaction


def test_rows_may_keep_different_counts_and_give_back_the_rest() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 200)
    keep = torch.zeros(2, 2, 200, dtype=torch.bool)
    keep[0, 0, :65], keep[0, 1, 100:164], keep[1, 0, 199] = True, True, True
    cache.compact(slot, keep)
    assert cache.held.host[slot].tolist() == [[65, 64], [1, 0]]
    assert (cache.table.host[slot] >= 0).sum(-1).tolist() == [[2, 1], [1, 0]]
    assert cache.bytes_of(slot) == 4 * cache.pool.page_bytes == cache.usage().held_bytes
    assert cache.kept_tokens(slot) == 130 / 4
    cache.check()


def test_private_rows_are_compacted_in_place() -> None:
    cache = make_cache(num_pages=16)
    slot, k, v = filled(cache, 250)  # every page of the pool
    first_pages = cache.table.host[slot, :, :, :2].copy()
    keep = torch.rand(2, 2, 250, generator=torch.Generator().manual_seed(0)).topk(128).indices
    mask = torch.zeros(2, 2, 250, dtype=torch.bool).scatter_(2, keep, True)
    cache.compact(slot, mask)
    assert np.array_equal(cache.table.host[slot, :, :, :2], first_pages)
    for layer in range(2):
        keys, values = cache.view(slot, layer, 250).contiguous()
        for head in range(2):
            assert torch.equal(keys[head], k[layer, head, mask[layer, head]])
            assert torch.equal(values[head], v[layer, head, mask[layer, head]])
    cache.check()


def test_a_pool_that_fits_two_only_after_compaction_serves_two() -> None:
    cache = make_cache(num_pages=16)
    first, k, _ = filled(cache, 250, pages=16)
    assert not cache.can_admit(12)
    cache.compact(first, torch.arange(250).expand(2, 2, -1) >= 186)
    cache.promise(first, 4)
    assert cache.can_admit(12)
    second, other, _ = filled(cache, 190, pages=12)
    assert cache.usage().free == 0
    assert torch.equal(cache.view(second, 1, 190).contiguous()[0], other[1])
    assert torch.equal(cache.view(first, 1, 250).contiguous()[0], k[1, :, 186:])
    cache.check()


def test_shared_pages_survive_compaction() -> None:
    cache = make_cache(num_pages=40)
    owner, k, v = filled(cache, 200, pages=16)
    borrower = cache.admit(20)
    share(cache, owner, borrower, 2)
    new_k, new_v = random_tokens(cache, 60)
    prefill(cache, borrower, new_k, new_v)
    cache.check()
    usage = cache.usage()
    assert usage.borrowed == 8 and usage.private == 8 + 4 and usage.free == 40 - 20
    mask = torch.rand(2, 2, 188, generator=torch.Generator().manual_seed(0)) < 0.6
    cache.compact(borrower, mask)
    cache.check()
    assert cache.usage().borrowed == 0
    for layer in range(2):
        assert torch.equal(cache.view(owner, layer, 200).contiguous()[0], k[layer])
        assert torch.equal(cache.view(owner, layer, 200).contiguous()[1], v[layer])
        whole = torch.cat((k[layer, :, :128], new_k[layer]), dim=1)
        keys, _ = cache.view(borrower, layer, 188).contiguous()
        for head in range(2):
            count = int(mask[layer, head].sum())
            assert torch.equal(keys[head, :count], whole[head, mask[layer, head]])
    cache.release(owner)
    cache.release(borrower)
    cache.check()
    assert cache.usage().free == 40 - 8 and cache.usage().cached == 8


def test_a_borrower_that_leaves_takes_nothing_along() -> None:
    cache = make_cache(num_pages=40)
    owner, k, _ = filled(cache, 200, pages=16)
    borrower = cache.admit(12)
    share(cache, owner, borrower, 3, pin=False)
    cache.drop(borrower, torch.tensor([True, False, False]).expand(2, 2, 3))
    cache.check()
    cache.release(borrower)
    assert torch.equal(cache.view(owner, 0, 200).contiguous()[0], k[0])
    assert cache.usage().free == 40 - 16
    cache.check()


def test_tokens_of_dropped_pages_stay_dropped() -> None:
    cache = make_cache()
    slot, k, _ = filled(cache, 200)
    cache.drop(slot, torch.tensor([False, True]).expand(2, 2, 2))
    cache.compact(slot, (torch.arange(200) % 2 == 0).expand(2, 2, -1))
    kept = [*range(0, 64, 2), *range(128, 200, 2)]
    view = cache.view(slot, 0, 200)
    assert view.positions.tolist() == [kept, kept]
    assert torch.equal(view.contiguous()[0], k[0][:, kept])
    cache.check()


def test_a_sequence_is_compacted_once() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 100)
    with pytest.raises(AssertionError, match="100 tokens computed"):
        cache.compact(slot, torch.ones(2, 2, 99, dtype=torch.bool))
    cache.compact(slot, torch.ones(2, 2, 100, dtype=torch.bool))
    for again in (
        lambda: cache.compact(slot, torch.ones(2, 2, 100, dtype=torch.bool)),
        lambda: cache.drop(slot, torch.zeros(2, 2, 1, dtype=torch.bool)),
        lambda: cache.reserve(slot, 128),
    ):
        with pytest.raises(AssertionError, match="compacted"):
            again()


def test_pages_leave_packed_rows_from_anywhere_appended_ones_too() -> None:
    """Two windows' worth of answer behind a packed prompt: rows go on at the right positions."""
    cache = make_cache()
    slot, k, v = filled(cache, 192, pages=24)
    cache.drop(slot, torch.tensor([True, False, False]).expand(2, 2, 3))
    cache.pack(slot)
    for _ in range(130):
        step = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4)
        k, v = (torch.cat((old, new.transpose(1, 2)), dim=2) for old, new in zip((k, v), step, strict=True))
        decode(cache, [slot], *step)
    blocks = torch.zeros(2, 2, 5, dtype=torch.bool)
    blocks[0, 0, 3], blocks[1, 1, [1, 4]] = True, True  # of blocks 1 to 5: one that was appended, and two
    cache.drop(slot, blocks)
    cache.check()
    kept = {(0, 0): [1, 2, 4, 5], (1, 1): [2, 3, 5]}
    for layer in range(2):
        view = cache.view(slot, layer, 322)
        for head in range(2):
            of_row = kept.get((layer, head), [1, 2, 3, 4, 5])
            positions = [p for block in of_row for p in range(64 * block, min(64 * block + 64, 322))]
            assert view.positions[head][: len(positions)].tolist() == positions
            assert torch.equal(view.contiguous()[1][head, : len(positions)], v[layer, head, positions])


def test_keeping_everything_reads_like_no_compaction_bit_for_bit() -> None:
    torch.manual_seed(2)
    cache = make_cache()
    plain, k, v = filled(cache, 130, pages=16)
    packed = cache.admit(16)
    prefill(cache, packed, k, v)
    cache.compact(packed, torch.ones(2, 2, 130, dtype=torch.bool))
    new = torch.randn(2, 1, 2, 4).expand(2, 2, 2, 4)
    decode(cache, [plain, packed], new, new)
    cache.reserve_next([plain, packed])
    q = torch.randn(1, 4, 4).expand(2, 4, 4)
    out = attended(cache, [plain, packed], q, 1)
    assert torch.equal(out[0], out[1])


# The books


def test_everything_returns_on_release() -> None:
    cache = make_cache()
    slot, _, _ = filled(cache, 200, pages=24)
    cache.compact(slot, torch.rand(2, 2, 200) < 0.3)
    decode(cache, [slot], torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))
    cache.release(slot)
    cache.check()
    assert cache.usage().free == cache.pool.num_pages and cache.usage().held_bytes == 0
    assert cache.can_admit(cache.pool.num_pages)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c, s: c.pool.retain(c.table.host[s, 0, 0, :1]), "2 references, 1 in tables and columns"),
        (lambda c, s: c.table.host.__setitem__((s, 0, 0, 0), -1), "1 references, 0 in tables and columns"),
        (
            lambda c, s: c.table.host.__setitem__((s, 0, 0, 0), c.table.host[s, 1, 1, 0]),
            "references, . in tables",
        ),
        (lambda c, s: c.held.host.__setitem__(s, 129), "more tokens than their pages"),
        (lambda c, s: c.held.host.__setitem__(s, 90), "do not explain"),
        (lambda c, s: c.promises._promised.__setitem__(s, 7), "promised"),
        (lambda c, s: c.promises._promised.__setitem__(s, 65), "65 pages promised of 64"),
        (lambda c, s: c.promises._own.__setitem__(s, 7), "counted"),
        (lambda c, s: c._is_live.__setitem__(s, False), "free slot 0 still has"),
    ],
)
def test_check_finds(break_it, message) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(num_pages=64)
    slot, _, _ = filled(cache, 100)
    cache.check()
    break_it(cache, slot)
    with pytest.raises(AssertionError, match=message):
        cache.check()


def test_a_pool_without_room_for_shared_copies_says_so() -> None:
    cache = make_cache(num_pages=16)
    owner, _, _ = filled(cache, 128, pages=8)
    borrower = cache.admit(8)
    share(cache, owner, borrower, 2)
    cache.pool.allocate(8)
    with pytest.raises(OutOfPages):
        cache.compact(borrower, torch.ones(2, 2, 128, dtype=torch.bool))


def test_three_kv_heads_and_odd_sizes_are_served() -> None:
    cache = make_cache(model=make_model(layers=3, query_heads=9, kv_heads=3, head_dim=10), num_pages=64)
    slot, k, _ = filled(cache, 97)
    assert torch.equal(cache.view(slot, 2, 97).contiguous()[0], k[2])
    cache.check()
