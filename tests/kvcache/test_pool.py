"""The pool: pages are handed out once, shared by count, and free when nobody refers to them."""

import numpy as np
import psutil
import pytest
import torch

from kvcache.pool import OutOfPages, PagePool, page_bytes, pages_for
from kvcache.state import StateRegistry
from tests.kvcache.builders import CPU


def make_pool(num_pages: int = 8, states: StateRegistry | None = None) -> PagePool:
    return PagePool(num_pages, 4, dtype=torch.float32, device=CPU, states=states or StateRegistry())


def test_allocated_pages_are_distinct_and_counted() -> None:
    pool = make_pool()
    pages = np.concatenate([pool.allocate(3), pool.allocate(5)])
    assert sorted(pages) == list(range(8)) and pool.num_free == 0
    assert pages.dtype == np.int32
    pool.check()


def test_asking_for_more_than_is_free_is_refused_and_takes_nothing() -> None:
    pool = make_pool()
    pool.allocate(6)
    with pytest.raises(OutOfPages, match="3 pages wanted, 2 of 8 are free"):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check()


def test_a_shared_page_is_free_only_after_its_last_release() -> None:
    pool = make_pool()
    pages = pool.allocate(2)
    pool.retain(pages)
    pool.release(pages)
    assert pool.num_free == 6
    pool.release(pages)
    assert pool.num_free == 8
    pool.check()


def test_no_page_stands_for_minus_one() -> None:
    pool = make_pool()
    pages = pool.allocate(2)
    with_none = np.array([-1, pages[0], -1, pages[1]], dtype=np.int32)
    pool.retain(with_none)
    assert pool.references.tolist().count(2) == 2
    pool.release(with_none)
    pool.release(with_none)
    assert pool.num_free == 8
    pool.check()


def test_releasing_a_free_page_is_our_mistake() -> None:
    pool = make_pool()
    page = pool.allocate(1)
    pool.release(page)
    with pytest.raises(AssertionError, match="released free pages"):
        pool.release(page)
    with pytest.raises(AssertionError, match="retained free pages"):
        pool.retain(page)


def test_freed_pages_come_back() -> None:
    pool = make_pool()
    first = pool.allocate(8)
    pool.release(first[[1, 4, 6]])
    assert sorted(pool.allocate(3)) == sorted(first[[1, 4, 6]])


def test_check_finds_a_page_lost_and_a_page_free_twice() -> None:
    lost = make_pool()
    lost.allocate(1)
    lost.references[:] = 0
    with pytest.raises(AssertionError, match="7 pages on the free stack, 8 without a reference"):
        lost.check()
    twice = make_pool()
    page = twice.allocate(2)[0]
    twice.release(np.array([page, page], dtype=np.int32))
    with pytest.raises(AssertionError):
        twice.check()


def test_page_bytes_count_keys_values_and_page_state() -> None:
    states = StateRegistry()
    states.page_state("gate", (2, 4))
    assert page_bytes(4, torch.float32, states) == 2 * 64 * 4 * 4 + 8 * 4
    assert make_pool(states=states).page_bytes == 2 * 64 * 4 * 4 + 8 * 4
    assert page_bytes(128, torch.bfloat16, StateRegistry()) == 2 * 64 * 128 * 2


def test_a_cache_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_pool(0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_is_zeros_aligned_and_takes_memory_only_where_it_is_written(dtype: torch.dtype) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = PagePool(200_000, 64, dtype=dtype, device=CPU, states=StateRegistry())  # gigabytes
    assert process.memory_info().rss - before < 100 * 2**20
    assert pool.k.dtype == dtype and pool.k.is_contiguous() and pool.k.data_ptr() % 64 == 0
    assert not pool.k[[0, 77, -1]].any() and not pool.v[[0, 77, -1]].any()
