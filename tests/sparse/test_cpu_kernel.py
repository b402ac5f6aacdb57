"""The C++ attention gives what the torch twin gives, and reads nothing else."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs import native
from configs.bf16_products import Bf16Products
from sparse.attention import Attended
from sparse.attention import attend as attend_in_torch
from sparse.kernels import cpu
from sparse.selection import ALL, ExactRows, Selection, dense, lists_from_mask
from tests.reference import attention, causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection, selected_mask

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")

SCALE = 0.25
STARTS = (0, 1, 63, 64, 1000)
LENGTHS = (1, 17, 64, 65, 129, 300)
HEADS = ((2, 2), (6, 2), (4, 1))  # G of 1, 3, 4


@pytest.fixture(params=[Bf16Products.BY_PAIRS, Bf16Products.BY_TILES])
def other_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what AVX-512 with bf16 runs: vectors of 16 lanes, and products spelled out where they must be."""
    kernels = native.load_library(cpu.SOURCE, "-DFARSPAN_LANES=16", "-DFARSPAN_BRGEMM_BY_LOOPS")
    monkeypatch.setattr(cpu, "library", lambda source: kernels)
    monkeypatch.setattr(cpu, "bf16_products", lambda: request.param)


def expect(
    got: Attended, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, atol: float = 2e-5, rtol: float = 1e-5
) -> None:
    """Equal to the reference in fp64, up to rounding; by default that of fp32."""
    mask = mask.repeat_interleave(q.shape[0] // mask.shape[0], 0)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
    assert got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), out, atol=atol, rtol=rtol)
    torch.testing.assert_close(got.lse.double(), lse, atol=atol, rtol=rtol)


def expect_everywhere(start: int, length: int, head_dim: int, dtype: torch.dtype, **tolerance: float) -> None:
    """Every head axis, query block and unit, dense and empty, against the reference."""
    chunk = make_chunk(start, length)
    for num_heads, num_kv_heads in HEADS:
        q, k, v = (x.to(dtype) for x in make_qkv(start, length, num_heads, num_kv_heads, head_dim))
        q = q * (16 / head_dim) ** 0.5  # scores as large as those of 16 dimensions
        keys = make_keys(k, v)
        got = cpu.attend(q, keys, chunk, dense(q.device), scale=SCALE)
        expect(got, q, k, v, causal(start, length)[None], **tolerance)
        for num_lists, unit in ((1, 16), (num_kv_heads, 8), (num_heads, 1)):
            for query_block, gathered in ((64, None), (64, unit), (128, unit)):
                selection = random_selection(chunk, num_lists, query_block, gathered)
                got = cpu.attend(q, keys, chunk, selection, scale=SCALE)
                expect(got, q, k, v, selected_mask(selection, chunk), **tolerance)


def test_the_kernel_compiles_here() -> None:
    assert cpu.is_available()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_part_and_axis_equals_the_reference(start: int, length: int) -> None:
    expect_everywhere(start, length, 16, torch.float32)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128, 256])
def test_every_head_size_is_served(head_dim: int) -> None:
    expect_everywhere(70, 140, head_dim, torch.float32)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("products", [Bf16Products.WIDENED, None])
def test_bf16_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, products: Bf16Products | None
) -> None:
    """Without bf16 instructions all is computed in fp32: what is left is the rounding of the output."""
    products = cpu.bf16_products() if products is None else products  # None: this processor's
    monkeypatch.setattr(cpu, "bf16_products", lambda: products)
    chunk = make_chunk(70, 140)
    q, k, v = (x.bfloat16() for x in make_qkv(70, 140, 6, 2, head_dim))
    keys, selection = make_keys(k, v), random_selection(chunk, 2, 64, 8)
    got = cpu.attend(q, keys, chunk, selection, scale=SCALE)
    mask = selected_mask(selection, chunk)
    expect(got, q, k, v, mask, atol=3e-2, rtol=1e-2)  # bf16
    lse = attention(q.double(), k.double(), v.double(), mask.repeat_interleave(3, 0), SCALE)[1]
    atol = 3e-2 if products else 2e-5
    torch.testing.assert_close(got.lse.double(), lse, atol=atol, rtol=atol)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (1, 17), (63, 65), (1000, 129), (64, 300)])
def test_a_processor_with_bf16_instructions_agrees(other_processor: None, start: int, length: int) -> None:
    expect_everywhere(start, length, 16, torch.bfloat16, atol=3e-2, rtol=3e-2)
    expect_everywhere(start, length, 80, torch.bfloat16, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("start", "length"), [(1, 17), (1000, 129)])
