"""Block-sparse attention reads what the selection names, and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse.attention import Attended, attend
from sparse.selection import ALL, ExactRows, Selection, dense, lists_from_mask
from tests.reference import attention, causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection, selected_mask

SCALE = 0.25
STARTS = (0, 1, 63, 64, 1000)
LENGTHS = (1, 17, 64, 65, 129)


def expect(got: Attended, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    """Equal to the reference in fp64, up to fp32 rounding: atol 2e-5 on out, 2e-5 on lse."""
    mask = mask.repeat_interleave(q.shape[0] // mask.shape[0], 0)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
    assert got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_dense_selection_is_causal_attention(
    start: int, length: int, num_heads: int, num_kv_heads: int
) -> None:
    q, k, v = make_qkv(start, length, num_heads, num_kv_heads)
    got = attend(q, make_keys(k, v), make_chunk(start, length), dense(q.device), scale=SCALE)
    expect(got, q, k, v, causal(start, length)[None])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("axis", ["one", "kv", "query"])
def test_lists_read_exactly_the_selected_keys(
    start: int, length: int, num_heads: int, num_kv_heads: int, axis: str
) -> None:
    q, k, v = make_qkv(start, length, num_heads, num_kv_heads)
    chunk = make_chunk(start, length)
    num_lists = {"one": 1, "kv": num_kv_heads, "query": num_heads}[axis]
    unit = {"one": 16, "kv": 8, "query": 1}[axis]
    for query_block, gathered in ((64, None), (64, unit), (128, unit)):
        selection = random_selection(chunk, num_lists, query_block, gathered)
        got = attend(q, make_keys(k, v), chunk, selection, scale=SCALE)
        expect(got, q, k, v, selected_mask(selection, chunk))


@pytest.mark.parametrize("unit", [1, 8, 16])
def test_gathered_units_of_every_size_are_read(unit: int) -> None:
    q, k, v = make_qkv(300, 100, 6, 2)
    chunk = make_chunk(300, 100)
    selection = random_selection(chunk, 2, 64, unit, density=0.2)
    assert selection.gathered is not None and int(selection.gathered.counts.sum()) > 0
    expect(
        attend(q, make_keys(k, v), chunk, selection, scale=SCALE), q, k, v, selected_mask(selection, chunk)
    )


def test_rows_that_select_nothing_are_zero_with_lse_of_minus_infinity() -> None:
    q, k, v = make_qkv(100, 60, 4, 2)
    selection = Selection(64, lists_from_mask(torch.zeros(2, 2, 3, dtype=torch.bool), 64))
    assert not selection.is_dense
    got = attend(q, make_keys(k, v), make_chunk(100, 60), selection, scale=SCALE)
    assert torch.equal(got.out, torch.zeros_like(q))
    assert torch.equal(got.lse, torch.full((4, 60), float("-inf")))


def test_rows_before_every_selected_key_are_empty_not_nan() -> None:
    """A query block of 128 may list only its second page: the rows of the first see none of it."""
    q, k, v = make_qkv(0, 128, 2, 2)
    mask = torch.tensor([[[False, True]]])
    got = attend(
        q, make_keys(k, v), make_chunk(0, 128), Selection(128, lists_from_mask(mask, 64)), scale=SCALE
    )
    assert torch.equal(got.out[:, :64], torch.zeros(2, 64, 16))
    assert got.lse[:, :64].isneginf().all() and got.lse[:, 64:].isfinite().all()


@pytest.mark.parametrize("start", [0, 1, 200])
def test_all_counts_equal_dense(start: int) -> None:
    q, k, v = make_qkv(start, 150, 6, 2)
    chunk, keys = make_chunk(start, 150), make_keys(k, v)
    selection = random_selection(chunk, 6, 64, 8)
    counts = torch.full_like(selection.pages.counts, ALL)
    selection = replace(selection, pages=replace(selection.pages, counts=counts))
    got, full = (attend(q, keys, chunk, s, scale=SCALE) for s in (selection, dense(q.device)))
    torch.testing.assert_close(got.out, full.out, atol=1e-5, rtol=1e-5)  # fp32
    torch.testing.assert_close(got.lse, full.lse, atol=1e-5, rtol=1e-5)


def test_what_is_not_selected_is_not_read() -> None:
    q, k, v = make_qkv(500, 140, 4, 2)
    chunk = make_chunk(500, 140)
    selection = random_selection(chunk, 2, 64, 8, density=0.3)
    selection.pages.counts.masked_fill_(selection.pages.counts == ALL, 0)
    before = attend(q, make_keys(k, v), chunk, selection, scale=SCALE)
    read = selected_mask(selection, chunk).any(1)  # [Hkv, N]
    in_listed_page = read | torch.zeros(2, 640, dtype=torch.bool).index_fill(1, torch.arange(448, 640), True)
    assert not in_listed_page.all()
    poison = ~in_listed_page[..., None]
    keys = make_keys(k.masked_fill(poison, float("nan")), v.masked_fill(poison, float("nan")))
    after = attend(q, keys, chunk, selection, scale=SCALE)
    assert torch.equal(before.out, after.out) and torch.equal(before.lse, after.lse)


@pytest.mark.parametrize("kind", ["dense", "lists", "all"])
def test_no_row_sees_the_keys_after_it(kind: str) -> None:
    q, k, v = make_qkv(70, 150, 4, 2)
    chunk = make_chunk(70, 150)
    selection = dense(q.device) if kind == "dense" else random_selection(chunk, 4, 128, 16, density=0.9)
    if kind == "all":
        selection.pages.counts.fill_(ALL)
    before = attend(q, make_keys(k, v), chunk, selection, scale=SCALE)
    for future in (71, 127, 128, 191, 192, 219):
        k2, v2 = k.clone(), v.clone()
        k2[:, future] += 3
        v2[:, future] -= 5
        after = attend(q, make_keys(k2, v2), chunk, selection, scale=SCALE)
        seen = future - 70
        assert torch.equal(before.out[:, :seen], after.out[:, :seen])
        assert torch.equal(before.lse[:, :seen], after.lse[:, :seen])
        if kind != "lists":
            assert not torch.equal(before.out[:, seen], after.out[:, seen])


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
    expect(attend(q, keys, chunk, selection, scale=SCALE), q, k, v, mask)


def test_dense_in_pieces_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores are formed, on a GPU or beside dropped pages, a long chunk goes in pieces."""
    q, k, v = make_qkv(300, 100, 6, 2)
    keys = make_keys(k, v)
    keys.pages[0, 1] = -1
    monkeypatch.setattr(
        "sparse.attention.SCORE_ELEMS", 30 * 6 * 400
    )  # 30 rows, so that the last piece is partial
    mask = causal(300, 100).expand(2, -1, -1).clone()
    mask[0, :, 64:128] = False
    expect(attend(q, keys, make_chunk(300, 100), dense(q.device), scale=SCALE), q, k, v, mask)


