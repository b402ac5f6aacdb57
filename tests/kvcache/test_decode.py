"""Decode attention over rows equals a plain loop, whatever the rows hold and whatever lies beside."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcache.decode
from kvcache.decode import Full, attend_rows
from kvcache.pool import pages_for

MIXED = [[0, 1], [63, 64], [65, 200]]  # tokens held by [sequence][KV head]


def make_rows(
    held: Sequence[Sequence[int]], group: int, head_dim: int, poison: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, pools, pages and held of rows in shuffled pages; what no row holds is `poison`."""
    torch.manual_seed(3)
    lengths = torch.tensor(held, dtype=torch.int32)
    batch, heads = lengths.shape
    width = pages_for(int(lengths.max())) + 1
    total = sum(pages_for(length) for row in held for length in row)
    shuffled = (torch.randperm(total) + 1).tolist()  # page 0 belongs to nobody
    pools = [torch.full((total + 1, 64, head_dim), poison) for _ in range(2)]
    pages = torch.full((batch, heads, width), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            for place in range(pages_for(held[b][h])):
                page = shuffled.pop()
                pages[b, h, place] = page
                count = min(64, held[b][h] - place * 64)
                for pool in pools:
                    pool[page, :count] = torch.randn(count, head_dim)
    q = torch.randn(batch, heads * group, head_dim)
    return q, pools[0], pools[1], pages, lengths


def plain(q: Tensor, k_pool: Tensor, v_pool: Tensor, pages: Tensor, held: Tensor, scale: float) -> Tensor:
    """One row and one query head at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // held.shape[1]
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            length = int(held[b, head // group])
            if length == 0:
                continue
            row = pages[b, head // group, : pages_for(length)].long()
            k = k_pool[row].flatten(0, 1)[:length].double()
            v = v_pool[row].flatten(0, 1)[:length].double()
            out[b, head] = (k @ q[b, head].double() * scale).softmax(0) @ v
    return out


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_rows_of_any_length_equal_a_plain_loop(group: int) -> None:
    q, k, v, pages, held = make_rows(MIXED, group, 16)
    out = attend_rows(q, k, v, pages, held, scale=0.25, max_held=200)
    torch.testing.assert_close(out.double(), plain(q, k, v, pages, held, 0.25), atol=2e-6, rtol=0)  # fp32
    assert out[0, :group].abs().max() == 0  # the empty row


@pytest.mark.parametrize("group", [1, 3])
def test_what_no_row_holds_is_never_read(group: int) -> None:
    clean = make_rows(MIXED, group, 16)
    poisoned = make_rows(MIXED, group, 16, poison=math.nan)
    expected = attend_rows(*clean, scale=0.25, max_held=200)
    out = attend_rows(*poisoned, scale=0.25, max_held=200)
    assert torch.equal(out, expected)


def test_groups_of_bounded_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [[700, 40], [699, 130], [1, 0], [64, 320]]
    rows = make_rows(held, 3, 16, poison=math.nan)
    expected = plain(*rows, 0.25)
    for elements in (1, 64 * 16 * 3, 1 << 30):
        monkeypatch.setattr(kvcache.decode, "GROUP_ELEMENTS", elements)
        out = attend_rows(*rows, scale=0.25, max_held=700)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)  # fp32


def test_one_long_row_does_not_pad_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    attend_group = kvcache.decode._attend_group

    def counting(group: kvcache.decode._Group, *rest: Any) -> Tensor:
        gathered.append(group.pages.numel())
        return attend_group(group, *rest)

    monkeypatch.setattr(kvcache.decode, "_attend_group", counting)
    rows = make_rows([[4096], *[[64]] * 15], 3, 16)
    attend_rows(*rows, scale=0.25, max_held=4096)
    assert sum(gathered) == 64 + 15 and len(gathered) == 2


def test_low_precision_pools_are_summed_in_float32() -> None:
    q, k, v, pages, held = make_rows(MIXED, 3, 16)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out = attend_rows(q, k, v, pages, held, scale=0.25, max_held=200)
    assert out.dtype == torch.bfloat16
    expected = plain(q, k, v, pages, held, 0.25)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)  # one rounding to bf16


def test_large_scores_do_not_overflow() -> None:
    q, k, v, pages, held = make_rows(MIXED, 1, 16)
    out = attend_rows(q * 1e4, k, v, pages, held, scale=1.0, max_held=200)
    assert out.isfinite().all()


def test_more_held_than_there_are_pages_is_our_mistake() -> None:
    q, k, v, pages, held = make_rows([[64]], 1, 16)
    with pytest.raises(AssertionError, match="300 tokens in 2 pages"):
        attend_rows(q, k, v, pages, held, scale=1.0, max_held=300)


def test_full_reads_all_that_is_held() -> None:
    assert Full().select(0, None, None, None) is None  # type: ignore[arg-type]
