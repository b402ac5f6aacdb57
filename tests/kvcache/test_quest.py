"""Quest: bounds that hold, follow what is written and move with it; choices that cover what they promise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs import native
from configs.features import Features
from configs.model import PAGE_SIZE
from engine.kernels import kernels_for
from kvcache.cache import KVCache
from kvcache.decode import Queries, RowSelection
from kvcache.kernels.cpu_quest import best_units as best_units_in_cpp
from kvcache.quest import BOUNDS, PER_PAGE, UNIT, Quest, best_units, unit_scores
from kvcache.state import NewKeys, StateRegistry
from tests.kvcache.builders import CPU, make_cache, make_model

LAYERS, HEADS, GROUP, SIZE = 2, 2, 3, 8
MODEL = make_model(layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS, head_dim=SIZE)


def quest_cache(method: Quest, **sizes: Any) -> KVCache:
    states = StateRegistry()
    method.attach(MODEL, None, states)  # type: ignore[arg-type]
    return make_cache(model=MODEL, states=states, **sizes)


def write_chunk(cache: KVCache, slot: int, k: Tensor, start: int) -> None:
    """k [L, Hkv, T, D], as a forward writes them."""
    length = k.shape[2]
    cache.reserve(slot, start + length)
    cache.sync()
    destinations = cache.prefill_destinations(slot, start, length)
    positions = torch.arange(start, start + length)
    for layer in range(LAYERS):
        cache.write(k[layer], k[layer], destinations[layer])
        cache.keep_up(NewKeys(layer, k[layer], destinations[layer], positions, None, is_chunk=True))
    cache.advance(slot, length)


def write_step(cache: KVCache, slots: list[int], k: Tensor) -> None:
    """One token of each slot: k [L, B, Hkv, D]."""
    cache.reserve_next(slots)
    cache.sync()
    destinations, positions = cache.decode_destinations(slots), torch.zeros(len(slots), dtype=torch.int64)
    for layer in range(LAYERS):
        cache.write(k[layer], k[layer], destinations[layer])
        cache.keep_up(NewKeys(layer, k[layer], destinations[layer], positions, None, is_chunk=False))
    cache.advance(slots, 1)


def assert_bounds_hold(cache: KVCache, slot: int) -> None:
    """Each unit's state is the least and the largest of the keys it holds, no more and no less."""
    bounds = cache.states.of_pages(BOUNDS)
    for layer in range(cache.num_layers):
        for head in range(cache.num_kv_heads):
            pages = cache.table.host[slot, layer, head]
            for first in range(0, int(cache.held.host[slot, layer, head]), UNIT):
                page, unit = pages[first // PAGE_SIZE], first % PAGE_SIZE // UNIT
                held = min(UNIT, int(cache.held.host[slot, layer, head]) - first)
                keys = cache.pool.k[page, unit * UNIT : unit * UNIT + held]
                assert torch.equal(bounds[page, unit], torch.stack((keys.amin(0), keys.amax(0))))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 130])
def test_bounds_follow_chunks_and_steps_on_pages_that_others_left(length: int) -> None:
    cache = quest_cache(Quest(), num_pages=24)
    first = cache.admit(24)
    write_chunk(cache, first, 100 * torch.randn(LAYERS, HEADS, 300, SIZE), 0)
    cache.release(first)  # its bounds stay behind in every page
    slot = cache.admit(16)
    for start in range(0, length, PAGE_SIZE):
        k = torch.randn(LAYERS, HEADS, min(PAGE_SIZE, length - start), SIZE)
        write_chunk(cache, slot, k, start)
    assert_bounds_hold(cache, slot)
    for _ in range(20):
        write_step(cache, [slot], torch.randn(LAYERS, 1, HEADS, SIZE))
        assert_bounds_hold(cache, slot)


def test_bounds_are_rebuilt_for_compacted_pages_and_go_on_from_there() -> None:
    cache = quest_cache(Quest(), num_pages=32)
    slot = cache.admit(20)
    write_chunk(cache, slot, torch.randn(LAYERS, HEADS, 200, SIZE), 0)
    cache.compact(slot, torch.rand(LAYERS, HEADS, 200) < 0.45)
    assert_bounds_hold(cache, slot)
    for _ in range(18):
        write_step(cache, [slot], torch.randn(LAYERS, 1, HEADS, SIZE))
    assert_bounds_hold(cache, slot)


def test_a_fork_has_the_bounds_of_its_copied_page() -> None:
    cache = quest_cache(Quest(), num_pages=32)
    slot, fork = cache.admit(16), cache.admit(8)
    write_chunk(cache, slot, torch.randn(LAYERS, HEADS, 90, SIZE), 0)
    cache.fork(slot, [fork], pin=True)
    for _ in range(3):
        write_step(cache, [slot, fork], torch.randn(LAYERS, 2, HEADS, SIZE))
    assert_bounds_hold(cache, slot)
    assert_bounds_hold(cache, fork)


