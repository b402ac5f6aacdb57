"""Recall and read fraction say what a selection missed and what it cost, and the floor acts on it."""

import math
from dataclasses import replace

import pytest
import torch

from configs.features import Features
from sparse.attention import attend
from sparse.recall import causal_cells, raise_to_floor, read_cells, recall, recall_rows
from sparse.selection import ALL, ExactRows, Selection, dense, lists_from_mask
from tests.reference import attention, causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection, selected_mask

SCALE = 0.25


@pytest.mark.parametrize("start", [0, 1, 64, 1000])
@pytest.mark.parametrize("num_lists", [1, 2, 4])
@pytest.mark.parametrize(("query_block", "unit"), [(64, None), (64, 1), (128, 16)])
def test_recall_is_the_share_of_attention_on_selected_keys(
    start: int, num_lists: int, query_block: int, unit: int | None
) -> None:
    q, k, v = make_qkv(start, 150, 4, 2)
    chunk = make_chunk(start, 150)
    selection = random_selection(chunk, num_lists, query_block, unit)
    got = recall(q, make_keys(k, v), chunk, selection, scale=SCALE)
    rows = recall_rows(chunk, selection)
    mask = selected_mask(selection, chunk).repeat_interleave(4 // num_lists, 0)
    full = attention(q.double(), k.double(), v.double(), causal(start, 150), SCALE)[1]
    part = attention(q.double(), k.double(), v.double(), mask, SCALE)[1]
    assert got.shape == (4, 16) and (got >= 0).all() and (got <= 1).all()
    torch.testing.assert_close(got.double(), (part - full).exp()[:, rows], atol=1e-5, rtol=1e-5)  # fp32


def test_recall_is_of_capped_logits_where_a_model_caps_them() -> None:
    q, k, v = make_qkv(64, 150, 4, 2)
    chunk, features = make_chunk(64, 150), Features(softcap=2.0)
    selection = random_selection(chunk, 4)
    got = recall(q, make_keys(k, v), chunk, selection, scale=SCALE, softcap=2.0)
    rows = recall_rows(chunk, selection)
    full = attention(q.double(), k.double(), v.double(), causal(64, 150), SCALE, features)[1]
    mask = selected_mask(selection, chunk)
    part = attention(q.double(), k.double(), v.double(), mask, SCALE, features)[1]
    torch.testing.assert_close(got.double(), (part - full).exp()[:, rows], atol=1e-5, rtol=1e-5)  # fp32


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 300), (90, 20), (99, 3), (100, 5), (640, 70)])
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
def test_only_cells_within_a_window_are_causal(start: int, length: int, window: int | None) -> None:
    chunk = make_chunk(start, length)
    seen = [min(row + 1, window or row + 1) for row in range(start, start + length)]
    assert causal_cells(chunk, 4, window) == 4 * sum(seen)
    assert read_cells(dense(torch.device("cpu")), chunk, 4, window) == 4 * sum(seen)


def test_recall_by_hand() -> None:
    """All keys alike: the share of attention is the share of keys. Page 0 of 64 keys out of row + 1."""
    q, k, v = torch.ones(1, 192, 16), torch.ones(1, 192, 16), torch.ones(1, 192, 16)
    chunk = make_chunk(0, 192)
    mask = torch.tensor([[[True, False, False]] * 3])
    selection = Selection(64, lists_from_mask(mask, 64))
    rows = recall_rows(chunk, selection).tolist()
    want = torch.tensor([[min(1.0, 64 / (row + 1)) for row in rows]])
    torch.testing.assert_close(recall(q, make_keys(k, v), chunk, selection, scale=SCALE), want)


def test_recall_of_everything_is_one_and_of_nothing_zero() -> None:
    q, k, v = make_qkv(100, 200, 4, 2)
    chunk, keys = make_chunk(100, 200), make_keys(k, v)
    nothing = Selection(64, lists_from_mask(torch.zeros(2, 4, 5, dtype=torch.bool), 64))
    everything = replace(
        nothing, pages=replace(nothing.pages, counts=torch.full_like(nothing.pages.counts, ALL))
    )
    assert torch.equal(recall(q, keys, chunk, dense(q.device), scale=SCALE), torch.ones(4, 16))
    assert torch.equal(recall(q, keys, chunk, everything, scale=SCALE), torch.ones(4, 16))
    assert torch.equal(recall(q, keys, chunk, nothing, scale=SCALE), torch.zeros(4, 16))


def test_recall_is_over_the_keys_that_are_held() -> None:
    q, k, v = make_qkv(100, 200, 4, 2)
    chunk, keys = make_chunk(100, 200), make_keys(k, v)
    selection = random_selection(chunk, 2, density=1.0)
    selection.pages.counts.fill_(ALL)
    keys.pages[:, 1] = -1
    assert torch.equal(recall(q, keys, chunk, selection, scale=SCALE), torch.ones(4, 16))


