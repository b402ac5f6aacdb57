"""The last-window estimator equals the sums that its definition names, computed one cell at a time."""

from functools import partial

import pytest
import torch
from torch import Tensor

from configs import native
from configs.quantised import FP8, INT8
from sparse.base import KeyView
from sparse.estimator import Estimator
from sparse.estimator import estimate as estimate_in_torch
from sparse.kernels import cpu_estimator
from tests.reference import attention, causal
from tests.sparse.builders import make_keys, make_qkv

SCALE = 0.25
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
KERNELS = [
    pytest.param(estimate_in_torch, id="torch"),
    pytest.param(cpu_estimator.estimate, id="cpp", marks=needs_compiler),
]
BOTH = pytest.mark.parametrize("estimate", KERNELS)
SUMS = ("columns", "diagonals", "out", "lse")
PART = 2048  # keys that a thread sums at a time: cpu_estimator.cpp


@pytest.fixture(params=[4, 16])
def other_lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what processors with other vectors run."""
    kernels = native.load_library(cpu_estimator.SOURCE, f"-DFARSPAN_LANES={request.param}")
    monkeypatch.setattr(cpu_estimator, "library", lambda source: kernels)


def probabilities(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Softmax of the rows over every causal key: [Hq, R, N] in fp64."""
    k = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = SCALE * q.double() @ k.mT
    return scores.masked_fill(~causal(first, q.shape[1]), float("-inf")).softmax(-1)


@BOTH
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 100, 127, 1000])
def test_sums_equal_explicit_loops(estimate: Estimator, num_tokens: int) -> None:
    num_rows = min(64, num_tokens)
    first = num_tokens - num_rows
    q, k, v = make_qkv(first, num_rows, 4, 2)
    got = estimate(q, first, make_keys(k, v), scale=SCALE)
    p = probabilities(q, k, first)
    columns, diagonals = ([[0.0] * num_tokens for _ in range(4)] for _ in range(2))
    for head, rows in enumerate(p.tolist()):
        for row, weights in enumerate(rows):
            for key in range(first + row + 1):
                columns[head][key] += weights[key]
                diagonals[head][first + row - key] += weights[key]
    torch.testing.assert_close(
        got.columns.double(), torch.tensor(columns).double(), atol=1e-5, rtol=1e-5
    )  # fp32
    torch.testing.assert_close(got.diagonals.double(), torch.tensor(diagonals).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.columns.sum(1), torch.full((4,), float(num_rows)))
    torch.testing.assert_close(got.diagonals.sum(1), torch.full((4,), float(num_rows)))


@BOTH
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_out_and_lse_are_the_dense_ones(estimate: Estimator, num_heads: int, num_kv_heads: int) -> None:
    q, k, v = make_qkv(130, 64, num_heads, num_kv_heads)
    got = estimate(q, 130, make_keys(k, v), scale=SCALE)
    out, lse = attention(q.double(), k.double(), v.double(), causal(130, 64), SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)  # fp32
    torch.testing.assert_close(got.lse.double(), lse, atol=1e-5, rtol=1e-5)


@BOTH
def test_large_scores_neither_overflow_nor_leak_into_the_future(estimate: Estimator) -> None:
    q, k, v = make_qkv(10, 30, 2, 1)
    q, k = 60 * q, 60 * k  # scores in the tens of thousands: a key after a row may beat all before it
    got = estimate(q, 10, make_keys(k, v), scale=SCALE)
    p = probabilities(q, k, 10)
    assert got.columns.isfinite().all() and got.diagonals.isfinite().all()
    torch.testing.assert_close(
        got.columns.double(), p.sum(1), atol=5e-2, rtol=0
    )  # fp32 scores of 1e4 are +-1e-3


@BOTH
def test_dropped_pages_get_no_weight(estimate: Estimator) -> None:
    q, k, v = make_qkv(200, 64, 4, 2)
    keys = make_keys(k, v)
    keys.pages[1, 1] = -1
    got = estimate(q, 200, keys, scale=SCALE)
    mask = causal(200, 64).expand(4, -1, -1).clone()
    mask[2:, :, 64:128] = False
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.columns[2:, 64:128], torch.zeros(2, 64))
    assert (got.columns[:2, 64:128] > 0).all()
    torch.testing.assert_close(got.diagonals.sum(1), torch.full((4,), 64.0))


@BOTH
def test_a_row_that_reads_nothing_weighs_nothing(estimate: Estimator) -> None:
    q, k, v = make_qkv(60, 10, 2, 1)
    keys = make_keys(k, v)
    keys.pages[0, 0] = -1  # all that the first four rows see
    got = estimate(q, 60, keys, scale=SCALE)
    assert got.lse[:, :4].isneginf().all() and not got.out[:, :4].any()
    torch.testing.assert_close(got.columns.sum(1), torch.full((2,), 6.0))


def expect_torch(q: Tensor, first: int, keys: KeyView, atol: float = 1e-5) -> None:
    got = cpu_estimator.estimate(q, first, keys, scale=SCALE)
    want = estimate_in_torch(q, first, keys, scale=SCALE)
    for name in SUMS:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=atol, rtol=1e-4, msg=name)


@needs_compiler
@pytest.mark.parametrize("num_tokens", [PART - 1, PART, PART + 1, PART + 63, PART + 64, 2 * PART + 100])
@pytest.mark.parametrize("num_rows", [1, 20, 64])
def test_parts_of_the_keys_add_up(num_tokens: int, num_rows: int) -> None:
    """Rows that stand in two parts, and distances that belong to both."""
    q, k, v = make_qkv(num_tokens - num_rows, num_rows, 3, 1, 20)  # a head size of no whole vectors
    expect_torch(q, num_tokens - num_rows, make_keys(k, v))


@needs_compiler
@pytest.mark.parametrize("codes", [None, INT8, FP8])
def test_pages_of_other_dtypes(codes: torch.dtype | None) -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(300, 64, 4, 2))
    keys = make_keys(k, v)
    expect_torch(q, 300, keys if codes is None else keys.quantised(codes), atol=2e-2)  # bf16


@needs_compiler
def test_other_processors_sum_the_same(other_lanes: None) -> None:
    for num_rows in (7, 64):
        q, k, v = make_qkv(PART, num_rows, 4, 2, 24)
        expect_torch(q, PART, make_keys(k, v))


@needs_compiler
def test_threads_and_strides_change_no_bit() -> None:
    q, k, v = make_qkv(PART + 200, 50, 6, 2)
    keys = make_keys(k, v)
    estimate = partial(cpu_estimator.estimate, first_position=PART + 200, keys=keys, scale=SCALE)
    want, threads = estimate(q), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        got = estimate(q.transpose(0, 1).contiguous().transpose(0, 1))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(getattr(got, name), getattr(want, name))
        for name in ("columns", "diagonals", "out", "lse")
    )


@needs_compiler
def test_other_dtypes_go_to_torch() -> None:
    q, k, v = (x.double() for x in make_qkv(70, 30, 2, 1))
    assert cpu_estimator.estimate(q, 70, make_keys(k, v), scale=SCALE).out.dtype == torch.float64
