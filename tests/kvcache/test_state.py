"""State that plug-ins declare: one tensor per page or slot, counted, zeroed with the slot."""

import pytest
import torch

from kvcache.state import StateRegistry
from tests.kvcache.builders import CPU, make_cache


def test_state_has_the_declared_shape_for_every_page_and_slot() -> None:
    states = StateRegistry()
    states.page_state("gate", (4,))
    states.slot_state("refreshed", (2, 3), torch.int32)
    make_cache(num_pages=16, num_slots=3, states=states)
    assert states.of_pages("gate").shape == (16, 4) and states.of_pages("gate").dtype == torch.float32
    assert (
        states.of_slots("refreshed").shape == (3, 2, 3) and states.of_slots("refreshed").dtype == torch.int32
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


def test_compaction_refuses_page_state_that_it_would_leave_wrong() -> None:
    states = StateRegistry()
    states.page_state("gate", (4,))
    cache = make_cache(states=states)
    slot = cache.admit(4)
    with pytest.raises(AssertionError, match="rebuilt"):
        cache.compact(slot, torch.ones(2, 2, 0, dtype=torch.bool))
