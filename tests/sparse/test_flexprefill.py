"""FlexPrefill covers the published mask of every head, pattern by pattern, and little beyond it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse.attention import attend
from sparse.base import Chunk
from sparse.flexprefill import FlexPrefill, jensen_shannon
from sparse.selection import dense
from tests.reference import causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, selected_mask

SCALE = 0.25
PAGE = 64


def best(scores: list[float], forced: int, budget: int) -> set[int]:
    others = sorted(set(range(len(scores))) - {forced}, key=lambda i: (-scores[i], i))
    return {forced, *others[: budget - 1]}


def published_pages(method: FlexPrefill, q: Tensor, k: Tensor, chunk: Chunk) -> tuple[Tensor, list[float]]:
    """The pages of each head and query block, bool [H, B, P], and how far each head's means are off.

    In blocks of 64, from the text: marginals of the last rows, budgets by coverage, the test of the
    pattern, then columns and diagonals of pages, or the pooled map of the chunk.
    """
    num_tokens, num_rows = chunk.start + chunk.length, method.last_q
    num_pages, first_page = -(-num_tokens // PAGE), chunk.start // PAGE
    least = -(-method.min_budget // PAGE)
    pages = torch.zeros(q.shape[0], num_pages - first_page, num_pages, dtype=torch.bool)
    distances_of_means = []
    for head in range(q.shape[0]):
        keys = k[head // (q.shape[0] // k.shape[0])].double()
        last = q[head, -num_rows:].double()
        scores = (SCALE * last @ keys.T).masked_fill(~causal(num_tokens - num_rows, num_rows), -math.inf)
        weights = scores.softmax(-1)
        distances = [0.0] * num_tokens
        for row, one in enumerate(weights.tolist()):
            for key in range(num_tokens - num_rows + row + 1):
                distances[num_tokens - num_rows + row - key] += one[key] / num_rows
        marginals = (weights.mean(0).tolist(), distances)

        by_page = [[sum(m[p * PAGE : (p + 1) * PAGE]) for p in range(num_pages)] for m in marginals]
        mean_k = torch.stack([keys[p * PAGE : (p + 1) * PAGE].mean(0) for p in range(num_pages)])
        pooled = (SCALE * mean_k @ last.mean(0)).softmax(0).tolist()
        middle = [(a + b) / 2 for a, b in zip(pooled, by_page[0], strict=True)]
        divergence = sum(
            x * math.log(x / m) / 2
            for one in (pooled, by_page[0])
            for x, m in zip(one, middle, strict=True)
            if x > 0
        )
        distances_of_means.append(math.sqrt(max(divergence, 0)))
        by_means = distances_of_means[-1] < method.distance

        kept = []
        for marginal, sums in zip(marginals, by_page, strict=True):
            held, within = 0.0, 0
            for share in sorted(marginal, reverse=True):
                held += share
                within += held <= method.threshold
            budget = min(max((1 + within) // PAGE + 1, least), num_pages)
            kept.append(best(sums, 0, least if by_means else budget))
        for block in range(pages.shape[1]):
            own = first_page + block
            pages[head, block, [p for p in kept[0] if p <= own]] = True
            pages[head, block, [own - d for d in kept[1] if d <= own]] = True
        if by_means:
            cells = []
            for block in range(pages.shape[1]):
                own = first_page + block
                rows = q[head, max(0, own * PAGE - chunk.start) : (own + 1) * PAGE - chunk.start].double()
                shares = (SCALE * mean_k[: own + 1] @ rows.mean(0)).softmax(0).tolist()
                cells += [(share, block, page) for page, share in enumerate(shares)]
            held = 0.0
            for share, block, page in sorted(cells, key=lambda cell: (-cell[0], cell[1:])):
                held += share
                if held > method.threshold * pages.shape[1]:
                    break
                pages[head, block, page] = True
    return pages, distances_of_means


def make_prompt(start: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads, of which two have keys that hardly differ within a page."""
    q, k, v = make_qkv(start, length, 4, 2)
    g = torch.Generator().manual_seed(1)
    by_page = torch.randn(-(-k.shape[1] // PAGE), k.shape[2], generator=g)
    k[1] = by_page.repeat_interleave(PAGE, 0)[: k.shape[1]] + 0.1 * k[1]
    return q, k, v


@pytest.mark.parametrize("start", [0, 64, 640])
@pytest.mark.parametrize("length", [192, 320, 350])
@pytest.mark.parametrize(("threshold", "min_budget"), [(0.3, 64), (0.8, 128)])
def test_selection_covers_the_published_mask_and_at_most_one_page_more_for_each_diagonal(
    start: int, length: int, threshold: float, min_budget: int
) -> None:
    q, k, v = make_prompt(start, length)
    chunk, keys = make_chunk(start, length), make_keys(k, v)
    method = FlexPrefill(threshold, 0.0, min_budget)
    off = published_pages(method, q, k, chunk)[1]
    method = replace(method, distance=sum(sorted(off)[1:3]) / 2)  # two heads go by means, two do not
    selection = method.select(0, q, keys, chunk, scale=SCALE)
    got = selected_mask(replace(selection, exact=None), chunk)
    wanted, _ = published_pages(method, q, k, chunk)
    blocks = (start + torch.arange(length)) // PAGE - start // PAGE
    mask = wanted[:, blocks].repeat_interleave(PAGE, 2)[..., : start + length] & causal(start, length)
    assert (got | ~mask).all()
    page_back = torch.zeros_like(wanted)
    page_back[..., :-1] = wanted[..., 1:]
    extra = got & ~mask
    allowed = page_back[:, blocks].repeat_interleave(PAGE, 2)[..., : start + length]
    by_head = extra & ~allowed
    # A pooled map goes one page beyond the published one: to the page with which it holds the threshold.
    by_means = [one < method.distance for one in off]
    assert all(by_head[head].sum() <= by_means[head] * PAGE * PAGE for head in range(4))


def test_the_last_rows_are_exact() -> None:
    q, k, v = make_prompt(512, 300)
    chunk, keys = make_chunk(512, 300), make_keys(k, v)
    selection = FlexPrefill(0.3, min_budget=64, last_q=32).select(0, q, keys, chunk, scale=SCALE)
    assert selection.estimator_rows == 32
    got = attend(q, keys, chunk, selection, scale=SCALE)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
    torch.testing.assert_close(got.out[:, -32:], full.out[:, -32:], atol=1e-5, rtol=1e-5)  # fp32
    assert not torch.allclose(got.out[:, :-32], full.out[:, :-32], atol=1e-2)


@pytest.mark.parametrize("length", [1, 17, 64])
def test_chunks_that_the_last_rows_cover_are_dense(length: int) -> None:
    q, k, v = make_qkv(1000, length, 4, 2)
    selection = FlexPrefill().select(0, q, make_keys(k, v), make_chunk(1000, length), scale=SCALE)
    assert selection.is_dense and selection.estimator_rows == length


def test_the_distance_of_patterns_is_finite_and_bounded() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.25, 0.25]])
    found = jensen_shannon(p, q)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, math.log(2)]))
    by_hand = (0.25 * math.log(0.25 / 0.375) + 0.5 * math.log(0.5 / 0.375)) / 2 * 2
    torch.testing.assert_close(found[2], torch.tensor(by_hand))


def test_budgets_bound_what_is_read() -> None:
    q, k, v = make_qkv(0, 2048, 4, 2)  # heads that look everywhere
    chunk, keys = make_chunk(0, 2048), make_keys(k, v)
    most = FlexPrefill(0.95, 0.0, min_budget=64, max_budget=128).select(0, q, keys, chunk, scale=SCALE)
    assert int(most.pages.counts.max()) <= 2 + 2 * 2, "two columns, two diagonals over two pages each"
    free = FlexPrefill(0.95, 0.0, min_budget=64).select(0, q, keys, chunk, scale=SCALE)
    assert int(free.pages.counts.max()) > 20
    least = FlexPrefill(1e-6, 0.0, min_budget=512).select(0, q, keys, chunk, scale=SCALE)
    assert int(least.pages.counts[:, -1].min()) >= 8
