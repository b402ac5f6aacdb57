"""The C++ decode attention gives what the torch twin gives, whatever rows hold and whatever lies beside."""

import math

import pytest
import torch

from configs import native
from kvcache.decode import attend_rows as attend_rows_in_torch
from kvcache.kernels import cpu
from kvcache.kernels.cpu import attend_rows
from tests.kvcache.test_decode import make_rows, plain

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")

EDGES = [[0, 1], [63, 64], [65, 255], [256, 257], [1000, 3]]  # tokens held by [sequence][KV head]


def test_the_kernel_compiles_here() -> None:
    assert cpu.is_available()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_rows_of_any_length_equal_a_plain_loop(group: int, head_dim: int) -> None:
    rows = make_rows(EDGES, group, head_dim, poison=math.nan)
    out = attend_rows(*rows, scale=0.125, max_held=1000)
    torch.testing.assert_close(out.double(), plain(*rows, 0.125), atol=5e-6, rtol=0)  # fp32
    assert out[0, :group].abs().max() == 0  # the empty row


@pytest.mark.parametrize("group", [1, 3, 8])
def test_bf16_pages_are_read_without_further_rounding(group: int) -> None:
    q, k, v, pages, held = make_rows(EDGES, group, 64, poison=math.nan)
    k, v = k.bfloat16(), v.bfloat16()
    out = attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000)
    torch.testing.assert_close(out.double(), plain(q, k, v, pages, held, 0.125), atol=5e-6, rtol=0)  # fp32
    out = attend_rows(q.bfloat16(), k, v, pages, held, scale=0.125, max_held=1000)
    assert out.dtype == torch.bfloat16
    expected = plain(q.bfloat16(), k, v, pages, held, 0.125)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=1e-2)  # bf16


def test_a_row_does_not_depend_on_batch_mates_or_threads() -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, 64)
    together = attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000)
    for b in range(len(EDGES)):
        one = slice(b, b + 1)
        alone = attend_rows(q[one], k, v, pages[one], held[one], scale=0.125, max_held=1000)
        assert torch.equal(alone, together[one])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(again, together)


def test_strided_queries_and_tables_are_read_as_they_are() -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, 64)
    expected = attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([pages, pages], dim=2)[:, :, : pages.shape[2]]
    assert not strided.is_contiguous() and not wide.is_contiguous()
    assert torch.equal(attend_rows(strided, k, v, wide, held, scale=0.125, max_held=1000), expected)


def test_large_scores_neither_overflow_nor_lose_the_small_ones() -> None:
    q, k, v, pages, held = make_rows([[640]], 3, 64)
    for place in range(10):  # the maximum rises with every page
        k[pages[0, 0, place]] += place * q[0, 0]
    out = attend_rows(q, k, v, pages, held, scale=0.125, max_held=640)
    torch.testing.assert_close(out.double(), plain(q, k, v, pages, held, 0.125), atol=1e-4, rtol=0)  # fp32


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float16, 64), (torch.float64, 64), (torch.float32, 20)]
)
def test_what_the_kernel_does_not_serve_torch_does(dtype: torch.dtype, head_dim: int) -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, head_dim)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = attend_rows(q, k, v, pages, held, scale=0.125, max_held=1000)
    assert torch.equal(out, attend_rows_in_torch(q, k, v, pages, held, scale=0.125, max_held=1000))


def test_a_table_shorter_than_its_rows_is_refused() -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, 64)
    with pytest.raises(AssertionError):
        attend_rows(q, k, v, pages[:, :, :2], held, scale=0.125, max_held=1000)
