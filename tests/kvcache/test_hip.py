"""HiP at decode keeps the units of the published descent, stage by stage as each is due, in every slot."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kvcache.hip
from configs.model import PAGE_SIZE
from configs.quantised import quantise
from kvcache.cache import KVCache
from kvcache.decode import Queries, RowSelection, StoredKeys
from kvcache.hip import HiP
from kvcache.state import StateRegistry
from tests.kvcache.builders import make_cache, make_model
from tests.kvcache.test_quest import GROUP, HEADS, LAYERS, SIZE, selected, write_chunk, write_step
from tests.sparse.test_hip import best_met

MODEL = make_model(layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS, head_dim=SIZE)
SMALL: dict[str, Any] = {
    "widths": [32, 16, 8],
    "keep": [96, 64, 32],
    "sink": 20,
    "window": 30,
    "dense_layers": 1,
}
STAGES = [
    {**SMALL, "refresh": [1, 1, 1]},
    {
        "widths": [128, 32, 16],
        "keep": [256, 64, 32],
        "refresh": [1, 1, 1],
        "sink": 0,
        "window": 1,
        "dense_layers": 0,
    },
    {"widths": [16], "keep": [48], "refresh": [1], "sink": 16, "window": 40, "dense_layers": 0},
    {"widths": [128, 64], "keep": [128, 64], "refresh": [1, 1], "sink": 64, "window": 64, "dense_layers": 0},
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def whole_numbers(*shape: int) -> Tensor:
    """Their products are exact, so that ties of an oracle are ours."""
    return torch.randint(-8, 9, shape).float()


def cache_for(method: HiP, **sizes: Any) -> KVCache:
    states = StateRegistry()
    method.attach(MODEL, None, states)  # type: ignore[arg-type]
    return make_cache(model=MODEL, states=states, **{"num_pages": 160, "max_length": 1024, **sizes})


def select(method: HiP, cache: KVCache, slots: list[int], q: Tensor, layer: int = 1) -> RowSelection | None:
    """For rows as they stand, whose newest token was just written: q [B, Hq, D]."""
    cache.advance(slots, -1)
    cache.sync()
    rows = cache.decode_rows(slots)
    cache.advance(slots, 1)
    queries = Queries(q, torch.zeros(len(slots), dtype=torch.int64), None)
    return method.select(layer, queries, rows, cache.states)


class Oracle:
    """One row in plain Python: what each stage has left, and how much was held when the first ran."""

    def __init__(self, method: HiP) -> None:
        self.method = method
        self.last = 0
        self.left: list[list[int]] = [[] for _ in method.widths]

    def read(self, q: Tensor, k: Tensor) -> list[int]:
        """Units that are read. q [G, D], k [held, D]."""
        method, unit, held = self.method, self.method.unit, len(k)
        units = -(-held // unit)
        if held <= method.read:
            return list(range(units))
        if not self.last or held >= self.last + method.refresh[0]:
            self.last = held
        start = -(-self.last // unit) - method.nearest
        scores = (k @ q.T).amax(1).tolist()
        due = False
        for stage, width in enumerate(method.widths):
            due = due or (held - self.last) % method.refresh[stage] == 0
            if due:
                self.left[stage] = self.stage(stage, width, scores, start * unit)
        chosen = {piece // unit for piece in self.left[-1]}
        return sorted({*range(method.first), *chosen, *range(start, units)})

    def stage(self, stage: int, width: int, scores: list[float], end: int) -> list[int]:
        method = self.method
        if stage:
            wider = method.widths[stage - 1]
            pieces = [part for piece in self.left[stage - 1] for part in range(piece, piece + wider, width)]
        else:
            pieces = list(range(method.first * method.unit, end, width))
        pieces = [piece for piece in pieces if piece < end]
        score = {piece: best_met(scores, piece, min(piece + width, end), width) for piece in pieces}
        best = sorted(pieces, key=lambda piece: (-score[piece], piece))
        return sorted(best[: method.keep[stage] // width])


def keys_of(cache: KVCache, slot: int, head: int, layer: int = 1) -> Tensor:
    held = int(cache.held.host[slot, layer, head])
    pages = cache.table.host[slot, layer, head, : -(-held // PAGE_SIZE)]
    return cache.pool.k[torch.from_numpy(pages).long()].flatten(0, 1)[:held]


def heads_of(q: Tensor, head: int) -> Tensor:
    return q[head * GROUP : (head + 1) * GROUP]


@pytest.mark.parametrize("options", STAGES)
def test_units_are_those_of_the_published_funnel(options: dict[str, Any]) -> None:
    method = HiP(**options)
    cache = cache_for(method)
    long, short, ragged = (cache.admit(48) for _ in range(3))
    for slot, length in ((long, 601), (short, 250), (ragged, 500)):
        write_chunk(cache, slot, whole_numbers(LAYERS, HEADS, length, SIZE), 0)
    keep = torch.rand(LAYERS, HEADS, 500) < torch.tensor([[0.6, 0.9]]).expand(LAYERS, -1)[..., None]
    cache.compact(ragged, keep)  # each head holds tokens of its own, and not equally many
    slots, q = [long, short, ragged], whole_numbers(3, HEADS * GROUP, SIZE)
    selection = select(method, cache, slots, q)
    assert selection is not None and selection.unit == method.unit
    fractions = []
    for b, slot in enumerate(slots):
        for head in range(HEADS):
            k = keys_of(cache, slot, head)
            found = selected(selection, b, head)
            assert found == Oracle(method).read(heads_of(q[b], head), k), (slot, head)
            fractions.append(len(found) * method.unit / len(k))
    assert min(fractions) < 0.5


@pytest.mark.parametrize("everyone", [False, True], ids=["those due", "everyone"])
def test_each_stage_serves_for_its_steps_in_every_slot(
    everyone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if everyone:  # as where asking who is due would wait for a device
        monkeypatch.setattr(kvcache.hip, "rows_to_run", lambda due: torch.arange(len(due)))
    method = HiP(**SMALL, refresh=[12, 6, 2])
    cache = cache_for(method)
    slots = [cache.admit(48) for _ in range(3)]
    for slot, length in zip(slots, (300, 130, 275), strict=True):  # the second is read whole at first
        write_chunk(cache, slot, whole_numbers(LAYERS, HEADS, length, SIZE), 0)
    oracles = {(slot, head): Oracle(method) for slot in slots for head in range(HEADS)}
    changes = 0
    for step in range(26):
        live = slots if step >= 5 else slots[:2]  # the last comes later: its phase is another
        write_step(cache, live, whole_numbers(LAYERS, len(live), HEADS, SIZE))
        q = whole_numbers(len(live), HEADS * GROUP, SIZE)
        selection = select(method, cache, live, q)
        assert selection is not None
        for b, slot in enumerate(live):
            for head in range(HEADS):
                before = oracles[slot, head].left[-1]
                expected = oracles[slot, head].read(heads_of(q[b], head), keys_of(cache, slot, head))
                assert selected(selection, b, head) == expected, (step, slot, head)
                changes += before != oracles[slot, head].left[-1]
    assert 50 < changes <= 13 * 2 * 3  # every other step of three slots and two heads, and no more


def test_a_fork_goes_on_in_the_phase_of_its_original() -> None:
    method = HiP(**SMALL, refresh=[8, 8, 8])
    cache = cache_for(method)
    slot, fork = cache.admit(48), cache.admit(24)
    write_chunk(cache, slot, whole_numbers(LAYERS, HEADS, 300, SIZE), 0)
    first = select(method, cache, [slot], whole_numbers(1, HEADS * GROUP, SIZE))
    cache.fork(slot, [fork], pin=True)
    again = select(method, cache, [fork], whole_numbers(1, HEADS * GROUP, SIZE))
    assert first is not None and again is not None
    assert selected(again, 0, 0) != selected(first, 0, 0)  # the same step once more: it chooses anew
    write_step(cache, [slot, fork], whole_numbers(LAYERS, 2, HEADS, SIZE))
    both = select(method, cache, [slot, fork], whole_numbers(2, HEADS * GROUP, SIZE))
    assert both is not None
    for b, one in enumerate((first, again)):  # queries are others, choices are not
        assert set(selected(one, 0, 0)) <= set(selected(both, b, 0))


def test_a_row_that_holds_one_token_too_many_leaves_out_one_unit() -> None:
    method = HiP(widths=[32, 16], keep=[128, 64], refresh=[1, 1], sink=16, window=17, dense_layers=0)
    cache = cache_for(method)
    assert method.read == 16 * (1 + 4 + 3)
    slot = cache.admit(16)
    write_chunk(cache, slot, torch.randn(LAYERS, HEADS, 128, SIZE), 0)
    q = torch.randn(1, HEADS * GROUP, SIZE)
    assert select(method, cache, [slot], q) is None
    write_step(cache, [slot], torch.randn(LAYERS, 1, HEADS, SIZE))
    selection = select(method, cache, [slot], q)
    assert selection is not None
    assert [len(selected(selection, 0, head)) for head in range(HEADS)] == [8, 8]  # of 9


def test_the_first_layers_are_read_whole() -> None:
    method = HiP(**SMALL)
    cache = cache_for(method)
    slot = cache.admit(48)
    write_chunk(cache, slot, torch.randn(LAYERS, HEADS, 300, SIZE), 0)
    q = torch.randn(1, HEADS * GROUP, SIZE)
    assert select(method, cache, [slot], q, layer=0) is None
    assert select(method, cache, [slot], q, layer=1) is not None


def test_keys_that_are_codes_count_as_they_are_read() -> None:
    keys = torch.randn(5, PAGE_SIZE, SIZE)
    codes, scales = quantise(keys, torch.int8)
    places = torch.tensor([[3 * PAGE_SIZE + 7, 0], [319, 64]])
    read = StoredKeys(codes, scales).at(places)
    torch.testing.assert_close(read, keys.flatten(0, 1)[places], atol=0.02, rtol=0)  # a code's rounding
    assert torch.equal(read, (codes.float() * scales[..., None]).flatten(0, 1)[places])


def test_options_written_as_lists_are_the_same_plan() -> None:
    assert HiP(widths=[64, 16], keep=[512, 128], refresh=[8, 4]) == HiP((64, 16), (512, 128), (8, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": [64, 16]}, "widths, keep and refresh have 2, 3 and 3 numbers"),
        ({"widths": [64, 24, 8]}, "widths \\(24\\) must divide the 64"),
        ({"widths": [64, 32, 4]}, "widths \\(4\\) must end with 8 or 16 or 64"),
        ({"keep": [2048, 1024, 500]}, "keep \\(500\\) must be a multiple of the 8"),
        ({"keep": [2048, 512, 1024]}, "keep \\(1024\\) must be at most the 512"),
        ({"refresh": [65, 16, 8]}, "refresh \\(65\\) must be 1 to 64 steps"),
        ({"refresh": [32, 16, 0]}, "refresh \\(0\\) must be 1 to 16 steps"),
        ({"refresh": [8, 16, 8]}, "refresh \\(16\\) must be 1 to 8 steps"),
        ({"window": 0}, "window \\(0\\)"),
        ({"sink": -1}, "sink \\(-1\\)"),
        ({"dense_layers": -1}, "dense_layers \\(-1\\)"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HiP(**options)