def test_a_processor_with_wider_vectors_agrees(other_processor: None, start: int, length: int) -> None:
    expect_everywhere(start, length, 16, torch.float32)
    expect_everywhere(start, length, 20, torch.float32)


def test_queries_and_keys_may_differ_in_dtype() -> None:
    q, k, v = make_qkv(100, 100, 4, 2)
    k, v = k.bfloat16(), v.bfloat16()
    got = cpu.attend(q, make_keys(k, v), make_chunk(100, 100), dense(q.device), scale=SCALE)
    expect(got, q, k, v, causal(100, 100)[None])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 4e-3), (torch.float64, 1e-6)])
def test_other_dtypes_are_served_by_torch(dtype: torch.dtype, atol: float) -> None:
    q, k, v = (x.to(dtype) for x in make_qkv(30, 40, 4, 2))
    got = cpu.attend(q, make_keys(k, v), make_chunk(30, 40), dense(q.device), scale=SCALE)
    expect(got, q, k, v, causal(30, 40)[None], atol=atol, rtol=atol)


def test_rows_that_select_nothing_are_zero_with_lse_of_minus_infinity() -> None:
    q, k, v = make_qkv(100, 60, 4, 2)
    selection = Selection(64, lists_from_mask(torch.zeros(2, 2, 3, dtype=torch.bool), 64))
    got = cpu.attend(q, make_keys(k, v), make_chunk(100, 60), selection, scale=SCALE)
    assert torch.equal(got.out, torch.zeros_like(q))
    assert torch.equal(got.lse, torch.full((4, 60), float("-inf")))


def test_rows_before_every_selected_key_are_empty_not_nan() -> None:
    q, k, v = make_qkv(0, 128, 2, 2)
    selection = Selection(128, lists_from_mask(torch.tensor([[[False, True]]]), 64))
    got = cpu.attend(q, make_keys(k, v), make_chunk(0, 128), selection, scale=SCALE)
    assert torch.equal(got.out[:, :64], torch.zeros(2, 64, 16))
    assert got.lse[:, :64].isneginf().all() and got.lse[:, 64:].isfinite().all()


def test_what_is_not_selected_is_not_read() -> None:
    expect_unread(torch.float32)


def test_what_is_not_selected_is_not_read_in_bf16(other_processor: None) -> None:
    expect_unread(torch.bfloat16)


def expect_unread(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make_qkv(500, 140, 4, 2))
    chunk = make_chunk(500, 140)
    selection = random_selection(chunk, 2, 64, 8, density=0.3)
    selection.pages.counts.masked_fill_(selection.pages.counts == ALL, 0)
    before = cpu.attend(q, make_keys(k, v), chunk, selection, scale=SCALE)
    read = selected_mask(selection, chunk).any(1)  # [Hkv, N]
    read[:, 448:] = True  # pages of the chunk itself: a row's own future is finite, not unread
    assert not read.all()
    poison = ~read[..., None]
    keys = make_keys(k.masked_fill(poison, float("nan")), v.masked_fill(poison, float("nan")))
    after = cpu.attend(q, keys, chunk, selection, scale=SCALE)
    assert torch.equal(before.out, after.out) and torch.equal(before.lse, after.lse)


@pytest.mark.parametrize("kind", ["dense", "lists"])
def test_no_row_feels_the_keys_after_it(kind: str) -> None:
    q, k, v = make_qkv(70, 150, 4, 2)
    chunk = make_chunk(70, 150)
    selection = dense(q.device) if kind == "dense" else random_selection(chunk, 4, 128, 16, density=0.9)
    before = cpu.attend(q, make_keys(k, v), chunk, selection, scale=SCALE)
    for future in (71, 127, 128, 191, 192, 219):
        k2, v2 = k.clone(), v.clone()
        k2[:, future] += 30  # large enough to raise every maximum
        v2[:, future] -= 5
        after = cpu.attend(q, make_keys(k2, v2), chunk, selection, scale=SCALE)
        seen = future - 70
        assert torch.equal(before.out[:, :seen], after.out[:, :seen])
        assert torch.equal(before.lse[:, :seen], after.lse[:, :seen])
        if kind == "dense":
            assert not torch.equal(before.out[:, seen], after.out[:, seen])


def test_an_answer_does_not_depend_on_chunks_or_threads() -> None:
    """Bit for bit: rows share a panel with others, but nothing of theirs."""
    q, k, v = make_qkv(0, 300, 6, 2)
    keys = make_keys(k, v)
    whole = cpu.attend(q, keys, make_chunk(0, 300), dense(q.device), scale=SCALE)
    for start, end in ((0, 64), (64, 65), (65, 202), (202, 300)):
        part = cpu.attend(q[:, start:end], keys, make_chunk(start, end - start), dense(q.device), scale=SCALE)
        assert torch.equal(part.out, whole.out[:, start:end])
        assert torch.equal(part.lse, whole.lse[:, start:end])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = cpu.attend(q, keys, make_chunk(0, 300), dense(q.device), scale=SCALE)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(again.out, whole.out)


