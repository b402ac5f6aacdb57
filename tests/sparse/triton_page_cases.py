"""What the Triton scores of pages promise, on the device this process has: run by test_triton_kernel.py.

Under TRITON_INTERPRET=1 it runs on CPU tensors; else it needs a GPU.
"""

import os

import pytest
import torch
from torch import Tensor

from configs.quantised import INT8
from engine.rope import Rotation
from sparse.antidiagonals import antidiagonal_mass
from sparse.kernels import triton_antidiagonals, triton_energy, triton_means, triton_pooled
from sparse.page_rules import visible_pages
from sparse.page_scores import block_pages, log_energy, mean_pages, pool_pages
from tests.sparse.builders import PagedKeys, make_chunk, make_keys, make_qkv

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SCALE = 0.25
# absolute and relative, against fp64 over the same inputs: the kernel rounds means to the dtype of queries
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def on_device(keys: PagedKeys) -> PagedKeys:
    tensors = (keys.k_pool, keys.v_pool, keys.pages, keys.k_scales, keys.v_scales)
    return PagedKeys(keys.num_tokens, *(None if x is None else x.to(DEVICE) for x in tensors))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "dtype"),
    [(1, 16, torch.float32), (130, 80, torch.float16), (128, 64, torch.bfloat16)],
)
def test_means_are_over_the_tokens_there_are(
    values: bool, num_tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    _, k, v = (x.to(dtype) for x in make_qkv(0, num_tokens, 2, 2, head_dim))
    keys = make_keys(k, v)
    got = triton_means.mean_pages(on_device(keys), num_tokens, values=values).cpu()
    assert got.dtype == torch.float32
    exact = PagedKeys(num_tokens, keys.k_pool.double(), keys.v_pool.double(), keys.pages)
    want = mean_pages(exact, num_tokens, values=values)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)  # summed in fp32


def test_means_of_codes_are_those_of_what_they_mean_and_dropped_pages_have_none() -> None:
    _, k, v = make_qkv(0, 150, 2, 2)
    codes = make_keys(k, v).quantised(INT8)
    codes.pages[1, 1] = -1
    got = triton_means.mean_pages(on_device(codes), 150).cpu()
    want = mean_pages(codes, 150)
    want[1, 1] = 0
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def make_rotation(size: int, interleaved: bool = False) -> Rotation:
    return Rotation((1e4 ** (-torch.arange(0, size, 2) / size)).to(DEVICE), 1.2, interleaved)


@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "dtype", "rotation"),
    [
        (1, 16, torch.float32, make_rotation(16)),
        (63, 16, torch.float32, None),
        (64, 80, torch.float16, make_rotation(40)),
        (65, 64, torch.bfloat16, make_rotation(64, interleaved=True)),
        (330, 16, torch.float32, make_rotation(8, interleaved=True)),
    ],
)
def test_pooled_keys_are_those_of_the_twin(
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    rotation: Rotation | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_pooled, "ANGLES", 2 * 64 * 8)  # of 16 dimensions, two pages a launch
    k, v = (x.to(dtype) for x in make_qkv(0, num_tokens, 2, 2, head_dim)[1:])
    keys = on_device(make_keys(k, v))
    got = triton_pooled.pool_pages(keys, num_tokens, rotation)
    assert got.dtype == torch.float32
    want = pool_pages(keys, num_tokens, rotation)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)  # turned and summed in fp32


def test_pooled_keys_of_codes_are_those_of_what_they_mean_and_of_dropped_pages_zeros() -> None:
    _, k, v = make_qkv(0, 150, 2, 2)
    codes = on_device(make_keys(k, v).quantised(INT8))
    codes.pages[1, 1] = -1
    rotation = make_rotation(16)
    want = pool_pages(codes, 150, rotation)
    want[1, 1] = 0
    torch.testing.assert_close(triton_pooled.pool_pages(codes, 150, rotation), want, atol=1e-6, rtol=1e-5)