def test_exact_rows_replace_the_last_rows() -> None:
    q, k, v = make_qkv(30, 100, 4, 2)
    chunk, keys = make_chunk(30, 100), make_keys(k, v)
    exact = ExactRows(torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 40))
    plain = random_selection(chunk, 4)
    before = attend(q, keys, chunk, plain, scale=SCALE)
    after = attend(q, keys, chunk, replace(plain, exact=exact), scale=SCALE)
    assert torch.equal(after.out[:, 60:], exact.out) and torch.equal(after.lse[:, 60:], exact.lse)
    torch.testing.assert_close(
        after.out[:, :60], before.out[:, :60], atol=1e-6, rtol=1e-6
    )  # other tile sizes
    torch.testing.assert_close(after.lse[:, :60], before.lse[:, :60], atol=1e-6, rtol=1e-6)


def test_queries_may_be_strided() -> None:
    q, k, v = make_qkv(64, 80, 4, 2)
    chunk, keys = make_chunk(64, 80), make_keys(k, v)
    by_token = q.transpose(0, 1).contiguous().transpose(0, 1)  # as a model's projection lays them out
    by_dim = q.transpose(1, 2).contiguous().transpose(1, 2)
    for selection in (dense(q.device), random_selection(chunk, 2)):
        want = attend(q, keys, chunk, selection, scale=SCALE)
        for strided in (by_token, by_dim):
            assert not strided.is_contiguous()
            assert torch.equal(attend(strided, keys, chunk, selection, scale=SCALE).out, want.out)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-6)]
)
@pytest.mark.parametrize("kind", ["dense", "lists"])
def test_every_float_dtype_is_served(dtype: torch.dtype, atol: float, kind: str) -> None:
    q, k, v = (x.to(dtype) for x in make_qkv(100, 100, 4, 2))
    chunk = make_chunk(100, 100)
    selection = dense(q.device) if kind == "dense" else random_selection(chunk, 4, unit=8)
    got = attend(q, make_keys(k, v), chunk, selection, scale=SCALE)
    mask = causal(100, 100)[None] if kind == "dense" else selected_mask(selection, chunk)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), out, atol=atol, rtol=atol)
    torch.testing.assert_close(got.lse.double(), lse, atol=atol, rtol=atol)
