"""A-shape, tri-shape and block-sparse heads, and dense last rows: the published mask, never the future."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.state import StateRegistry
from sparse.attention import attend
from sparse.base import Chunk
from sparse.minference import MInference
from sparse.pattern_masks import page_means
from sparse.recall import causal_cells, raise_to_floor, read_cells, recall, recall_rows
from sparse.selection import ALL, Selection, dense
from tests.reference import attention, causal
from tests.sparse.builders import PagedKeys, make_chunk, make_keys, make_model, make_qkv, selected_mask

SCALE = 0.25
STARTS = [0, 1, 63, 64, 1000]
SMALLEST: list[dict[str, Any]] = [  # options of each pattern that read as little as it can
    {"vertical": 1, "slash": 1},
    {"vertical": 1000, "slash": 1000, "threshold": 1e-6},
    {"pattern": "a_shape", "init": 0, "local": 1},
    {"pattern": "tri_shape", "init": 0, "local": 1},
    {"pattern": "block_sparse", "top_k": 1},
]
EVERYTHING: list[dict[str, Any]] = [  # budgets larger than any prompt of these tests
    {"vertical": 10_000, "slash": 10_000},
    {"pattern": "a_shape", "init": 10_000, "local": 1},
    {"pattern": "a_shape", "init": 0, "local": 10_000},
    {"pattern": "tri_shape", "init": 10_000, "local": 10_000},
    {"pattern": "block_sparse", "top_k": 10_000},
    {"vertical": 30, "slash": 100, "last_rows_dense": 10_000},
]


def attached(num_heads: int = 4, **options: Any) -> MInference:
    method = MInference(**options)
    method.attach(make_model(num_query_heads=num_heads), Path("."), StateRegistry())
    return method


def selection_of(method: MInference, start: int, length: int, prompt: int | None = None) -> Selection:
    """Of a chunk with random queries and keys, in a prompt that may be longer."""
    q, k, v = make_qkv(start, length, 4, 2)
    chunk = replace(make_chunk(start, length), prompt_length=prompt or start + length)
    return method.select(0, q, make_keys(k, v), chunk, scale=SCALE)


def widened(mask: Tensor) -> Tensor:
    """A mask [N, N] over absolute positions, widened to tiles of 64 by 64, causal again."""
    num_tokens = mask.shape[0]
    padding = -num_tokens % 64
    tiles = torch.nn.functional.pad(mask, (0, padding, 0, padding))
    tiles = tiles.view(tiles.shape[0] // 64, 64, -1, 64).any(1).any(-1)
    whole = tiles.repeat_interleave(64, 0).repeat_interleave(64, 1)[:num_tokens, :num_tokens]
    return whole & causal(0, num_tokens)


def a_shape(num_tokens: int, init: int, local: int) -> Tensor:
    """As published: key j is visible to query i if j <= i and (i - j < local or j < init). bool [N, N]."""
    rows, cols = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    return (cols <= rows) & ((rows - cols < local) | (cols < init))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", [1, 65, 200])
@pytest.mark.parametrize(
    ("init", "local"), [(0, 1), (1, 2), (64, 64), (65, 65), (10, 66), (100, 128), (0, 129), (2000, 1)]
)
def test_a_shape_reads_the_pages_of_the_published_mask(
    start: int, length: int, init: int, local: int
) -> None:
    chunk = make_chunk(start, length)
    selection = selection_of(attached(pattern="a_shape", init=init, local=local), start, length)
    got = selected_mask(selection, chunk)
    # Tiles of whole prompts: a tile is read whether or not this chunk has all of its rows.
    end = -(-(start + length) // 64) * 64
    wanted = a_shape(end, init, local)
    assert (got | ~wanted[start : start + length, : start + length]).all()
    assert torch.equal(got, widened(wanted)[start : start + length, : start + length].expand_as(got))
    assert selection.exact is None and selection.estimator_rows == 0, "nothing is estimated"


def published_blocks(q: Tensor, k: Tensor, chunk: Chunk, top_k: int, forced: bool) -> Tensor:
    """Pages by the published rule: the best mean query times mean key of those not after. [Hq, B, P].

    Means are over the rows and keys there are. Published without forced pages; ours has the first and the
    diagonal beside the best.
    """
    num_tokens = chunk.start + chunk.length
    keys = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    first = chunk.start // 64
    num_pages = -(-num_tokens // 64)
    blocks = torch.zeros(q.shape[0], num_pages - first, num_pages, dtype=torch.bool)
    for head in range(q.shape[0]):
        for row in range(first, num_pages):
            rows = q[head, max(0, 64 * row - chunk.start) : 64 * (row + 1) - chunk.start].double().mean(0)
            scores = [float(rows @ keys[head, 64 * c : 64 * (c + 1)].mean(0)) for c in range(row + 1)]
            best = sorted(range(row + 1), key=lambda c: (-scores[c], c))[:top_k]
            blocks[head, row - first, [*best, 0, row] if forced else best] = True
    return blocks


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_block_sparse_reads_the_best_pages_and_the_forced_ones(
    start: int, length: int, top_k: int, num_heads: int
) -> None:
    q, k, v = make_qkv(start, length, num_heads, 2)
    chunk, keys = make_chunk(start, length), make_keys(k, v)
    method = attached(num_heads, pattern="block_sparse", top_k=top_k)
    got = selected_mask(method.select(0, q, keys, chunk, scale=SCALE), chunk)
    first = start // 64

    def tokens(blocks: Tensor) -> Tensor:
        mask = blocks.repeat_interleave(64, 1).repeat_interleave(64, 2)
        return mask[:, start - 64 * first :, : start + length][:, :length] & causal(start, length)

    assert (got | ~tokens(published_blocks(q, k, chunk, top_k, forced=False))).all()
    assert torch.equal(got, tokens(published_blocks(q, k, chunk, top_k, forced=True)))


def test_means_leave_padding_out() -> None:
    x = torch.arange(1.0, 131.0)[None, :, None].expand(2, 130, 3)
    torch.testing.assert_close(page_means(x, 0)[0, :, 0], torch.tensor([32.5, 96.5, 129.5]))  # fp32
    torch.testing.assert_close(page_means(x, 63)[1, :, 2], torch.tensor([1.0, 33.5, 97.5, 130.0]))
    torch.testing.assert_close(page_means(x[:, :5].bfloat16(), 60)[0, :, 0], torch.tensor([2.5, 5.0]))


def test_dropped_pages_use_no_budget() -> None:
    q, k, v = make_qkv(640, 64, 4, 2)
    chunk, keys = make_chunk(640, 64), make_keys(k, v)
    method = attached(pattern="block_sparse", top_k=3)
    best = published_blocks(q, k, chunk, 11, forced=False)
    assert best.all()
    keys.pages[0, 1:9] = -1  # of the past, heads 0 and 1 hold pages 0 and 9
    pages = selected_mask(method.select(0, q, keys, chunk, scale=SCALE), chunk)[:, -1, ::64]
    assert pages[:2].nonzero()[:, 1].tolist() == [0, 9, 10] * 2
    assert (pages[2:].sum(-1) >= 3).all() and (pages[2:].sum(-1) <= 5).all()


@pytest.mark.parametrize("start", STARTS)
def test_tri_shape_is_a_shape_whose_last_rows_read_everything(start: int) -> None:
    chunk = make_chunk(start, 300)
    options: dict[str, Any] = {"init": 10, "local": 70}
    tri = selected_mask(selection_of(attached(pattern="tri_shape", **options), start, 300), chunk)
    plain = selected_mask(selection_of(attached(pattern="a_shape", **options), start, 300), chunk)
    first = (start + 200) // 64 * 64 - start  # of the query block that holds the first of the last 100 rows
    assert torch.equal(tri[:, first:], causal(start, 300)[first:].expand_as(tri[:, first:]))
    assert torch.equal(tri[:, :first], plain[:, :first])
    assert not plain[:, -100:].all()


@pytest.mark.parametrize("last_rows", [1, 64, 65, 150, 200])
@pytest.mark.parametrize("start", [0, 1, 64, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"vertical": 30, "slash": 100},
        {"vertical": 30, "slash": 100, "last_q": 16},
        {"pattern": "a_shape", "init": 1, "local": 2},
        {"pattern": "block_sparse", "top_k": 1},
    ],
)
def test_the_last_rows_of_a_prompt_read_everything_on_request(
    start: int, last_rows: int, options: dict[str, Any]
) -> None:
    q, k, v = make_qkv(start, 300, 4, 2)
    chunk, keys = make_chunk(start, 300), make_keys(k, v)
    plain = attached(**options).select(0, q, keys, chunk, scale=SCALE)
    selection = attached(**options, last_rows_dense=last_rows).select(0, q, keys, chunk, scale=SCALE)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
    got = attend(q, keys, chunk, selection, scale=SCALE)
    torch.testing.assert_close(got.out[:, -last_rows:], full.out[:, -last_rows:], atol=1e-5, rtol=0)  # fp32
    torch.testing.assert_close(got.lse[:, -last_rows:], full.lse[:, -last_rows:], atol=1e-5, rtol=0)
    first = (start + 300 - last_rows) // 64 * 64 - start
    before = attend(q, keys, chunk, plain, scale=SCALE)
    assert torch.equal(got.out[:, : max(0, first)], before.out[:, : max(0, first)])
    num_exact = 0 if plain.exact is None else plain.exact.lse.shape[1]
    if last_rows <= num_exact:
        assert (selection.pages.counts != ALL).all(), "their estimator has computed them already"
        assert torch.equal(got.out, before.out)
    else:
        assert recall_rows(chunk, selection).max() < first, "rows that nothing chose for are not judged"
        assert int(read_cells(selection, chunk, 4)) > int(read_cells(plain, chunk, 4))


def test_last_rows_are_those_of_the_prompt_in_whatever_chunk() -> None:
    method = attached(pattern="a_shape", init=1, local=2, last_rows_dense=300)
    counts = [selection_of(method, start, 256, prompt=1000).pages.counts for start in (256, 512)]
    assert (counts[0] != ALL).all()
    assert (counts[1] == ALL).tolist() == [[False, False, True, True]] * 4, "row 700 is in the third block"
    assert selection_of(method, 768, 232, prompt=1000).is_dense


@pytest.mark.parametrize("options", EVERYTHING)
@pytest.mark.parametrize("start", [0, 1, 64, 1000])
def test_budgets_that_cover_everything_equal_dense(start: int, options: dict[str, Any]) -> None:
    q, k, v = make_qkv(start, 200, 4, 2)
    chunk, keys = make_chunk(start, 200), make_keys(k, v)
    selection = attached(**options).select(0, q, keys, chunk, scale=SCALE)
    assert int(read_cells(selection, chunk, 4)) == causal_cells(chunk, 4)
    got = attend(q, keys, chunk, replace(selection, exact=None), scale=SCALE)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
    torch.testing.assert_close(got.out, full.out, atol=1e-5, rtol=0)  # fp32
    torch.testing.assert_close(got.lse, full.lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("options", [*SMALLEST, *EVERYTHING])
def test_short_prompts_are_right_whatever_the_budgets(length: int, options: dict[str, Any]) -> None:
    q, k, v = make_qkv(0, length, 4, 2)
    chunk, keys = make_chunk(0, length), make_keys(k, v)
    selection = attached(**options).select(0, q, keys, chunk, scale=SCALE)
    mask = causal(0, length)[None] if selection.is_dense else selected_mask(selection, chunk)
    if selection.exact is not None:
        mask[:, -selection.exact.lse.shape[1] :] = causal(0, length)[-selection.exact.lse.shape[1] :]
    assert mask.any(-1).all(), "every row reads a key"
    if length <= 64 or options in EVERYTHING:
        assert (mask == causal(0, length)).all()
    got = attend(q, keys, chunk, selection, scale=SCALE)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)  # fp32
    torch.testing.assert_close(got.lse.double(), lse, atol=1e-5, rtol=1e-5)
    found = recall(q, keys, chunk, selection, scale=SCALE)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("options", SMALLEST)
@pytest.mark.parametrize("start", [0, 63, 1000])
def test_attention_over_a_selection_is_attention_over_its_mask(start: int, options: dict[str, Any]) -> None:
    """What is not selected is poisoned with NaN: it changes nothing."""
    q, k, v = make_qkv(start, 200, 4, 4)
    chunk = make_chunk(start, 200)
    selection = attached(**options, last_rows_dense=0).select(0, q, make_keys(k, v), chunk, scale=SCALE)
    listed = replace(selection, exact=None)
    mask = selected_mask(listed, chunk)
    unread = ~mask.any(1)  # [Hkv, N], since every query head has a KV head of its own
    poisoned = make_keys(
        k.masked_fill(unread[..., None], float("nan")), v.masked_fill(unread[..., None], float("nan"))
    )
    got = attend(q, poisoned, chunk, listed, scale=SCALE)
    out, _ = attention(q.double(), k.double(), v.double(), mask, SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)  # fp32


@pytest.mark.parametrize("options", SMALLEST)
def test_rows_whose_keys_are_all_dropped_give_zero_and_never_nan(options: dict[str, Any]) -> None:
    q, k, v = make_qkv(100, 200, 4, 2)
    chunk, keys = make_chunk(100, 200), make_keys(k, v)
    keys.pages[0] = -1
    selection = attached(**options).select(0, q, keys, chunk, scale=SCALE)
    got = attend(q, keys, chunk, selection, scale=SCALE)
    assert torch.equal(got.out[:2], torch.zeros(2, 200, 16)) and (got.lse[:2] == float("-inf")).all()
    assert got.out.isfinite().all() and got.lse[2:].isfinite().all()


@pytest.mark.parametrize("options", SMALLEST[2:])
def test_later_keys_change_no_earlier_row(options: dict[str, Any]) -> None:
    q, k, v = make_qkv(300, 200, 4, 2)
    chunk = make_chunk(300, 200)
    method = attached(**options)
    k_changed, v_changed = k.clone(), v.clone()
    k_changed[:, 448:] += 5  # from a page's first key on
    v_changed[:, 448:] += 5
    outs = []
    for keys in (make_keys(k, v), make_keys(k_changed, v_changed)):
        selection = method.select(0, q, keys, chunk, scale=SCALE)
        outs.append(attend(q, keys, chunk, selection, scale=SCALE).out)
    assert torch.equal(outs[0][:, :148], outs[1][:, :148])
    assert not torch.equal(outs[0][:, 148:], outs[1][:, 148:])


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "a_shape", "init": 10, "local": 70, "last_rows_dense": 30},
        {"pattern": "tri_shape", "init": 10, "local": 70},
        {"pattern": "block_sparse", "top_k": 2, "last_rows_dense": 30},
    ],
)
def test_without_an_estimator_answers_do_not_depend_on_chunks(options: dict[str, Any]) -> None:
    method = attached(**options)
    assert not method.grid and attached().grid
    q, k, v = make_qkv(0, 700, 4, 2)
    whole = selected_mask(
        method.select(0, q, make_keys(k, v), make_chunk(0, 700), scale=SCALE), make_chunk(0, 700)
    )
    for start, end in ((0, 192), (192, 256), (256, 576), (576, 700)):
        chunk = replace(make_chunk(start, end - start), prompt_length=700)
        keys = make_keys(k[:, :end], v[:, :end])
        part = selected_mask(method.select(0, q[:, start:end], keys, chunk, scale=SCALE), chunk)
        assert torch.equal(part, whole[:, start:end, :end])


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.9}, {"last_rows_dense": 90}, {"pattern": "tri_shape", "local": 50}, *SMALLEST[2:]],
)
def test_selecting_never_waits_for_the_device(options: dict[str, Any]) -> None:
    """Meta tensors have no values: whatever would bring one to the host raises."""
    q, k, v = (x.to("meta") for x in make_qkv(100, 200, 4, 2))
    pages = torch.empty(2, 5, dtype=torch.int32, device="meta")
    pool = torch.empty(10, 64, 16, device="meta")
    keys = PagedKeys(300, pool, pool, pages)
    chunk = make_chunk(100, 200)
    selection = attached(**options).select(0, q, keys, chunk, scale=SCALE)
    raised = raise_to_floor(selection, recall(q, keys, chunk, selection, scale=SCALE), 0.9)
    assert raised.pages.counts.is_meta and read_cells(raised, chunk, 4).is_meta
