"""The last-window estimator equals the sums that its definition names, computed one cell at a time."""

import pytest
import torch
from torch import Tensor

from sparse.estimator import estimate
from tests.reference import attention, causal
from tests.sparse.builders import make_keys, make_qkv

SCALE = 0.25


def probabilities(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Softmax of the rows over every causal key: [Hq, R, N] in fp64."""
    k = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = SCALE * q.double() @ k.mT
    return scores.masked_fill(~causal(first, q.shape[1]), float("-inf")).softmax(-1)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 100, 127, 1000])
def test_sums_equal_explicit_loops(num_tokens: int) -> None:
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


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_out_and_lse_are_the_dense_ones(num_heads: int, num_kv_heads: int) -> None:
    q, k, v = make_qkv(130, 64, num_heads, num_kv_heads)
    got = estimate(q, 130, make_keys(k, v), scale=SCALE)
    out, lse = attention(q.double(), k.double(), v.double(), causal(130, 64), SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)  # fp32
    torch.testing.assert_close(got.lse.double(), lse, atol=1e-5, rtol=1e-5)


def test_large_scores_neither_overflow_nor_leak_into_the_future() -> None:
    q, k, v = make_qkv(10, 30, 2, 1)
    q, k = 60 * q, 60 * k  # scores in the tens of thousands: a key after a row may beat all before it
    got = estimate(q, 10, make_keys(k, v), scale=SCALE)
    p = probabilities(q, k, 10)
    assert got.columns.isfinite().all() and got.diagonals.isfinite().all()
    torch.testing.assert_close(
        got.columns.double(), p.sum(1), atol=5e-2, rtol=0
    )  # fp32 scores of 1e4 are +-1e-3


def test_dropped_pages_get_no_weight() -> None:
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
