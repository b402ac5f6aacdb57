"""What the Triton descents of HiP promise, on the device this process has: run by test_triton_kernel.py.

Under TRITON_INTERPRET=1 it runs on CPU tensors; else it needs a GPU.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.quantised import INT8
from sparse.descent import Funnel
from sparse.descent import pruned_pieces as twin
from sparse.kernels import triton_descent
from tests.sparse.builders import PagedKeys, make_chunk, make_keys

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
FUNNEL = Funnel((64, 8), (256, 64), (4, 1), first=64, reach=1, num_lists=1)


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose products are exact, so that ties are the twin's."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def on_device(keys: PagedKeys) -> PagedKeys:
    tensors = (keys.k_pool, keys.v_pool, keys.pages, keys.k_scales, keys.v_scales)
    return PagedKeys(keys.num_tokens, *(None if x is None else x.to(DEVICE) for x in tensors))


def expect_the_same(
    q: Tensor, keys: PagedKeys, start: int, funnel: Funnel, dtype: torch.dtype = torch.float32
) -> None:
    """The kernel over q and keys in `dtype` finds what torch finds over them in fp32."""
    chunk = make_chunk(start, q.shape[1])
    want = twin(q, keys, chunk, funnel)
    ours = on_device(keys)
    if keys.k_scales is None:
        ours = replace(ours, k_pool=ours.k_pool.to(dtype))
    got = triton_descent.pruned_pieces(q.to(DEVICE, dtype), ours, chunk, funnel)
    assert got.dtype == torch.int32 and got.shape == want.shape
    assert torch.equal(got.cpu().long(), want)


@pytest.mark.parametrize(
    ("start", "length", "num_heads", "num_kv_heads", "head_dim", "dtype", "num_lists"),
    [
        (700, 1, 2, 2, 16, torch.float32, 1),
        (641, 63, 6, 2, 16, torch.float32, 2),
        (640, 64, 3, 1, 80, torch.float16, 1),
        (575, 65, 2, 1, 64, torch.bfloat16, 1),
    ],
)
def test_pieces_are_those_of_the_twin(
    start: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_lists: int,
) -> None:
    q = whole_numbers(num_heads, length, head_dim)
    k = whole_numbers(num_kv_heads, start + length, head_dim, seed=1)
    expect_the_same(q, make_keys(k, k), start, replace(FUNNEL, num_lists=num_lists), dtype)


@pytest.mark.parametrize(
    "funnel",
    [
        Funnel((8,), (32,), (64,), first=0, reach=0, num_lists=2),  # one query for a tile of 16
        Funnel((256, 32, 16), (512, 64, 48), (8, 16, 64), first=128, reach=2, num_lists=1),  # all go on first
    ],
)
def test_other_stages_are_those_of_the_twin(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_descent, "KEEP", 16)  # several steps of a walk
    q, k = whole_numbers(4, 100, 16), whole_numbers(2, 700, 16, seed=1)
    keys = make_keys(k, k)
    keys.pages[1, 3] = -1  # dropped
    expect_the_same(q, keys, 600, funnel)


def test_among_equal_pieces_the_lower_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_descent, "KEEP", 16)  # they equal the bar in every step of the walk
    k = whole_numbers(1, 400, 16)
    funnel = Funnel((8,), (96,), (64,), first=0, reach=0, num_lists=1)
    expect_the_same(torch.zeros(1, 70, 16), make_keys(k, k), 330, funnel)


def test_the_first_blocks_of_a_prompt_choose_from_what_there_is() -> None:
    q, k = whole_numbers(2, 140, 16), whole_numbers(1, 140, 16, seed=1)
    expect_the_same(q, make_keys(k, k), 0, Funnel((16, 8), (32, 16), (4, 1), first=0, reach=0, num_lists=1))


def test_codes_are_read_as_what_they_mean() -> None:
    q, k = whole_numbers(2, 60, 16), whole_numbers(2, 660, 16, seed=1)
    k[..., 0] = 127  # the largest code: scales are 1
    k *= 2.0 ** torch.randint(-3, 4, (2, 660, 1), generator=torch.Generator().manual_seed(2))
    expect_the_same(q, make_keys(k, k).quantised(INT8), 600, FUNNEL)
