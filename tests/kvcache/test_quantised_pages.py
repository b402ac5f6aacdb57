"""Pages of codes: what is read back is near what came in, moves bit for bit, and costs what it says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs import native
from configs.model import PAGE_SIZE
from configs.quantised import FP8, INT8, dequantise, quantise
from kvcache.cache import CacheSize, KVCache
from kvcache.decode import RowSelection, attend_rows
from kvcache.kernels import cpu, cpu_store
from kvcache.moves import store
from kvcache.pool import PagePool, page_bytes
from kvcache.state import StateRegistry
from tests.kvcache.builders import CPU, decode, filled, make_model

DTYPES = [pytest.param(INT8, id="int8"), pytest.param(FP8, id="fp8")]
STEPS = {INT8: 0.5 / 127, FP8: 1 / 16}  # half a step of int8 against the largest; of fp8 against the element


def quantised_cache(dtype: torch.dtype = INT8, *, num_pages: int = 64, head_dim: int = 4) -> KVCache:
    return KVCache(
        make_model(head_dim=head_dim),
        CacheSize(num_pages, num_slots=4, max_length=448),
        dtype=torch.float32,
        device=CPU,
        states=StateRegistry(),
        page_dtype=dtype,
    )


def meant(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantise(*quantise(x, dtype), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_comes_back_within_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(50, 64) * torch.logspace(-6, 4, 50)[:, None]
    error = (meant(x, dtype) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    bound = largest if dtype == INT8 else x.abs().clamp_min(largest / 448 * 2**-6)
    assert (error <= STEPS[dtype] * bound * 1.0001).all()
    at = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(meant(x, dtype).gather(1, at), x.gather(1, at))  # scaled to fit it exactly


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_round_ties_go_to_even(dtype: torch.dtype) -> None:
    assert torch.equal(meant(torch.zeros(3, 8), dtype), torch.zeros(3, 8))
    assert meant(torch.full((1, 4), 1e-42), dtype).isfinite().all()  # less than a float can scale
    codes, _ = quantise(torch.tensor([[127.0, 2.5, 3.5, -2.5, -0.5]]), INT8)
    assert codes.tolist() == [[127, 2, 4, -2, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_as_what_its_codes_mean(dtype: torch.dtype) -> None:
    cache = quantised_cache(dtype)
    slot, k, v = filled(cache, 100)
    cache.sync()
    for layer in range(cache.num_layers):
        got = cache.view(slot, layer, 100).contiguous()
        assert torch.equal(got[0], meant(k[layer], dtype)) and torch.equal(got[1], meant(v[layer], dtype))
        assert got[0].dtype == torch.float32


def test_appending_changes_nothing_that_is_there() -> None:
    cache = quantised_cache()
    slot, k, _ = filled(cache, 70, pages=12)
    before = [tokens.clone() for tokens in cache.pool.by_token]
    new = 1000 * torch.randn(2, 1, 2, 4)  # much larger than all before
    decode(cache, [slot], new, new)
    changed = [
        (now != then).reshape(-1, PAGE_SIZE, now[0, 0].numel()).any(-1)
        for now, then in zip(cache.pool.by_token, before, strict=True)
    ]
    assert all(int(places.sum()) <= cache.num_rows for places in changed)
    got = cache.view(slot, 0, 71).contiguous()[0]
    assert torch.equal(got[:, :70], meant(k[0], INT8)) and torch.equal(got[:, 70], meant(new[0, 0], INT8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compaction_and_forks_move_codes_bit_for_bit(dtype: torch.dtype) -> None:
    cache = quantised_cache(dtype)
    slot, k, v = filled(cache, 150, pages=24)
    keep = torch.rand(cache.num_layers, 2, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    cache.compact(slot, keep)
    fork = cache.admit(24)
    cache.fork(slot, [fork], pin=False)
    cache.sync()
    for layer in range(cache.num_layers):
        for of in (slot, fork):
            view = cache.view(of, layer, 150)
            got_k, got_v = view.contiguous()
            for head in range(2):
                kept = keep[layer, head]
                count = int(kept.sum())
                assert torch.equal(got_k[head, :count], meant(k[layer, head, kept], dtype))
                assert torch.equal(got_v[head, :count], meant(v[layer, head, kept], dtype))
    cache.check()


def test_a_page_carries_its_scales_and_state_and_counts_them() -> None:
    states = StateRegistry()
    states.page_state("sums", (3,))
    cache = KVCache(
        make_model(head_dim=64),
        CacheSize(8, 1, 64),
        dtype=torch.bfloat16,
        device=CPU,
        states=states,
        page_dtype=INT8,
    )
    assert sum(tensor[0].numel() * tensor.itemsize for tensor in cache.pool.carried) == cache.pool.page_bytes
    assert page_bytes(64, INT8, StateRegistry()) == 2 * 64 * (64 + 4)  # 0.53 of bfloat16
    assert len(cache.pool.carried) == 5


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_stores_what_the_twin_stores(dtype: torch.dtype, tokens: torch.dtype) -> None:
    """Codes and scales, bit for bit: strided, on the edges between codes, subnormal and zero."""
    generator = torch.Generator().manual_seed(0)
    pools = [PagePool(5, 20, dtype=dtype, device=CPU, states=StateRegistry()) for _ in range(2)]
    packed = torch.randn(100, 3, 40, generator=generator) * torch.logspace(-7, 4, 100)[:, None, None]
    packed[0] = 0
    packed[1, :, 1:] = torch.arange(39) / 2 - 10
    packed[1, :, 0] = packed[1, :, 20] = 127 if dtype == INT8 else 448
    packed[2, :, 1:] = (torch.arange(39) - 20) * 2**-10  # between codes of fp8 without a leading one
    packed[2, :, 0] = packed[2, :, 20] = 448
    k, v = (x.transpose(0, 1).to(tokens) for x in packed.split(20, dim=2))  # [3, 100, D]
    destinations = torch.randperm(320, generator=generator)[:300].view(100, 3).T
    cpu_store.store(pools[0], k, v, destinations)
    store(pools[1], k, v, destinations)
    for got, wanted in zip(pools[0].by_token, pools[1].by_token, strict=True):
        assert torch.equal(got, wanted)


Attend = Callable[..., Tensor]


def kernels() -> list[Attend]:
    return [attend_rows, *([cpu.attend_rows] if cpu.is_available() else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 20])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_decode_reads_codes_as_what_they_mean(dtype: torch.dtype, head_dim: int, group: int) -> None:
    """Rows of 0, 1, 63, 64, 65 and 333 tokens, whole and by units of 16; unwritten tokens are poisoned."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[0, 1], [63, 64], [65, 333]], dtype=torch.int32)
    pages = torch.randperm(36, generator=generator).int().view(3, 2, 6)
    k, v = torch.randn(2, 36, PAGE_SIZE, head_dim, generator=generator)
    (k, k_scales), (v, v_scales) = quantise(k, dtype), quantise(v, dtype)
    place = torch.arange(PAGE_SIZE)
    for b in range(3):
        for head in range(2):
            for at, page in enumerate(pages[b, head].tolist()):
                unwritten = at * PAGE_SIZE + place >= lengths[b, head]
                k_scales[page, unwritten] = v_scales[page, unwritten] = float("nan")
    q = torch.randn(3, 2 * group, head_dim, generator=generator)
    ids = torch.arange(6, dtype=torch.int32).mul(4).expand(3, 2, 6).contiguous()
    counts = (-(-lengths // 64)).clamp_max(6).int()
    for selection in (None, RowSelection(ids, counts, 16)):
        meant_k, meant_v = dequantise(k, k_scales, torch.float32), dequantise(v, v_scales, torch.float32)
        want = attend_rows(q, meant_k, meant_v, pages, lengths, scale=0.3, max_held=333, selection=selection)
        for attend in kernels():
            got = attend(
                *(q, k, v, pages, lengths),
                scale=0.3,
                max_held=333,
                selection=selection,
                k_scales=k_scales,
                v_scales=v_scales,
            )
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)  # fp32
