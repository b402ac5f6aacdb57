"""State that plug-ins declare: one tensor per page or slot, counted, zeroed with the slot."""

import pytest
import torch
from torch import Tensor

from engine.rope import Rotation
from kvcache.state import NewKeys, StateRegistry, Upkeep
from tests.kvcache.builders import CPU, filled, make_cache


def test_state_has_the_declared_shape_for_every_page_and_slot() -> None:
    states = StateRegistry()
    states.page_state("gate", (4,))
    states.slot_state("refreshed", (2, 3), torch.int32)
    make_cache(num_pages=16, num_slots=3, states=states)
    assert states.of_pages("gate").shape == (17, 4) and states.of_pages("gate").dtype == torch.float32
    assert (
        states.of_slots("refreshed").shape == (4, 2, 3) and states.of_slots("refreshed").dtype == torch.int32
    )


def test_bytes_are_counted_per_page_and_per_slot() -> None:
    states = StateRegistry()
    states.page_state("min", (4, 8))
    states.page_state("flag", (), torch.uint8)
    states.slot_state("counter", (5,), torch.int32)
    assert states.page_bytes == 4 * 8 * 4 + 1 and states.slot_bytes == 20
    cache = make_cache(states=states)
    assert cache.pool.page_bytes == 2 * 64 * 4 * 4 + states.page_bytes


def test_two_plans_may_share_a_state_but_not_disagree_about_it() -> None:
    states = StateRegistry()
    states.page_state("gate", (4,))
    states.page_state("gate", (4,))
    assert states.page_bytes == 16
    with pytest.raises(ValueError, match=r"page state 'gate' is declared as \(4,\)"):
        states.page_state("gate", (8,))
    with pytest.raises(ValueError, match="float16"):
        states.page_state("gate", (4,), torch.float16)
    states.slot_state("gate", (8,))  # another kind, another name space
    with pytest.raises(ValueError, match="at least 1"):
        states.slot_state("empty", (0,))


def test_a_new_sequence_inherits_no_slot_state() -> None:
    states = StateRegistry()
    states.slot_state("counter", (2,))
    cache = make_cache(num_slots=2, states=states)
    first, second = cache.admit(1), cache.admit(1)
    states.of_slots("counter")[:] = 7
    cache.release(first)
    assert cache.admit(1) == first
    assert states.of_slots("counter")[first].tolist() == [0, 0]
    assert states.of_slots("counter")[second].tolist() == [7, 7]


def test_declaring_after_the_cache_was_made_is_our_mistake() -> None:
    states = StateRegistry()
    states.allocate(1, 1, CPU)
    with pytest.raises(AssertionError, match="after the cache was allocated"):
        states.page_state("late", (1,))
    with pytest.raises(AssertionError, match="once"):
        states.allocate(1, 1, CPU)


def store_last(state: Tensor, new: NewKeys) -> None:
    state[new.destinations[:, -1] // 64] = new.k[:, -1]


def store_first(state: Tensor, pages: Tensor, keys: Tensor, counts: Tensor) -> None:
    state[pages] = keys[:, 0] * counts[:, None]


def test_upkeep_hears_of_all_that_is_written_and_of_compacted_pages() -> None:
    states = StateRegistry()
    states.page_state("known", (4,), upkeep=Upkeep(store_last, store_first))
    states.page_state("alone", (1,))
    assert states.is_kept_up and not states.follows_compaction  # nobody could rebuild "alone"
    cache = make_cache(states=states)
    slot, k, _ = filled(cache, 100)
    pages = cache.table.device[slot]
    for layer in range(2):
        new = NewKeys(
            layer, k[layer], cache.prefill_destinations(slot, 0, 100)[layer], torch.arange(100), None, True
        )
        cache.keep_up(new)
    assert torch.equal(states.of_pages("known")[pages[:, :, 1].long()], k[:, :, 99])
    keep = torch.zeros(2, 2, 100, dtype=torch.bool)
    keep[:, :, 7:77] = True
    cache.compact(slot, keep)
    pages = cache.table.device[slot]
    assert torch.equal(states.of_pages("known")[pages[:, :, 0].long()], k[:, :, 7] * 64)
    assert torch.equal(states.of_pages("known")[pages[:, :, 1].long()], k[:, :, 71] * 6)


def test_a_registry_includes_what_another_declared() -> None:
    states, other = StateRegistry(), StateRegistry()
    states.page_state("gate", (4,))
    other.page_state("gate", (4,))
    other.slot_state("age", (2,))
    states.include(other)
    assert (states.page_bytes, states.slot_bytes) == (16, 8)
    conflicting = StateRegistry()
    conflicting.page_state("gate", (8,))
    with pytest.raises(ValueError, match="'gate'"):
        states.include(conflicting)


def test_new_keys_are_taken_back_to_before_rope_in_both_layouts() -> None:
    rotation = Rotation(1e4 ** (-torch.arange(0, 4, 2) / 4), 1.0, interleaved=False)
    k, positions = torch.randn(2, 5, 4), torch.arange(5) + 3
    turned, nowhere = rotation.apply(k, positions), torch.zeros(2, 5, dtype=torch.int64)
    chunk = NewKeys(0, turned, nowhere, positions, rotation, is_chunk=True)
    step = NewKeys(0, turned.transpose(0, 1), nowhere.T, positions, rotation, is_chunk=False)
    torch.testing.assert_close(chunk.pre_rope(), k, atol=1e-5, rtol=0)  # fp32
    torch.testing.assert_close(step.pre_rope(), k.transpose(0, 1), atol=1e-5, rtol=0)
