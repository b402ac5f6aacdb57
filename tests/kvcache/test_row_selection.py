"""Decode over a selection reads the units that are named, and nothing else, in torch and in C++."""

import math

import pytest
import torch
from torch import Tensor

from configs import native
from configs.features import Features
from configs.model import PAGE_SIZE
from engine.kernels import AttendRows
from kvcache.decode import RowSelection
from kvcache.decode import attend_rows as attend_in_torch
from kvcache.kernels import cpu
from kvcache.pool import pages_for
from tests.kvcache.test_decode import make_rows
from tests.reference import attention

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
KERNELS = [
    pytest.param(attend_in_torch, id="torch"),
    pytest.param(cpu.attend_rows, id="cpp", marks=needs_compiler),
]
EDGES = [[0, 1], [15, 16], [17, 63], [64, 65], [330, 1000]]  # tokens held by [sequence][KV head]
UNITS = pytest.mark.parametrize("unit", [16, 64])
FEATURES = {
    "plain": Features(),
    "softcap and sinks": Features(None, 2.0, torch.tensor([-1.0, 0.0, 2.0, 30.0, -40.0, 5.0])),
}

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def selection_of(read: Tensor, unit: int) -> RowSelection:
    """From bool [B, Hkv, U]. What does not count is garbage that no row could hold."""
    counts = read.sum(-1, dtype=torch.int32)
    ids = torch.full((*counts.shape, int(counts.max())), 1 << 20, dtype=torch.int32)
    for b, h, unit_id in read.nonzero().tolist():
        ids[b, h, int(read[b, h, :unit_id].sum())] = unit_id
    return RowSelection(ids, counts, unit)


