"""A step of fixed size writes and reads what a plain one does; its padding touches nothing of anybody's."""

import torch

from configs.model import PAGE_SIZE
from kvcache.padded import padded_step
from tests.kvcache.builders import filled, make_cache


def test_live_rows_are_those_of_a_plain_step() -> None:
    """Unequal rows, one that begins a page and one that was compacted; the last slot is live, too."""
    cache = make_cache(num_slots=3)
    slots = [filled(cache, length, pages=16)[0] for length in (64, 10, 200)]
    keep = torch.rand(2, 2, 200) < 0.4
    keep[1, 1] = False  # one row keeps nothing
    cache.compact(slots[2], keep)
    order = [slots[2], slots[0], slots[1]]
    cache.reserve_next(order)
    cache.sync()
    nobody = len(cache.computed)
    assert nobody - 1 in slots
    bound = 200
    destinations, rows = padded_step(cache, torch.tensor([*order, nobody, nobody]), bound)
    plain = cache.decode_rows(order)
    width = plain.pages.shape[-1]
    assert torch.equal(destinations[:, :3], cache.decode_destinations(order))
    assert torch.equal(rows.held[:, :3], plain.held) and rows.held.dtype == plain.held.dtype
    assert torch.equal(rows.pages[:, :3, :, :width], plain.pages) and rows.max_held == bound
    assert rows.pages.shape[-1] == 4 and rows.keys.pool is plain.keys.pool
    assert rows.held[:, 3:].eq(0).all()
    assert destinations[:, 3:].eq(cache.pool.scratch_page * PAGE_SIZE).all()


def test_a_row_without_a_page_writes_where_nobody_reads() -> None:
    """The host sees to it that there is one: what a mistake there would cost."""
    cache = make_cache()
    slot, _, _ = filled(cache, 64)
    destinations, _ = padded_step(cache, torch.tensor([slot]), 128)
    assert (destinations // PAGE_SIZE).eq(cache.pool.scratch_page).all()
