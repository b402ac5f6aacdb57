"""What the Triton kernels that fill and compact pages promise: run by test_triton_kernels.py.

Under TRITON_INTERPRET=1 they run on CPU tensors; else they need a GPU. Copies are exact in every dtype.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.quantised import FP8, INT8
from kvcache import compaction
from kvcache.kernels.triton_compact import move_kept
from kvcache.kernels.triton_store import store
from kvcache.moves import store as store_in_torch
from kvcache.pool import PagePool, pages_for
from kvcache.state import StateRegistry

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def make_pool(num_pages: int, head_dim: int, dtype: torch.dtype = torch.float32) -> PagePool:
    pool = PagePool(num_pages, head_dim, dtype=dtype, device=DEVICE, states=StateRegistry())
    generator = torch.Generator().manual_seed(1)
    for tensor in pool.by_token:
        tensor.copy_(30 * torch.randn(tensor.shape, generator=generator))
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_tokens_go_where_they_are_sent_and_nothing_else_changes(head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool = make_pool(5, head_dim, dtype)
    wanted = [x.clone().flatten(0, 1) for x in (pool.k, pool.v)]
    packed = torch.randn(7, 3, 2 * head_dim, device=DEVICE).to(dtype)  # [tokens, heads, k and v side by side]
    k, v = (x.transpose(0, 1) for x in packed.split(head_dim, dim=2))  # [3, 7, D], no axis in its place
    destinations = torch.randperm(5 * 64, device=DEVICE)[:21].view(3, 7)
    store(pool, k, v, destinations)
    for tensor, new, expected in zip((pool.k, pool.v), (k, v), wanted, strict=True):
        expected[destinations] = new
        assert torch.equal(tensor.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_codes_and_scales_are_those_of_the_twin(head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pools = [PagePool(5, head_dim, dtype=INT8, device=DEVICE, states=StateRegistry()) for _ in range(2)]
    k, v = (torch.randn(3, 7, head_dim, device=DEVICE).to(dtype) for _ in range(2))
    k[0, 0] = 0  # has no largest element
    v[0, :, :2] = 127 / 2  # ties
    v[0, :, 2:] = 127
    destinations = torch.randperm(5 * 64, device=DEVICE)[:21].view(3, 7)
    store(pools[0], k, v, destinations)
    store_in_torch(pools[1], k, v, destinations)
    for got, wanted in zip(pools[0].by_token, pools[1].by_token, strict=True):
        assert torch.equal(got, wanted)


def test_any_strides_of_tokens_and_destinations_are_read() -> None:
    torch.manual_seed(0)
    for k in (torch.randn(16, 5, 2).permute(2, 1, 0), torch.randn(1, 5, 16).expand(2, 5, 16)):
        pool = make_pool(3, 16)
        destinations = torch.randperm(3 * 64)[:10].view(5, 2).T
        store(pool, k.to(DEVICE), -k.to(DEVICE), destinations.to(DEVICE))
        assert torch.equal(pool.k.cpu().flatten(0, 1)[destinations], k)
        assert torch.equal(pool.v.cpu().flatten(0, 1)[destinations], -k)


def test_no_token_is_no_work() -> None:
    pool = make_pool(1, 16)
    before = pool.k.clone()
    nothing = torch.empty(2, 0, 16, device=DEVICE)
    store(pool, nothing, nothing, torch.empty(2, 0, dtype=torch.int64, device=DEVICE))
    assert torch.equal(pool.k, before)


def test_tokens_are_stored_past_two_billion_elements() -> None:
    num_pages = 2**31 // (64 * 128) + 8
    pool = make_pool(1, 128, torch.float16)
    # untouched memory costs nothing
    pool.k = pool.v = torch.empty(num_pages, 64, 128, dtype=torch.float16, device=DEVICE)
    tokens = torch.randn(1, 2, 128, device=DEVICE).half()
    destinations = torch.tensor([[num_pages * 64 - 1, num_pages * 64 - 70]], device=DEVICE)
    store(pool, tokens, tokens, destinations)
    assert torch.equal(pool.k.flatten(0, 1)[destinations], tokens)


KEPT = {
    "some of everything": lambda n: torch.rand(3, n) < torch.tensor([[0.1], [0.5], [0.9]]),
    "rows that keep nothing and all": lambda n: torch.tensor([[False], [True], [False]]).expand(3, n).clone(),
    "only the last token": lambda n: (torch.arange(n) == n - 1).expand(3, n).clone(),
    "nothing at all": lambda n: torch.zeros(3, n, dtype=torch.bool),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize(
    ("length", "dtype"), [(200, torch.float32), (256, torch.float32), (200, INT8), (200, FP8)]
)
def test_compaction_moves_what_the_twin_moves(
    kept: str, num_shared: int, length: int, dtype: torch.dtype
) -> None:
    """Shared pages make new pages overlap old ones out of order."""
    torch.manual_seed(4)
    num_blocks = pages_for(length)
    pools = [make_pool(3 * num_blocks * 2, 16, dtype) for _ in range(2)]
    keep = KEPT[kept](length)
    counts = keep.sum(1, dtype=torch.int32)
    results: list[tuple[Tensor, ...]] = []
    for pool in pools:
        old = pool.allocate(3 * num_blocks).reshape(3, num_blocks)
        pool.retain(old[:, :num_shared].ravel())
        new, _ = compaction.own_pages(pool, old, counts.numpy())
        ids = torch.full((3, int(counts.max())), -1, dtype=torch.int32, device=DEVICE)
        tensors = [x.to(DEVICE) for x in (keep, counts, torch.from_numpy(old), torch.from_numpy(new))]
        if pool is pools[0]:
            compaction.move_kept(pool, *tensors, ids)
        else:
            move_kept(pool, *tensors, ids)
        results.append((*pool.by_token, ids))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert torch.equal(got, wanted)
    before = make_pool(3 * num_blocks * 2, 16, dtype).by_token[0]
    untouched = np.setdiff1d(np.arange(before.shape[0]), new)
    assert torch.equal(pools[1].by_token[0][untouched], before[untouched])
