"""Vertical-slash heads read at least what was published, never the future, and little beyond their lines."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcache.state import StateRegistry
from sparse.attention import attend
from sparse.base import Chunk, KeyView
from sparse.methods import PREFILL_METHODS
from sparse.minference import MInference
from sparse.pattern_masks import keep_lines
from sparse.recall import causal_cells, raise_to_floor, read_cells, recall
from sparse.selection import Selection, dense
from tests.reference import attention, causal
from tests.sparse.builders import PagedKeys, make_chunk, make_keys, make_model, make_qkv, selected_mask

SCALE = 0.25


def attached(method: MInference, num_heads: int = 4, files: Path = Path(".")) -> MInference:
    method.attach(make_model(num_query_heads=num_heads), files, StateRegistry())
    return method


def without_exact(selection: Selection) -> Selection:
    """What the lists alone give, for the last rows too."""
    return replace(selection, exact=None)


def published_lines(
    q: Tensor, k: Tensor, chunk: Chunk, vertical: int, slash: int, threshold: float = math.inf
) -> list[tuple[set[int], set[int]]]:
    """The verticals and slashes of each head as published.

    Written from its text: the last rows' softmax, its sums by column and by distance, 30 columns and 100
    distances forced, and the best of the others up to the budget; ties to the lower index. A threshold stops
    once the lines of a kind hold that share of what the rows look at.
    """
    num_tokens = chunk.start + chunk.length
    num_rows = min(64, chunk.length)
    first = num_tokens - num_rows
    keys = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = (SCALE * q[:, -num_rows:].double() @ keys.mT).masked_fill(
        ~causal(first, num_rows), float("-inf")
    )
    weights = scores.softmax(-1)

    def best(scores: list[float], num_forced: int, budget: int) -> set[int]:
        lines = set(range(min(num_forced, num_tokens)))
        for line in sorted(set(range(num_tokens)) - lines, key=lambda i: (-scores[i], i)):
            if len(lines) >= budget or sum(scores[i] for i in lines) >= threshold * num_rows:
                break
            lines.add(line)
        return lines

    lines = []
    for head in range(q.shape[0]):
        distances = [0.0] * num_tokens
        for row, row_weights in enumerate(weights[head].tolist()):
            for key in range(first + row + 1):
                distances[first + row - key] += row_weights[key]
        lines.append((best(weights[head].sum(0).tolist(), 30, vertical), best(distances, 100, slash)))
    return lines


def published_mask(lines: list[tuple[set[int], set[int]]], chunk: Chunk) -> Tensor:
    """Which pairs the published method reads, before it widens them to tiles: bool [Hq, Tq, N]."""
    mask = torch.zeros(len(lines), chunk.length, chunk.start + chunk.length, dtype=torch.bool)
    for head, (verticals, slashes) in enumerate(lines):
        for row in range(chunk.length):
            position = chunk.start + row
            mask[head, row, [j for j in verticals if j <= position]] = True
            mask[head, row, [position - d for d in slashes if d <= position]] = True
    return mask


@pytest.mark.parametrize("start", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("length", [65, 129, 200])
@pytest.mark.parametrize(("vertical", "slash"), [(40, 110), (5, 50), (30, 100), (80, 130)])
def test_selection_is_a_causal_superset_of_the_published_mask(
    start: int, length: int, vertical: int, slash: int
) -> None:
    q, k, v = make_qkv(start, length, 4, 2)
    chunk = make_chunk(start, length)
    selection = attached(MInference(vertical, slash)).select(0, q, make_keys(k, v), chunk, scale=SCALE)
    got = selected_mask(without_exact(selection), chunk)
    wanted = published_mask(published_lines(q, k, chunk, vertical, slash), chunk)
    assert (got | ~wanted).all()
    assert got.any(-1).all(), "every row reads a key"
    listed_causally(selection, chunk)


def listed_causally(selection: Selection, chunk: Chunk) -> None:
    """Lists ascend, without duplicates, to their rows' own page; gathered keys lie in other pages."""
    assert selection.gathered is not None
    for head in range(selection.pages.num_heads):
        for block in range(selection.pages.counts.shape[1]):
            own_page = chunk.start // 64 + block
            pages, columns = (
                lists.indices[int(lists.starts[head, block]) :][: int(lists.counts[head, block])].tolist()
                for lists in (selection.pages, selection.gathered)
            )
            assert pages == sorted(set(pages)) and pages[-1] == own_page
            assert columns == sorted(set(columns)) and all(column // 64 < own_page for column in columns)
            assert not {column // 64 for column in columns} & set(pages), "no key is read twice"


@pytest.mark.parametrize("start", [0, 1, 64, 1000])
@pytest.mark.parametrize("budgets", [(2000, 2000), (1, 2000), (2000, 1)])
def test_budgets_that_cover_everything_equal_dense(start: int, budgets: tuple[int, int]) -> None:
    q, k, v = make_qkv(start, 200, 4, 2)
    chunk, keys = make_chunk(start, 200), make_keys(k, v)
    selection = attached(MInference(*budgets)).select(0, q, keys, chunk, scale=SCALE)
    assert int(read_cells(selection, chunk, 4)) == causal_cells(chunk, 4)
    got = attend(q, keys, chunk, without_exact(selection), scale=SCALE)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
    torch.testing.assert_close(got.out, full.out, atol=1e-5, rtol=0)  # fp32
    torch.testing.assert_close(got.lse, full.lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budgets", [(5, 50), (1, 1)])
def test_budgets_below_the_forced_lines_read_the_forced_lines(budgets: tuple[int, int]) -> None:
    """As published, an arbitrary 50 of the 100 forced distances stay: rows may lose every key."""
    q, k, v = make_qkv(0, 1000, 4, 2)
    chunk, keys = make_chunk(0, 1000), make_keys(k, v)
    selection = attached(MInference(*budgets)).select(0, q, keys, chunk, scale=SCALE)
    forced = attached(MInference(30, 100)).select(0, q, keys, chunk, scale=SCALE)
    mask = selected_mask(without_exact(selection), chunk)
    assert torch.equal(mask, selected_mask(without_exact(forced), chunk))
    rows, cols = torch.arange(1000)[:, None], torch.arange(1000)
    wanted = (cols <= rows) & ((cols < 30) | (rows - cols < 100))
    assert (mask | ~wanted).all()
    allowed = (cols <= rows) & ((cols < 30) | (rows // 64 - cols // 64 <= 2))  # ceil(99 / 64) = 2 pages back
    assert (~mask | allowed).all()
    got = attend(q, keys, chunk, without_exact(selection), scale=SCALE)
    out, _ = attention(q.double(), k.double(), v.double(), mask, SCALE)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[0.0, 0.0, 1.0, 5.0, 1.0, 1.0, 9.0], [0.0] * 7])
    kept = keep_lines(scores, torch.tensor([5, 4]), 2, 5)
    assert kept.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 6, 0, 1, 2, 3]


def test_a_threshold_stops_at_the_line_that_reaches_it() -> None:
    scores = torch.tensor([[1.0, 1.0, 4.0, 3.0, 1.0, 0.0]])  # 10 in all; line 0 is forced

    def kept(threshold: float, budget: int = 6) -> list[int]:
        lines = keep_lines(scores, torch.tensor([budget]), 1, 6, threshold)
        return lines.nonzero()[:, 1].tolist()

    assert kept(0.05) == kept(0.1) == [0], "the forced line is kept, and counts"
    assert kept(0.11) == kept(0.5) == [0, 2]
    assert kept(0.51) == kept(0.8) == [0, 2, 3]
    assert kept(0.81) == kept(0.9) == [0, 1, 2, 3]
    assert kept(0.99) == [0, 1, 2, 3, 4], "a line that holds nothing is never needed"
    assert kept(0.99, budget=3) == [0, 2, 3], "budgets are caps"


@pytest.mark.parametrize("start", [0, 1, 64, 1000])
@pytest.mark.parametrize(("threshold", "budgets"), [(0.3, (500, 500)), (0.9, (800, 800)), (0.9, (100, 150))])
def test_a_threshold_reads_as_many_lines_as_hold_it_and_as_budgets_allow(
    start: int, threshold: float, budgets: tuple[int, int]
) -> None:
    q, k, v = make_qkv(start, 200, 4, 2)
    q[1:3] *= 3  # heads that look at few keys, beside heads that look at many
    chunk, keys = make_chunk(start, 200), make_keys(k, v)
    method = attached(MInference(*budgets, threshold=threshold))
    selection = method.select(0, q, keys, chunk, scale=SCALE)
    got = selected_mask(without_exact(selection), chunk)
    lines = published_lines(q, k, chunk, *budgets, threshold)
    assert (got | ~published_mask(lines, chunk)).all()
    listed_causally(selection, chunk)
    for head, (verticals, slashes) in enumerate(lines):
        alone = attached(MInference(len(verticals), len(slashes))).select(0, q, keys, chunk, scale=SCALE)
        assert torch.equal(got[head], selected_mask(without_exact(alone), chunk)[head])


def test_a_higher_threshold_reads_no_less() -> None:
    q, k, v = make_qkv(600, 200, 4, 2)
    q *= 4
    chunk, keys = make_chunk(600, 200), make_keys(k, v)
    masks = [
        selected_mask(without_exact(method.select(0, q, keys, chunk, scale=SCALE)), chunk)
        for method in (attached(MInference(800, 800, threshold=t)) for t in (1e-6, 0.2, 0.5, 0.9, 0.999999))
    ]
    for less, more in zip(masks, masks[1:], strict=False):
        assert (more | ~less).all()
    assert masks[0].sum() < masks[2].sum() < masks[4].sum()
    forced = attached(MInference(30, 100)).select(0, q, keys, chunk, scale=SCALE)
    assert torch.equal(masks[0], selected_mask(without_exact(forced), chunk)), "the forced lines are a floor"
    assert masks[4].sum() == 4 * causal(600, 200).sum(), "and all of the attention is everything"


def test_every_head_keeps_its_own_budget() -> None:
    scores = torch.rand(3, 400, generator=torch.Generator().manual_seed(0))
    budgets = torch.tensor([30, 77, 1000])
    kept = keep_lines(scores, budgets, 30, 400)
    assert kept.sum(1).tolist() == [30, 77, 400]
    for head in range(3):
        order = [*range(30), *sorted(range(30, 400), key=lambda j: -float(scores[head, j]))]
        assert set(kept[head].nonzero()[:, 0].tolist()) == set(order[: int(budgets[head])])


def planted(vertical: int, distance: int, num_tokens: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """One head whose queries look at one key, and at the key `distance` before them. [1, N, 64] each.

    All queries ask for one dimension, which only key `vertical` has. In the others every position has a
    direction of its own, which the query `distance` later asks for.
    """
    g = torch.Generator().manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(num_tokens, 63, generator=g), dim=1)
    q, k = torch.zeros(1, num_tokens, 64), torch.zeros(1, num_tokens, 64)
    k[0, :, :63], q[0, distance:, :63] = own, 60 * own[: num_tokens - distance]
    q[0, :, 63], k[0, vertical, 63] = 60, 1
    return q, k, torch.randn(1, num_tokens, 64, generator=g)


def test_a_planted_line_of_each_kind_is_selected_and_little_else_is_read() -> None:
    vertical, distance = 333, 1000
    q, k, v = planted(vertical, distance)
    chunk = make_chunk(0, 2048)
    method = MInference(31, 101)
    method.attach(make_model(num_query_heads=1, num_kv_heads=1), Path("."), StateRegistry())
    selection = method.select(0, q, make_keys(k, v), chunk, scale=SCALE)
    mask = selected_mask(without_exact(selection), chunk)[0]
    rows = torch.arange(2048)
    assert mask[vertical:, vertical].all()
    assert mask[rows[distance:], rows[distance:] - distance].all()
    # 15 and 16 pages back hold the slash, 0 to 2 the local band; all other keys are sinks or the vertical.
    pages_back = rows[:, None] // 64 - rows // 64
    by_page = (pages_back <= 2) | (pages_back == 15) | (pages_back == 16)
    extra = mask & ~by_page
    assert set(extra.nonzero()[:, 1].tolist()) == {*range(30), vertical}
    dense_cells = causal_cells(chunk, 1)
    assert int(read_cells(without_exact(selection), chunk, 1)) == int(mask.sum()) < 0.25 * dense_cells
    assert int(read_cells(selection, chunk, 1)) < 0.3 * dense_cells, (
        "the estimator's rows are counted as dense"
    )


def test_last_rows_are_exact() -> None:
    q, k, v = make_qkv(500, 300, 4, 2)
    chunk, keys = make_chunk(500, 300), make_keys(k, v)
    selection = attached(MInference(30, 100)).select(0, q, keys, chunk, scale=SCALE)
    assert selection.estimator_rows == 64
    got = attend(q, keys, chunk, selection, scale=SCALE)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
    torch.testing.assert_close(got.out[:, -64:], full.out[:, -64:], atol=1e-5, rtol=1e-5)  # fp32
    assert not torch.allclose(got.out[:, :-64], full.out[:, :-64], atol=1e-2)


@pytest.mark.parametrize("length", [1, 17, 64])
def test_chunks_that_the_estimator_covers_are_dense(length: int) -> None:
    q, k, v = make_qkv(1000, length, 4, 2)
    selection = attached(MInference()).select(0, q, make_keys(k, v), make_chunk(1000, length), scale=SCALE)
    assert selection.is_dense and selection.estimator_rows == length


def test_selecting_and_judging_never_wait_for_the_device() -> None:
    """Meta tensors have no values: whatever would bring one to the host raises."""
    q, k, v = (x.to("meta") for x in make_qkv(100, 200, 4, 2))
    pages = torch.empty(2, 5, dtype=torch.int32, device="meta")
    pool = torch.empty(10, 64, 16, device="meta")
    keys = PagedKeys(300, pool, pool, pages)
    chunk = make_chunk(100, 200)
    selection = attached(MInference(40, 120)).select(0, q, keys, chunk, scale=SCALE)
    recalled = recall(q, keys, chunk, selection, scale=SCALE)
    raised = raise_to_floor(selection, recalled, 0.9)
    assert raised.pages.counts.is_meta and read_cells(raised, chunk, 4).is_meta
    with pytest.raises(RuntimeError):
        recalled.mean().item()


def test_fewer_last_rows_may_decide() -> None:
    q, k, v = make_qkv(0, 200, 4, 2)
    selection = attached(MInference(last_q=16)).select(0, q, make_keys(k, v), make_chunk(0, 200), scale=SCALE)
    assert selection.estimator_rows == 16
    assert selection.exact is not None and selection.exact.lse.shape == (4, 16)


def test_methods_are_found_by_their_plan_names() -> None:
    grids = {name: method().grid for name, method in PREFILL_METHODS.items()}
    free = {"dense", "mean_pool", "xattention", "flashprefill", "hip", "seerattention"}
    assert grids == {"minference": True, "flexprefill": True} | dict.fromkeys(free, False)


def test_dense_method_selects_everything() -> None:
    q, k, v = make_qkv(0, 10, 4, 2)
    keys: KeyView = make_keys(k, v)
    assert PREFILL_METHODS["dense"]().select(0, q, keys, make_chunk(0, 10), scale=SCALE).is_dense