def test_large_scores_neither_overflow_nor_lose_the_small_ones() -> None:
    """Maxima that rise page after page by more and by less than the slack, and fall."""
    q, k, v = make_qkv(0, 640, 2, 2)
    steps = torch.tensor([0.0, 2.0, 30.0, 31.0, 5.0, -400.0, 33.0, 80.0, 79.0, 0.0]).repeat_interleave(64)
    k = k + q.sign().mean(1, keepdim=True) * steps[:, None]
    got = cpu.attend(q, make_keys(k, v), make_chunk(0, 640), dense(q.device), scale=SCALE)
    twin = attend_in_torch(
        q.double(), make_keys(k.double(), v.double()), make_chunk(0, 640), dense(q.device), scale=SCALE
    )
    torch.testing.assert_close(got.out.double(), twin.out, atol=1e-4, rtol=1e-4)  # scores of hundreds in fp32
    torch.testing.assert_close(got.lse, twin.lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "lists", "all", "gathered"])
def test_dropped_pages_are_absent(kind: str) -> None:
    q, k, v = make_qkv(300, 100, 6, 2)
    chunk, keys = make_chunk(300, 100), make_keys(k, v)
    selection = dense(q.device)
    if kind != "dense":
        selection = random_selection(chunk, 1, 64, 8 if kind == "gathered" else None, density=0.7)
    if kind == "all":
        selection.pages.counts.fill_(ALL)
    mask = causal(300, 100)[None] if kind == "dense" else selected_mask(selection, chunk)
    mask = mask.expand(2, -1, -1).clone()
    for kv_head, block in ((0, 0), (0, 2), (1, 3), (1, 4)):
        page = int(keys.pages[kv_head, block])
        keys.k_pool[page] = keys.v_pool[page] = float("nan")  # someone else's by now
        keys.pages[kv_head, block] = -1
        mask[kv_head, :, block * 64 : (block + 1) * 64] = False
    expect(cpu.attend(q, keys, chunk, selection, scale=SCALE), q, k, v, mask)


@pytest.mark.parametrize("num_exact", [1, 40, 100])
def test_exact_rows_replace_the_last_rows(num_exact: int) -> None:
    q, k, v = make_qkv(30, 100, 4, 2)
    chunk, keys = make_chunk(30, 100), make_keys(k, v)
    g = torch.Generator().manual_seed(1)
    exact = ExactRows(torch.randn(4, num_exact, 16, generator=g), torch.randn(4, num_exact, generator=g))
    plain = random_selection(chunk, 4)
    before = cpu.attend(q, keys, chunk, plain, scale=SCALE)
    after = cpu.attend(q, keys, chunk, replace(plain, exact=exact), scale=SCALE)
    rest = 100 - num_exact
    assert torch.equal(after.out[:, rest:], exact.out) and torch.equal(after.lse[:, rest:], exact.lse)
    assert torch.equal(after.out[:, :rest], before.out[:, :rest])
    assert torch.equal(after.lse[:, :rest], before.lse[:, :rest])


@pytest.mark.parametrize(
    "strided",
    [
        pytest.param(lambda q: q.transpose(0, 1).contiguous().transpose(0, 1), id="by token"),
        pytest.param(lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), id="by dimension"),
    ],
)
def test_queries_may_be_strided(strided: Callable[[Tensor], Tensor]) -> None:
    q, k, v = make_qkv(64, 80, 4, 2)
    chunk, keys = make_chunk(64, 80), make_keys(k, v)
    assert not strided(q).is_contiguous()
    for selection in (dense(q.device), random_selection(chunk, 2)):
        want = cpu.attend(q, keys, chunk, selection, scale=SCALE)
        assert torch.equal(cpu.attend(strided(q), keys, chunk, selection, scale=SCALE).out, want.out)


def test_wrong_tables_are_refused() -> None:
    q, k, v = make_qkv(64, 80, 4, 2)
    keys, chunk = make_keys(k, v), make_chunk(64, 80)
    keys.pages = keys.pages[:, :2]  # 128 tokens for 144
    with pytest.raises(AssertionError):
        cpu.attend(q, keys, chunk, dense(q.device), scale=SCALE)
    with pytest.raises(AssertionError):  # lists of another chunk
        cpu.attend(q, make_keys(k, v), chunk, random_selection(make_chunk(0, 64), 2), scale=SCALE)