def expect_energy(q: Tensor, mean_k: Tensor, start: int) -> None:
    chunk = make_chunk(start, q.shape[1])
    got = triton_energy.log_energy(q.to(DEVICE), mean_k.to(DEVICE), chunk, scale=SCALE).cpu()
    want = log_energy(q.double(), mean_k.double(), chunk, scale=SCALE)
    seen = visible_pages(block_pages(chunk, q.device), mean_k.shape[1]).expand(want.shape)
    tolerance = TOLERANCES[q.dtype]
    torch.testing.assert_close(got[seen].double(), want[seen], atol=tolerance, rtol=tolerance)
    assert (got[~seen] == float("-inf")).all()


@pytest.mark.parametrize(
    ("start", "length", "num_heads", "num_kv_heads", "head_dim", "dtype"),
    [
        (0, 1, 2, 2, 16, torch.float32),
        (100, 130, 6, 2, 16, torch.float32),
        (128, 64, 3, 1, 80, torch.float16),
        (63, 66, 4, 1, 64, torch.bfloat16),
    ],
)
def test_energy_is_that_of_the_twin(
    start: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = make_qkv(start, length, num_heads, num_kv_heads, head_dim)
    expect_energy(q.to(dtype), mean_pages(make_keys(k, v), start + length), start)


def test_energy_of_many_pages_in_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_energy, "BLOCK_P", 16)
    q = make_qkv(1000, 100, 2, 1)[0]  # its first block sees one tile of two
    mean_k = torch.randn(1, 18, 16, generator=torch.Generator().manual_seed(1))
    for strided in (q, q.transpose(0, 1).contiguous().transpose(0, 1), q.mT.contiguous().mT):
        expect_energy(strided, mean_k, 1000)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v = make_qkv(64, 64, 2, 1)
    chunk = make_chunk(64, 64)
    mean_k = mean_pages(make_keys(1000 * k, v), 128)
    got = triton_energy.log_energy(q.to(DEVICE), mean_k.to(DEVICE), chunk, scale=SCALE).cpu()
    want = log_energy(q.double(), mean_k.double(), chunk, scale=SCALE)
    assert want.max() > 100
    torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=1e-5)


def expect_mass(q: Tensor, keys: PagedKeys, start: int, stride: int) -> None:
    chunk = make_chunk(start, q.shape[1])
    got = triton_antidiagonals.antidiagonal_mass(
        q.to(DEVICE), on_device(keys), chunk, stride=stride, scale=SCALE
    ).cpu()
    exact = PagedKeys(keys.num_tokens, keys.k_pool.double(), keys.v_pool.double(), keys.pages)
    want = antidiagonal_mass(q.double(), exact, chunk, stride=stride, scale=SCALE)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)  # products and sums in fp32


@pytest.mark.parametrize(
    ("start", "length", "stride", "num_heads", "head_dim", "dtype"),
    [
        (0, 1, 16, 2, 16, torch.float32),
        (100, 130, 16, 6, 16, torch.float32),
        (70, 60, 4, 4, 80, torch.float16),
        (63, 66, 32, 4, 64, torch.bfloat16),
        (192, 64, 8, 2, 16, torch.float32),
    ],
)
def test_antidiagonals_are_those_of_the_twin(
    start: int, length: int, stride: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in make_qkv(start, length, num_heads, 2, head_dim))
    expect_mass(q, make_keys(k, v), start, stride)


def test_antidiagonals_of_pieces_dropped_pages_and_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_antidiagonals, "HELD_ELEMS", 1)  # every query block a launch
    q, k, v = make_qkv(200, 100, 2, 1)
    keys = make_keys(k, v)
    keys.pages[0, 1] = -1
    expect_mass(q.transpose(0, 1).contiguous().transpose(0, 1), keys, 200, 16)
    expect_mass(q.mT.contiguous().mT, keys, 200, 16)


def test_antidiagonals_of_codes_are_those_of_what_they_mean() -> None:
    q, k, v = make_qkv(100, 40, 4, 2)
    codes, chunk = make_keys(k, v).quantised(INT8), make_chunk(100, 40)
    got = triton_antidiagonals.antidiagonal_mass(
        q.to(DEVICE), on_device(codes), chunk, stride=16, scale=SCALE
    ).cpu()
    want = antidiagonal_mass(q, codes, chunk, stride=16, scale=SCALE)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)