def test_sampled_rows_repeat_and_avoid_what_the_estimator_saw() -> None:
    chunk = make_chunk(512, 200)
    plain = random_selection(chunk, 1)
    rows = recall_rows(chunk, plain).tolist()
    assert rows == sorted(set(rows)) and len(rows) == 16 and rows[0] >= 0 and rows[-1] < 200
    assert rows == recall_rows(chunk, plain).tolist()
    assert rows != recall_rows(make_chunk(576, 200), plain).tolist(), "by position, not by row"
    exact = ExactRows(torch.zeros(4, 150, 16), torch.zeros(4, 150))
    assert max(recall_rows(chunk, replace(plain, estimator_rows=150)).tolist()) < 50
    assert max(recall_rows(chunk, replace(plain, exact=exact, estimator_rows=64)).tolist()) < 50
    assert recall_rows(chunk, replace(plain, estimator_rows=195)).tolist() == [0, 1, 2, 3, 4]
    assert recall_rows(chunk, replace(plain, estimator_rows=200)).numel() == 0


def test_sampled_rows_are_spread_evenly() -> None:
    counts = torch.zeros(8)
    for start in range(0, 64 * 2048, 2048):
        rows = recall_rows(make_chunk(start, 2048), dense(torch.device("cpu")))
        counts += torch.bincount(rows // 256, minlength=8)
    assert counts.sum() == 64 * 16
    assert (counts - 128).abs().max() < 5 * math.sqrt(128)


def test_a_chunk_without_sampled_rows_has_no_recall() -> None:
    q, k, v = make_qkv(0, 20, 4, 2)
    chunk = make_chunk(0, 20)
    selection = replace(random_selection(chunk, 1), estimator_rows=20)
    got = recall(q, make_keys(k, v), chunk, selection, scale=SCALE)
    assert got.shape == (4, 0)
    assert raise_to_floor(selection, got, 1.0) is selection


def test_heads_below_the_floor_become_dense() -> None:
    q, k, v = make_qkv(100, 200, 4, 2)
    chunk, keys = make_chunk(100, 200), make_keys(k, v)
    selection = random_selection(chunk, 4, unit=8, density=0.2)
    recalled = torch.tensor([[0.9, 1.0], [0.5, 0.6], [0.95, 0.85], [0.0, 0.0]])
    raised = raise_to_floor(selection, recalled, 0.9)
    assert (raised.pages.counts[[1, 3]] == ALL).all()
    assert raised.gathered is not None and (raised.gathered.counts[[1, 3]] == 0).all()
    assert torch.equal(raised.pages.counts[[0, 2]], selection.pages.counts[[0, 2]])
    got, before, full = (attend(q, keys, chunk, s, scale=SCALE) for s in (raised, selection, dense(q.device)))
    torch.testing.assert_close(got.out[[1, 3]], full.out[[1, 3]], atol=1e-5, rtol=1e-5)  # fp32
    assert torch.equal(got.out[[0, 2]], before.out[[0, 2]])


@pytest.mark.parametrize(("num_lists", "raised"), [(1, [True]), (2, [False, True])])
def test_a_list_that_heads_share_is_raised_if_any_of_them_is_low(num_lists: int, raised: list[bool]) -> None:
    selection = random_selection(make_chunk(100, 200), num_lists)
    selection.pages.counts.fill_(1)
    recalled = torch.tensor([[1.0], [1.0], [0.2], [1.0]])
    got = raise_to_floor(selection, recalled, 0.9)
    assert (got.pages.counts == ALL).all(1).tolist() == raised


def test_dense_stays_dense_under_a_floor() -> None:
    selection = dense(torch.device("cpu"))
    assert raise_to_floor(selection, torch.ones(4, 16), 1.0) is selection


@pytest.mark.parametrize("start", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("length", [1, 64, 129])
def test_causal_cells_are_what_dense_attention_computes(start: int, length: int) -> None:
    chunk = make_chunk(start, length)
    assert causal_cells(chunk, 3) == 3 * int(causal(start, length).sum())
    assert int(read_cells(dense(torch.device("cpu")), chunk, 3)) == causal_cells(chunk, 3)


@pytest.mark.parametrize("start", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("length", [1, 64, 129])
@pytest.mark.parametrize(("num_lists", "query_block", "unit"), [(1, 64, None), (2, 64, 8), (4, 128, 1)])
def test_read_cells_count_every_selected_pair(
    start: int, length: int, num_lists: int, query_block: int, unit: int | None
) -> None:
    chunk = make_chunk(start, length)
    selection = random_selection(chunk, num_lists, query_block, unit)
    got = read_cells(selection, chunk, 4)
    assert got.shape == () and got.dtype == torch.int64
    assert int(got) == int(selected_mask(selection, chunk).sum()) * (4 // num_lists)


@pytest.mark.parametrize("start", [0, 1, 64, 1000])
@pytest.mark.parametrize("query_block", [64, 128])
def test_full_lists_read_exactly_what_dense_reads(start: int, query_block: int) -> None:
    chunk = make_chunk(start, 129)
    selection = random_selection(chunk, 2, query_block, density=1.1)
    selection.pages.counts[0, 0] = selection.pages.counts[1, 0]  # the builder emptied it
    assert int(read_cells(selection, chunk, 4)) == causal_cells(chunk, 4)


def test_exact_rows_count_as_dense() -> None:
    chunk = make_chunk(100, 100)
    empty = Selection(64, lists_from_mask(torch.zeros(1, 3, 4, dtype=torch.bool), 64))
    exact = replace(empty, exact=ExactRows(torch.zeros(4, 10, 16), torch.zeros(4, 10)))
    assert int(read_cells(empty, chunk, 4)) == 0
    assert int(read_cells(exact, chunk, 4)) == 4 * sum(range(191, 201))
