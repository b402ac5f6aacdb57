"""Attention over codes is attention over what they mean, in torch and in C++, dense and sparse."""

from dataclasses import replace

import pytest
import torch

from configs import native
from configs.bf16_products import Bf16Products
from configs.features import NO_FEATURES, Features
from configs.quantised import FP8, INT8
from sparse.attention import Attend
from sparse.attention import attend as attend_in_torch
from sparse.estimator import estimate
from sparse.kernels import cpu
from sparse.page_scores import key_pages
from sparse.selection import dense
from tests.reference import attention, causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection, selected_mask

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
KERNELS = [
    pytest.param(attend_in_torch, id="torch"),
    pytest.param(cpu.attend, id="cpp", marks=needs_compiler),
]
SCALE = 0.25
DTYPES = [pytest.param(INT8, id="int8"), pytest.param(FP8, id="fp8")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (63, 65), (250, 70), (1000, 129)])
def test_codes_are_read_as_what_they_mean(
    attend: Attend, dtype: torch.dtype, start: int, length: int
) -> None:
    """Every part and head axis, by the formula in fp64; dropped and unwritten pages are poisoned."""
    q, k, v = make_qkv(start, length, 6, 2, 20)
    keys, chunk = make_keys(k, v).quantised(dtype), make_chunk(start, length)
    k, v = keys.contiguous()
    for num_lists, query_block, unit in ((None, 64, None), (1, 64, 16), (2, 128, 8), (6, 64, 1)):
        selection, mask = dense(q.device), causal(start, length)[None]
        if num_lists is not None:
            selection = random_selection(chunk, num_lists, query_block, unit)
            mask = selected_mask(selection, chunk).repeat_interleave(6 // num_lists, 0)
        got = attend(q, keys, chunk, selection, scale=SCALE)
        out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
        torch.testing.assert_close(got.out.double(), out, atol=2e-5, rtol=1e-5)  # fp32
        torch.testing.assert_close(got.lse.double(), lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("features", [Features(window=100), Features(softcap=3.0), NO_FEATURES])
def test_a_dropped_page_of_codes_is_not_read(attend: Attend, features: Features) -> None:
    q, k, v = make_qkv(250, 70, 4, 2)
    keys = make_keys(k, v)
    keys.pages[0, 3] = -1  # within the window of some rows
    codes = keys.quantised(INT8)
    k, v = codes.contiguous()
    mask = causal(250, 70).expand(4, -1, -1).clone()
    mask[:2, :, 192:256] = False
    got = attend(q, codes, make_chunk(250, 70), dense(q.device), scale=SCALE, features=features)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE, features)
    torch.testing.assert_close(got.out.double(), out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), lse, atol=2e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("products", Bf16Products)
def test_bf16_queries_read_codes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, products: Bf16Products
) -> None:
    """Where the processor multiplies bf16, codes are widened to that; here its products are spelled out."""
    if products:
        kernels = native.load_library(cpu.SOURCE, "-DFARSPAN_LANES=16", "-DFARSPAN_BRGEMM_BY_LOOPS")
        monkeypatch.setattr(cpu, "library", lambda source: kernels)
    monkeypatch.setattr(cpu, "bf16_products", lambda: products)
    q, k, v = make_qkv(250, 70, 6, 2)
    q, keys, chunk = q.bfloat16(), make_keys(k, v).quantised(dtype), make_chunk(250, 70)
    k, v = keys.contiguous()
    selection = random_selection(chunk, 2, 64, 8)
    got = cpu.attend(q, keys, chunk, selection, scale=SCALE)
    mask = selected_mask(selection, chunk).repeat_interleave(3, 0)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=3e-2, rtol=1e-2)  # bf16
    atol = 3e-2 if products else 2e-5
    torch.testing.assert_close(got.lse.double(), lse, atol=atol, rtol=atol)


def test_what_scores_keys_sees_what_codes_mean() -> None:
    q, k, v = make_qkv(100, 90, 4, 2)
    codes = make_keys(k, v).quantised(INT8)
    meaning = make_keys(*codes.contiguous())
    assert torch.equal(key_pages(codes, 190), key_pages(meaning, 190))
    got, want = (estimate(q[:, -20:], 170, keys, scale=SCALE) for keys in (codes, meaning))
    assert torch.equal(got.columns, want.columns) and torch.equal(got.out, want.out)


@needs_compiler
def test_codes_without_scales_are_refused() -> None:
    q, k, v = make_qkv(10, 10, 4, 2)
    codes = replace(make_keys(k, v).quantised(INT8), k_scales=None)
    with pytest.raises(AssertionError, match="int8"):
        cpu.attend(q, codes, make_chunk(10, 10), dense(q.device), scale=SCALE)
