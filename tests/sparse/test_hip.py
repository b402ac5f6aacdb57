"""HiP keeps the units that the published descent keeps, probe by probe, and asks for no more keys than it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparse.descent
from configs.descent import descend
from kvcache.state import StateRegistry
from sparse.descent import mean_queries, probed_scores, tabled_scores
from sparse.hip import HiP
from sparse.selection import Selection
from tests.sparse.builders import make_chunk, make_keys, make_model

SCALE = 0.25


def whole_numbers(start: int, length: int, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """q and k whose products are exact, so that an oracle's ties are ours."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 9, (num_heads, length, 16), generator=g).float()
    return q, torch.randint(-8, 9, (num_kv_heads, start + length, 16), generator=g).float()


def best_met(scores: list[float], left: int, right: int, width: int) -> float:
    """One descent as published: scores are those of keys for their best query."""
    best, size = -math.inf, width
    while size >= 1:
        size //= 2
        middle = (left + right) // 2
        in_left, in_right = scores[(left + middle) // 2], scores[(middle + right) // 2]
        if in_left > in_right:
            right, best = middle, max(best, in_left)
        else:
            left, best = middle, max(best, in_right)
    return best


def published_units(
    method: HiP, q: Tensor, k: Tensor, start: int, heads: range, block: int
) -> tuple[set[int], int]:
    """Units that one query block of some heads keeps, and where what it chooses from ends."""
    page = start // 64 + block
    rows = q[:, max(0, page * 64 - start) : (page + 1) * 64 - start]
    first, end = -(-method.sink // 64) * 64, 64 * (page - (method.window + 62) // 64)
    pieces = list(range(first, end, method.widths[0]))
    for stage, width in enumerate(method.widths):
        if stage:
            pieces = [
                part
                for piece in pieces
                for part in range(piece, min(piece + method.widths[stage - 1], end), width)
            ]
        means = rows.unflatten(1, (-1, method.strides[stage])).mean(2)
        score = dict.fromkeys(pieces, -math.inf)
        for head in heads:
            keys = (k[head // (q.shape[0] // k.shape[0])] @ means[head].T).amax(-1).tolist()
            for piece in pieces:
                met = best_met(keys, piece, min(piece + width, end), width)
                score[piece] = max(score[piece], met)
        pieces = sorted(pieces, key=lambda piece: (-score[piece], piece))[: method.keep[stage] // width]
    return {piece // method.widths[-1] for piece in pieces}, end


def kept_units(selection: Selection, head: int, block: int) -> set[int]:
    assert selection.gathered is not None
    start, count = (int(x[head, block]) for x in (selection.gathered.starts, selection.gathered.counts))
    return set(selection.gathered.indices[start : start + count].tolist())


@pytest.mark.parametrize("read_cost", [-1000, 56, 1000_000], ids=["probed", "mixed", "tabled"])
@pytest.mark.parametrize("shared_by", ["layer", "group"])
@pytest.mark.parametrize(
    ("widths", "keep", "strides"),
    [
        ([64, 16, 8], [256, 128, 64], [4, 4, 1]),
        ([256, 32, 16], [512, 128, 64], [8, 16, 64]),
        ([8], [64], [2]),
    ],
)
@pytest.mark.parametrize("start", [0, 512])
def test_units_are_those_of_the_published_funnel(
    widths: list[int],
    keep: list[int],
    strides: list[int],
    shared_by: str,
    start: int,
    read_cost: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse.descent, "READ_COST", read_cost)
    monkeypatch.setattr(sparse.descent, "SCORE_ELEMS", 1 << 18)  # a few blocks at a time
    method = HiP(widths, keep, strides, shared_by, sink=64, window=128, last_rows_dense=0)
    method.attach(make_model(), Path("."), StateRegistry())
    q, k = whole_numbers(start, 768, 4, 2)
    selection = method.select(0, q, make_keys(k, k), make_chunk(start, 768), scale=SCALE)
    lists = [range(4)] if shared_by == "layer" else [range(2), range(2, 4)]
    assert selection.pages.num_heads == len(lists)
    was_pruned = False
    for block in (0, 3, 7, 11):
        for number, heads in enumerate(lists):
            wanted, end = published_units(method, q, k, start, heads, block)
            assert kept_units(selection, number, block) == wanted, (block, number)
            was_pruned |= len(wanted) * widths[-1] < end - 64
    assert was_pruned


@pytest.mark.parametrize("width", [8, 16, 32, 64, 256])
def test_a_descent_ends_on_a_symmetric_peak_wherever_it_is(width: int) -> None:
    peak = torch.arange(width)[:, None]
    scores = -(torch.arange(width) - peak).abs().float()[:, None]  # [width, 1, width]: a head for each peak
    left = torch.zeros(width, 1, 1, dtype=torch.int64)
    asked: list[int] = []

    def look_up(positions: Tensor) -> Tensor:
        asked.append(positions.shape[2])
        return scores.gather(2, positions)

    assert (descend(look_up, left, left + width, width) == 0).all()
    assert asked == [2] * (int(math.log2(width)) + 1)


def test_a_lone_spike_is_mostly_missed() -> None:
    """The known limit of the method: in noise, descents find a spike in a large piece by luck alone."""
    g = torch.Generator().manual_seed(0)
    found = {}
    for width in (8, 32, 256):
        scores = torch.randn(512, 1, width, generator=g)
        at = torch.randint(width, (512, 1, 1), generator=g)
        scores.scatter_(2, at, 100)
        left = torch.zeros(512, 1, 1, dtype=torch.int64)
        met = descend(lambda positions, scores=scores: scores.gather(2, positions), left, left + width, width)
        found[width] = (met == 100).float().mean().item()
    assert 0.45 < found[8] < 0.8 and 0.15 < found[32] < 0.35 and found[256] < 0.1, found


def test_scores_looked_up_are_scores_computed() -> None:
    g = torch.Generator().manual_seed(0)
    queries, k = torch.randn(4, 3, 8, 16, generator=g), torch.randn(2, 5, 64, 16, generator=g)
    held = torch.ones(2, 5, dtype=torch.bool)
    held[1, 2] = False
    k[1, 2] = float("nan")
    positions = torch.randint(320, (4, 3, 50), generator=g)
    one, other = (make(queries, k, held)(positions) for make in (probed_scores, tabled_scores))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # fp32
    in_hole = (positions[2:] // 64 == 2).expand(2, 3, 50)
    assert (one[2:][in_hole] == -math.inf).all() and one[:2].isfinite().all()


def test_means_are_of_the_rows_that_are_there() -> None:
    rows = torch.arange(128.0).view(1, 2, 64, 1)
    present = torch.ones(2, 64, dtype=torch.bool)
    present[0, :10], present[1, 21:] = False, False
    means = mean_queries(rows * present[None, ..., None], present, 8)[0, ..., 0]
    assert means[0, :3].tolist() == [12.5, 12.5, 19.5], "rows 10 to 15, and none before them"
    assert means[1, 2:].tolist() == [64 + 18.0] * 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": [64, 24, 8]}, ["widths (24)", "divide the 64"]),
        ({"widths": [64, 16, 16]}, ["widths (16)", "be less"]),
        ({"widths": [64, 16, 4]}, ["widths (4)", "8 or 16"]),
        ({"widths": [64, 8]}, ["widths", "2, 3 and 3"]),
        ({"keep": [2048, 1000, 512]}, ["keep (1000)", "multiple of the 16"]),
        ({"keep": [1024, 2048, 512]}, ["keep (2048)", "at most the 1024"]),
        ({"strides": [4, 4, 3]}, ["strides (3)", "divide the 64 rows"]),
        ({"shared_by": "head"}, ["shared_by ('head')", "layer or group"]),
        ({"window": 0}, ["window (0)"]),
    ],
)
def test_stages_that_do_not_fit_are_refused(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        HiP(**options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(refusal.value)