def test_no_key_of_a_unit_scores_above_its_bound_and_a_single_key_meets_it() -> None:
    pages = torch.tensor([[[3, 0]]], dtype=torch.int32)
    keys, q = torch.randn(4, PAGE_SIZE, SIZE), torch.randn(1, GROUP, SIZE)
    of_units = keys.view(4, PER_PAGE, UNIT, SIZE)
    scores = unit_scores(q, torch.stack((of_units.amin(2), of_units.amax(2)), 2), pages)
    true = (of_units[[3, 0]].flatten(0, 1) @ q[0].T).amax(1).sum(-1)  # [U]: heads at their own best keys
    assert scores.shape == (1, 1, 8) and (scores[0, 0] >= true - 1e-5).all()
    alone = torch.stack((of_units[:, :, 0], of_units[:, :, 0]), 2)
    true = (of_units[[3, 0], :, 0].flatten(0, 1) @ q[0].T).sum(-1)
    torch.testing.assert_close(unit_scores(q, alone, pages)[0, 0], true, atol=1e-5, rtol=0)  # fp32


def selected(selection: RowSelection, b: int, head: int) -> list[int]:
    ids: list[int] = selection.ids[b, head, : int(selection.counts[b, head])].tolist()
    return ids


def select(method: Quest, cache: KVCache, slots: list[int], q: Tensor, layer: int = 1) -> RowSelection | None:
    """For rows as they stand, whose newest token was just written: q [B, Hq, D]."""
    cache.advance(slots, -1)
    cache.sync()
    rows = cache.decode_rows(slots)
    cache.advance(slots, 1)
    queries = Queries(q, torch.zeros(len(slots), dtype=torch.int64), None)
    return method.select(layer, queries, rows, cache.states)


SMALL: dict[str, Any] = {"read": 128, "sink": 16, "window": 20, "dense_layers": 1}