def some_units(held: Tensor, unit: int) -> Tensor:
    """bool [B, Hkv, U] of units that hold something: about half; the newest in every other row."""
    units = -(-held // unit)  # [B, Hkv]
    place = torch.arange(int(units.max()))
    newest = place == units.unsqueeze(-1) - 1
    wanted = torch.rand(*held.shape, len(place), generator=torch.Generator().manual_seed(5)) < 0.5
    wanted = torch.where(newest, torch.arange(held.shape[1])[:, None] % 2 == 1, wanted)
    return wanted & (place < units.unsqueeze(-1))


def poisoned(rows: Rows, read: Tensor, unit: int) -> Rows:
    """The same rows, NaN in all that is not read."""
    q, k, v, pages, held = rows
    k, v = k.clone(), v.clone()
    for b in range(held.shape[0]):
        for h in range(held.shape[1]):
            for unit_id in range(pages_for(int(held[b, h])) * PAGE_SIZE // unit):
                if unit_id >= read.shape[2] or not read[b, h, unit_id]:
                    page, first = pages[b, h, unit_id * unit // PAGE_SIZE], unit_id * unit % PAGE_SIZE
                    k[page, first : first + unit] = v[page, first : first + unit] = math.nan
    return q, k, v, pages, held


def expected(rows: Rows, read: Tensor, unit: int, features: Features, scale: float = 0.25) -> Tensor:
    """One row at a time, in fp64."""
    q, k_pool, v_pool, pages, held = rows
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // held.shape[1]
    for b in range(held.shape[0]):
        for h in range(held.shape[1]):
            length, heads = int(held[b, h]), slice(h * group, (h + 1) * group)
            row = pages[b, h, : pages_for(length)].long()
            tokens = read[b, h].repeat_interleave(unit)[:length]
            k, v = (pool[row].flatten(0, 1)[None, :length][:, tokens].double() for pool in (k_pool, v_pool))
            sinks = None if features.sinks is None else features.sinks[heads].cpu()
            own = Features(None, features.softcap, sinks)
            if tokens.any():
                everything = torch.ones(1, k.shape[1], dtype=torch.bool)
                out[b, heads] = attention(q[b, heads, None].double(), k, v, everything, scale, own)[0][:, 0]
    return out


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@UNITS
def test_exactly_the_named_units_are_read(
    attend: AttendRows, name: str, dtype: torch.dtype, unit: int
) -> None:
    rows = make_rows(EDGES, 3, 16, poison=math.nan)
    read = some_units(rows[4], unit)
    q, k, v, pages, held = poisoned(rows, read, unit)
    rows = (q, k.to(dtype), v.to(dtype), pages, held)
    selection = selection_of(read, unit)
    out = attend(*rows, scale=0.25, max_held=1000, features=FEATURES[name], selection=selection)
    wanted = expected(rows, read, unit, FEATURES[name])
    torch.testing.assert_close(out.double(), wanted, atol=5e-6, rtol=0)  # computed in fp32


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@UNITS
def test_naming_everything_equals_full_bit_for_bit(dtype: torch.dtype, unit: int) -> None:
    q, k, v, pages, held = make_rows([*EDGES, [255, 257]], 4, 64, poison=math.nan)
    k, v = k.to(dtype), v.to(dtype)
    units = -(-held // unit)
    everything = torch.arange(int(units.max())) < units.unsqueeze(-1)
    full = cpu.attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000)
    selection = selection_of(everything, unit)
    found = cpu.attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000, selection=selection)
    assert torch.equal(found, full)


@UNITS
def test_everything_read_by_torch_equals_full(unit: int) -> None:
    rows = make_rows(EDGES, 3, 16, poison=math.nan)
    units = -(-rows[4] // unit)
    everything = selection_of(torch.arange(int(units.max())) < units.unsqueeze(-1), unit)
    full = attend_in_torch(*rows, scale=0.25, max_held=1000)
    found = attend_in_torch(*rows, scale=0.25, max_held=1000, selection=everything)
    torch.testing.assert_close(found, full, atol=1e-6, rtol=0)  # fp32


@needs_compiler
def test_a_selected_row_does_not_depend_on_batch_mates_or_threads() -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, 64)
    selection = selection_of(some_units(held, 16), 16)
    together = cpu.attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000, selection=selection)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = cpu.attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000, selection=selection)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(again, together)
    for b in range(len(EDGES)):
        own = slice(b, b + 1)
        mine = RowSelection(selection.ids[own], selection.counts[own], 16)
        alone = cpu.attend_rows(
            q[own], k, v, pages[own], held[own], scale=0.125, max_held=1000, selection=mine
        )
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize("attend", KERNELS)
def test_a_row_of_which_nothing_is_read_gives_zeros(attend: AttendRows) -> None:
    rows = make_rows([[40, 70]], 3, 16, poison=math.nan)
    for ids in (torch.empty(1, 2, 0), torch.zeros(1, 2, 5)):
        nothing = RowSelection(ids.int(), torch.zeros(1, 2, dtype=torch.int32), 16)
        out = attend(*rows, scale=0.25, max_held=70, selection=nothing)
        assert out.abs().max() == 0


def test_lengths_count_the_newest_unit_as_far_as_it_is_full() -> None:
    held = torch.tensor([[0, 1], [17, 64], [65, 65]], dtype=torch.int32)
    ids = torch.tensor([[[9, 9], [0, 9]], [[0, 1], [0, 2]], [[1, 4], [1, 3]]], dtype=torch.int32)
    counts = torch.tensor([[0, 1], [2, 2], [2, 2]], dtype=torch.int32)
    assert RowSelection(ids, counts, 16).lengths(held).tolist() == [[0, 1], [17, 32], [17, 32]]


@pytest.mark.parametrize("attend", KERNELS)
def test_a_window_and_a_selection_do_not_go_together(attend: AttendRows) -> None:
    rows = make_rows([[40, 70]], 3, 16)
    selection = selection_of(torch.ones(1, 2, 2, dtype=torch.bool), 16)
    with pytest.raises(AssertionError, match="window"):
        attend(*rows, scale=0.25, max_held=70, features=Features(window=8), selection=selection)
