"""What the Triton estimator promises, on the device this process has: run by test_triton_kernel.py.

Under TRITON_INTERPRET=1 it runs on CPU tensors; else it needs a GPU.
"""

import os

import pytest
import torch
from torch import Tensor

from configs.quantised import INT8
from sparse.estimator import Estimate
from sparse.estimator import estimate as twin
from sparse.kernels import triton_estimator
from sparse.kernels.triton_estimator import estimate
from tests.sparse.builders import PagedKeys, make_keys, make_qkv

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SCALE = 0.25
# absolute and relative, against fp64 over the same inputs; sums of weights never leave fp32
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def run(q: Tensor, first: int, keys: PagedKeys) -> Estimate:
    tensors = (keys.k_pool, keys.v_pool, keys.pages, keys.k_scales, keys.v_scales)
    moved = PagedKeys(keys.num_tokens, *(None if x is None else x.to(DEVICE) for x in tensors))
    got = estimate(q.to(DEVICE), first, moved, scale=SCALE)
    assert got.out.dtype == q.dtype and got.lse.dtype == got.columns.dtype == torch.float32
    return Estimate(*(x.cpu() for x in (got.columns, got.diagonals, got.out, got.lse)))


def expect(got: Estimate, q: Tensor, first: int, keys: PagedKeys) -> None:
    exact = PagedKeys(keys.num_tokens, keys.k_pool.double(), keys.v_pool.double(), keys.pages)
    want = twin(q.double(), first, exact, scale=SCALE)
    for name in ("columns", "diagonals", "lse"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name).double(), atol=2e-5, rtol=2e-5
        )
    tolerance = TOLERANCES[q.dtype]
    torch.testing.assert_close(got.out.double(), want.out, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("first", "num_rows", "num_heads", "num_kv_heads", "processors"),
    [
        (0, 1, 2, 2, 1),
        (0, 64, 2, 1, 1),
        (1, 63, 2, 1, 40),
        (36, 64, 3, 1, 1),
        (63, 2, 2, 2, 40),
        (200, 17, 2, 1, 40),
        (192, 64, 2, 1, 2),
    ],
)
def test_sums_out_and_lse_are_those_of_the_twin(
    first: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_estimator, "num_processors", lambda device: processors)
    q, k, v = make_qkv(first, num_rows, num_heads, num_kv_heads)
    keys = make_keys(k, v)
    expect(run(q, first, keys), q, first, keys)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (256, torch.bfloat16)]
)
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make_qkv(100, 50, 2, 1, head_dim))
    keys = make_keys(k, v)
    expect(run(q, 100, keys), q, 100, keys)


def test_dropped_pages_get_no_weight_and_rows_without_keys_none_at_all() -> None:
    q, k, v = make_qkv(100, 64, 2, 2)
    keys = make_keys(k, v)
    keys.pages[0, 1], keys.pages[1] = -1, -1
    got = run(q, 100, keys)
    expect(got, q, 100, keys)
    assert torch.equal(got.columns[1], torch.zeros(164))
    assert torch.equal(got.diagonals[1], torch.zeros(164))
    assert torch.equal(got.out[1], torch.zeros(64, 16))


def test_large_scores_neither_overflow_nor_leak_into_the_future() -> None:
    q, k, v = make_qkv(10, 30, 2, 1)
    q, k = 60 * q, 60 * k  # scores in the tens of thousands: a key after a row may beat all before it
    got = run(q, 10, make_keys(k, v))
    want = twin(q.double(), 10, make_keys(k.double(), v.double()), scale=SCALE)
    # fp32 scores of 1e4 are +-1e-3
    torch.testing.assert_close(got.columns.double(), want.columns, atol=5e-2, rtol=0)
    torch.testing.assert_close(got.diagonals.double(), want.diagonals, atol=5e-2, rtol=0)


def test_the_same_rows_give_the_same_bits_in_any_strides() -> None:
    q, k, v = make_qkv(70, 64, 2, 1)
    keys = make_keys(k, v)
    want = run(q, 70, keys)
    for strided in (q.transpose(0, 1).contiguous().transpose(0, 1), q.mT.contiguous().mT):
        got = run(strided, 70, keys)
        assert torch.equal(got.columns, want.columns) and torch.equal(got.diagonals, want.diagonals)
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_codes_are_read_as_what_they_mean() -> None:
    q, k, v = make_qkv(170, 20, 4, 2)
    codes = make_keys(k, v).quantised(INT8)
    expect(run(q, 170, codes), q, 170, make_keys(*codes.contiguous()))
