"""A whole decode step on CPU: what storing and then attending give, bit for bit, in pages of every dtype."""

import pytest
import torch

from configs import native
from configs.features import NO_FEATURES, Features
from configs.quantised import FP8, INT8
from kvcache.decode import Rows, StoredKeys
from kvcache.kernels import cpu
from kvcache.kernels.cpu_step import WholeStep, serves
from kvcache.moves import store
from kvcache.pool import PagePool
from kvcache.state import StateRegistry

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, INT8, FP8]
HELD = torch.tensor(
    [[[1, 64], [65, 130], [300, 2]], [[63, 1], [128, 129], [7, 256]]]
)  # [L, B, Hkv], new ones too
SINKS = torch.linspace(-1, 1, 6)
CAPPED = Features(window=50, softcap=3.0, sinks=SINKS)


def as_kept(tokens: torch.Tensor, pool: PagePool) -> torch.Tensor:
    """torch stores tokens of the pool's dtype, or makes codes of them."""
    return tokens.bfloat16() if pool.k.dtype == torch.bfloat16 else tokens


def filled_pool(dtype: torch.dtype, head_dim: int) -> tuple[PagePool, Rows, torch.Tensor]:
    """Random tokens in all pages, rows that hold some of them, and where the newest of each row goes."""
    num_pages = HELD.numel() * 5
    pool = PagePool(num_pages, head_dim, dtype=dtype, device=CPU, states=StateRegistry())
    k, v = torch.randn(2, num_pages, 64, head_dim, generator=torch.Generator().manual_seed(0))
    store(pool, as_kept(k, pool), as_kept(v, pool), torch.arange(num_pages * 64).view(num_pages, 64))
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).view(*HELD.shape, 5).int()
    newest = HELD - 1
    at = pages.gather(3, (newest // 64).unsqueeze(3)).squeeze(3) * 64 + newest % 64
    rows = Rows(torch.arange(3), pages, HELD.int(), 300, StoredKeys(pool.k, pool.k_scales))
    return pool, rows, at.long().transpose(1, 2).contiguous().transpose(1, 2)  # of any strides


@pytest.mark.parametrize("features", [NO_FEATURES, CAPPED], ids=["plain", "window, softcap and sinks"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_storing_and_then_attending(dtype: torch.dtype, group: int, features: Features) -> None:
    if features.sinks is not None:
        features = Features(features.window, features.softcap, features.sinks[: 2 * group])
    pools = [filled_pool(dtype, 32) for _ in range(2)]
    (pool, rows, destinations), (expected_pool, _, _) = pools
    assert serves(pool)
    step = WholeStep(pool, rows, destinations)
    for layer in range(2):
        q, k, v = (torch.randn(heads, 3, 32).transpose(0, 1) for heads in (2 * group, 2, 2))
        got = step.attend(layer, q, k, v, scale=0.2, features=features)
        store(expected_pool, as_kept(k, pool), as_kept(v, pool), destinations[layer])
        expected = cpu.attend_rows(
            *(q, expected_pool.k, expected_pool.v, rows.pages[layer], rows.held[layer]),
            scale=0.2,
            max_held=300,
            features=features,
            k_scales=expected_pool.k_scales,
            v_scales=expected_pool.v_scales,
        )
        assert torch.equal(got, expected)
        for ours, theirs in zip(pool.by_token, expected_pool.by_token, strict=True):
            assert torch.equal(ours, theirs)


def test_other_head_sizes_are_not_served() -> None:
    assert not serves(PagePool(2, 20, dtype=torch.float32, device=CPU, states=StateRegistry()))
    assert not serves(PagePool(2, 64, dtype=torch.float16, device=CPU, states=StateRegistry()))