@pytest.mark.parametrize("reuse", [1, 4])
def test_first_best_and_nearest_units_are_read_and_short_rows_whole(reuse: int) -> None:
    method = Quest(**SMALL, reuse=reuse)
    cache = quest_cache(method, num_pages=64)
    long, short = cache.admit(32), cache.admit(16)
    keys = torch.randn(LAYERS, HEADS, 400, SIZE)
    q = torch.randn(2, HEADS * GROUP, SIZE)
    needles = [37, 300]  # one for each KV head
    for head, place in enumerate(needles):
        keys[1, head, place] = 5 * q[0, head * GROUP : (head + 1) * GROUP].sum(0)
    write_chunk(cache, long, keys, 0)
    write_chunk(cache, short, torch.randn(LAYERS, HEADS, 128, SIZE), 0)
    selection = select(method, cache, [long, short], q)
    assert selection is not None and selection.unit == UNIT
    for head, place in enumerate(needles):
        ids = selected(selection, 0, head)
        assert ids == sorted(set(ids)) and len(ids) * UNIT == method.read
        assert {0, 22, 23, 24, place // UNIT} <= set(ids)
        assert selected(selection, 1, head) == list(range(8))


def test_what_holds_little_and_the_first_layers_are_read_whole() -> None:
    method = Quest(**SMALL)
    cache = quest_cache(method)
    slot = cache.admit(16)
    write_chunk(cache, slot, torch.randn(LAYERS, HEADS, 129, SIZE), 0)
    q = torch.randn(1, HEADS * GROUP, SIZE)
    assert select(method, cache, [slot], q, layer=0) is None
    assert select(method, cache, [slot], q) is not None
    cache.advance([slot], -1)
    assert select(method, cache, [slot], q) is None
    cache.advance([slot], 1)


def test_a_choice_serves_for_its_steps_in_every_slot_and_loses_no_new_token() -> None:
    method = Quest(**SMALL, reuse=5)
    cache = quest_cache(method, num_pages=96)
    old, young = cache.admit(32), cache.admit(32)
    write_chunk(cache, old, torch.randn(LAYERS, HEADS, 300, SIZE), 0)
    write_chunk(cache, young, torch.randn(LAYERS, HEADS, 120, SIZE), 0)
    seen: dict[int, list[list[int]]] = {old: [], young: []}
    for _ in range(24):
        write_step(cache, [old, young], torch.randn(LAYERS, 2, HEADS, SIZE))
        selection = select(method, cache, [old, young], torch.randn(2, HEADS * GROUP, SIZE))
        assert selection is not None
        for b, slot in enumerate(seen):
            ids = selected(selection, b, 0)
            held = int(cache.held.host[slot, 1, 0])
            first_near = ids[-1] - method.nearest + 1
            assert ids == sorted(set(ids)) and ids[-1] == (held - 1) // UNIT
            assert set(range(max(0, first_near), ids[-1] + 1)) <= set(ids)  # whatever was chosen when
            if held > method.read:
                seen[slot].append(ids)
    for read in seen.values():
        # between choices nothing that was read is left out, and nothing comes but new tokens
        assert all(read[i][: len(read[i - 1])] == read[i - 1] for i in range(1, len(read)) if i % 5)
        assert any(read[i][: len(read[i - 1])] != read[i - 1] for i in range(5, len(read), 5))


def test_phases_do_not_depend_on_batch_mates() -> None:
    method = Quest(**SMALL, reuse=5)
    keys = torch.randn(LAYERS, HEADS, 120, SIZE)
    steps = [(torch.randn(LAYERS, 1, HEADS, SIZE), torch.randn(1, HEADS * GROUP, SIZE)) for _ in range(20)]

    def run(with_mate: bool) -> list[list[int]]:
        cache = quest_cache(method, num_pages=96)
        slots = [cache.admit(32)]
        write_chunk(cache, slots[0], keys, 0)
        if with_mate:
            slots.append(cache.admit(32))
            write_chunk(cache, slots[1], torch.randn(LAYERS, HEADS, 333, SIZE), 0)
        found = []
        for k, q in steps:
            write_step(cache, slots, k.repeat(1, len(slots), 1, 1))
            selection = select(method, cache, slots, q.repeat(len(slots), 1, 1))
            held = int(cache.held.host[slots[0], 1, 0])
            found.append(list(range(-(-held // UNIT))) if selection is None else selected(selection, 0, 1))
        return found

    assert run(with_mate=True) == run(with_mate=False)


def test_the_choice_is_attended_to_and_nothing_else() -> None:
    method = Quest(**SMALL)
    cache = quest_cache(method, num_pages=64)
    slot = cache.admit(32)
    write_chunk(cache, slot, torch.randn(LAYERS, HEADS, 400, SIZE), 0)
    q = torch.randn(1, HEADS * GROUP, SIZE)
    selection = select(method, cache, [slot], q)
    assert selection is not None

    def attend() -> Tensor:
        return kernels_for(CPU).attend_rows(
            q,
            cache.pool.k,
            cache.pool.v,
            cache.table.device[slot, 1][None],
            cache.held.device[slot, 1][None],
            scale=0.3,
            max_held=400,
            features=Features(),
            selection=selection,
        )

    before = attend()
    for head in range(HEADS):
        for unit in set(range(25)) - set(selected(selection, 0, head)):
            page = cache.table.host[slot, 1, head, unit // PER_PAGE]
            cache.pool.k[page, unit % PER_PAGE * UNIT : (unit % PER_PAGE + 1) * UNIT] = float("nan")
    assert torch.equal(attend(), before)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize(("group", "size"), [(1, 64), (3, 64), (8, 128), (3, 20)])
def test_the_choice_in_cpp_is_that_of_torch(group: int, size: int) -> None:
    wanted = Quest(**SMALL)
    held = torch.tensor([[129, 400], [1000, 144], [128, 777]], dtype=torch.int32)
    pages = torch.randperm(100)[:96].view(3, 2, 16).int()
    keys = torch.randn(100, PER_PAGE, UNIT, size)
    bounds = torch.stack((keys.amin(2), keys.amax(2)), 2)
    q = torch.randn(3, 2 * group, size)
    found, expected = (choose(q, bounds, pages, held, wanted) for choose in (best_units_in_cpp, best_units))
    long = held > wanted.read
    assert found.shape == expected.shape == (3, 2, wanted.chosen)
    assert torch.equal(found[long], expected[long])
    alone = best_units_in_cpp(q[1:2], bounds, pages[1:2], held[1:2], wanted)
    assert torch.equal(alone, found[1:2])


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
def test_of_equal_units_the_first_are_chosen_in_cpp() -> None:
    wanted, held = Quest(**SMALL), torch.tensor([[500]], dtype=torch.int32)
    pages = torch.arange(8, dtype=torch.int32).view(1, 1, 8)
    bounds = torch.ones(8, PER_PAGE, 2, 64)
    found = best_units_in_cpp(torch.ones(1, 3, 64), bounds, pages, held, wanted)
    assert found.flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"read": 100}, "read \\(100\\) must be a multiple of 16"),
        ({"read": 112, "window": 64, "sink": 32}, "read \\(112\\) must exceed .*112 tokens"),
        ({"window": 0}, "window \\(0\\)"),
        ({"sink": -1}, "sink \\(-1\\)"),
        ({"reuse": 65}, "reuse \\(65\\)"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Quest(**options)
