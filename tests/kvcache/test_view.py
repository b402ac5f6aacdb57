"""A view shows keys by position while a sequence is logical, and by place with positions once packed."""

import torch

from tests.kvcache.builders import decode, filled, make_cache, view_of


def test_keys_come_back_by_position_across_pages() -> None:
    torch.manual_seed(0)
    for length in (1, 63, 64, 65, 200):
        k, v = torch.randn(2, length, 4), torch.randn(2, length, 4)
        keys, values = view_of(k, v).contiguous()
        assert torch.equal(keys, k) and torch.equal(values, v)


def test_gathering_happens_once() -> None:
    view = view_of(torch.randn(2, 70, 4), torch.randn(2, 70, 4))
    assert view.contiguous()[0] is view.contiguous()[0]


def test_a_view_of_a_chunk_being_computed_includes_it() -> None:
    cache = make_cache()
    slot, k, _ = filled(cache, 60, pages=8)
    cache.reserve(slot, 90)
    destinations = cache.prefill_destinations(slot, 60, 30)
    new = torch.randn(2, 30, 4)
    cache.write(new, new, destinations[0])
    view = cache.view(slot, 0, 90)
    assert view.num_tokens == 90 and view.max_held == 90 and view.num_held.tolist() == [90, 90]
    assert view.pages.shape == (2, 2)
    assert torch.equal(view.contiguous()[0], torch.cat((k[0], new), dim=1))
    assert cache.computed[slot] == 60  # not yet


def test_dropped_pages_are_minus_one_and_give_zeros() -> None:
    cache = make_cache()
    slot, k, v = filled(cache, 150)
    blocks = torch.zeros(2, 2, 2, dtype=torch.bool)
    blocks[0, 1, 0] = True
    cache.drop(slot, blocks)
    view = cache.view(slot, 0, 150)
    assert view.pages[1, 0] == -1 and view.num_held.tolist() == [150, 86] and view.has_holes
    keys, values = view.contiguous()
    assert torch.equal(keys[0], k[0, 0]) and torch.equal(values[1, 64:], v[0, 1, 64:])
    assert keys[1, :64].abs().max() == 0 and values[1, :64].abs().max() == 0
    assert view.positions[0].tolist() == list(range(150))
    assert view.positions[1].tolist() == [*range(64, 150), *[-1] * 64]
    assert not cache.view(slot, 1, 150).has_holes


def test_a_packed_view_is_by_place_with_positions_and_zero_padding() -> None:
    cache = make_cache()
    slot, k, v = filled(cache, 150)
    keep = torch.zeros(2, 2, 150, dtype=torch.bool)
    keep[0, 0, [3, 70, 149]] = True
    keep[0, 1, 10:80] = True
    cache.compact(slot, keep)
    decode(cache, [slot], torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))
    view = cache.view(slot, 0, 151)
    assert view.positions[0].tolist() == [3, 70, 149, 150, *[-1] * 67]
    assert view.positions[1].tolist() == [*range(10, 80), 150]
    keys, values = view.contiguous()
    assert keys.shape == (2, 71, 4)
    assert torch.equal(keys[0, :3], k[0, 0, [3, 70, 149]]) and torch.equal(values[1, :70], v[0, 1, 10:80])
    assert keys[0, 3].tolist() == [1] * 4 and keys[0, 4:].abs().max() == 0
    nothing = cache.view(slot, 1, 151)  # layer 1 kept nothing but the new token
    assert nothing.positions.tolist() == [[150], [150]] and nothing.contiguous()[0].shape == (2, 1, 4)
