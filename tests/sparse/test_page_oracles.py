"""MeanPool, XAttention and FlashPrefill read exactly the pages that their texts name, rule by rule."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcache.state import StateRegistry
from sparse.antidiagonals import antidiagonal_mass
from sparse.base import Chunk, PrefillMethod
from sparse.flashprefill import FlashPrefill
from sparse.mean_pool import MeanPool
from sparse.selection import Selection
from sparse.xattention import XAttention
from tests.reference import causal
from tests.sparse.builders import make_chunk, make_keys, make_model, make_qkv, selected_mask

SCALE = 0.25
PAGE = 64
STARTS = [0, 640]


def select(method: PrefillMethod, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Selection:
    method.attach(make_model(), Path("."), StateRegistry())
    return method.select(0, q, make_keys(k, v), chunk, scale=SCALE)


def read_by(selection: Selection) -> list[list[set[int]]]:
    """The pages that each head and query block reads."""
    lists = selection.pages
    return [
        [
            set(lists.indices[int(start) : int(start) + int(count)].tolist())
            for start, count in zip(starts, counts, strict=True)
        ]
        for starts, counts in zip(lists.starts, lists.counts, strict=True)
    ]


def until_enough(mass: list[float], forced: set[int], share: float) -> set[int]:
    """Forced pages first, then by falling mass while what is held is less than the share."""
    kept = set(forced)
    held = sum(mass[page] for page in kept)
    for page in sorted(set(range(len(mass))) - kept, key=lambda page: (-mass[page], page)):
        if held >= share * sum(mass):
            break
        kept.add(page)
        held += mass[page]
    return kept


def antidiagonal_squares(q: Tensor, k: Tensor, stride: int, start: int) -> Tensor:
    """softmax over the mean score of the antidiagonal of each square, pair by pair: [H, T / S, N / S]."""
    num_heads, length, _ = q.shape
    scores = SCALE * q.double() @ k.double().repeat_interleave(num_heads // k.shape[0], 0).mT
    num_rows, num_columns = length // stride, k.shape[1] // stride
    squares = torch.full((num_heads, num_rows, num_columns), -math.inf, dtype=torch.double)
    for t in range(num_rows):
        for u in range(start // stride + t + 1):
            pairs = [(t * stride + stride - 1 - s, u * stride + s) for s in range(stride)]
            squares[:, t, u] = sum(scores[:, row, key] for row, key in pairs) / stride
    return squares.softmax(-1)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_xattention_adds_pages_until_antidiagonals_hold_the_threshold(
    start: int, stride: int, threshold: float
) -> None:
    q, k, v = make_qkv(start, 192, 4, 2)
    method = XAttention(stride=stride, threshold=threshold, sink=1, window=1)
    got = read_by(select(method, q, k, v, make_chunk(start, 192)))
    squares = antidiagonal_squares(q, k, stride, start)
    side = PAGE // stride
    for head in range(4):
        for block in range(3):
            own = start // PAGE + block
            rows = squares[head, block * side : (block + 1) * side]
            mass = [float(rows[:, page * side : (page + 1) * side].sum()) for page in range(own + 1)]
            assert got[head][block] == until_enough(mass, {0, own}, threshold), (head, block)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 130), (5, 63), (100, 130), (640, 63)])
@pytest.mark.parametrize("pieces", [1, 1 << 24])
def test_the_mass_of_a_query_block_adds_up_to_its_squares(
    start: int, length: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of its page the chunk has, and in however many pieces it is computed."""
    monkeypatch.setattr("sparse.antidiagonals.SCORE_ELEMS", pieces)
    q, k, v = make_qkv(start, length, 4, 2)
    keys, chunk = make_keys(k, v), make_chunk(start, length)
    num_tokens = start + length
    mass = antidiagonal_mass(q, keys, chunk, stride=8, scale=SCALE)
    for block in range(mass.shape[1]):
        page = start // PAGE + block
        squares = {at // 8 for at in range(max(start, page * PAGE), min(num_tokens, (page + 1) * PAGE))}
        torch.testing.assert_close(mass[:, block].sum(-1), torch.full((4,), float(len(squares))))  # fp32
        assert (mass[:, block, page + 1 :] == 0).all()


def line(kind: str, at: int) -> tuple[Tensor, Tensor]:
    """One head whose queries all look at key `at`, or at the key `at` before them. q and k [1, 1024, 512]."""
    g = torch.Generator().manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(1024, 511, generator=g), dim=1)
    q, k = torch.zeros(1, 1024, 512), torch.zeros(1, 1024, 512)
    if kind == "vertical":
        q[0, :, 511], k[0, at, 511] = 500, 1
    else:
        k[0, :, :511], q[0, at:, :511] = own, 500 * own[: 1024 - at]
    return q, k


@pytest.mark.parametrize(
    ("kind", "at"), [("vertical", 300), ("vertical", 303), ("slash", 401), ("slash", 405), ("slash", 407)]
)
def test_xattention_finds_a_single_line(kind: str, at: int) -> None:
    q, k = line(kind, at)
    selection = select(XAttention(threshold=0.8), q, k, torch.zeros_like(k), make_chunk(0, 1024))
    mask = selected_mask(selection, make_chunk(0, 1024))[0]
    rows = torch.arange(512, 1024)
    assert mask[rows, torch.full_like(rows, at) if kind == "vertical" else rows - at].all()
    assert mask[512:].float().mean() < 0.4


@pytest.mark.parametrize("stride", [8, 16])
def test_antidiagonals_never_meet_a_single_diagonal_at_an_even_distance(stride: int) -> None:
    """What the published method cannot see: row + key is odd on the antidiagonals of even squares."""
    distance = 400
    q, k = line("slash", distance)
    squares = antidiagonal_squares(q, k, stride, 0)[0]
    on_line = squares[
        torch.arange(distance // stride, 1024 // stride), torch.arange((1024 - distance) // stride)
    ]
    full = (SCALE * q[0] @ k[0].T).masked_fill(~causal(0, 1024), -math.inf).softmax(-1)
    assert full[torch.arange(distance, 1024), torch.arange(1024 - distance)].min() > 0.9
    assert on_line.median() < 0.05


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("length", [192, 150])
@pytest.mark.parametrize("relative_to", ["all", "unforced"])
def test_flashprefill_keeps_pages_within_a_factor_of_the_best(
    start: int, alpha: float, length: int, relative_to: str
) -> None:
    """Written from the energies, not their logarithms, head by head and row by row of a group."""
    q, k, v = make_qkv(start, length, 4, 2)
    method = FlashPrefill(alpha, relative_to, sink=1, window=1, last_rows_dense=0)
    got = read_by(select(method, q, k, v, make_chunk(start, length)))
    complete = (start + length) // PAGE
    means = k.double()[:, : complete * PAGE].view(2, complete, PAGE, -1).mean(2)
    for head in range(2):
        for block in range(-(-length // PAGE)):
            own = start // PAGE + block
            rows = q[2 * head : 2 * head + 2, block * PAGE : (block + 1) * PAGE].double().flatten(0, 1)
            energy = [
                sum(math.exp(SCALE * float(row @ means[head, page])) for row in rows)
                for page in range(min(own + 1, complete))
            ]
            rivals = [one for page, one in enumerate(energy) if relative_to == "all" or page not in (0, own)]
            kept = {page for page, one in enumerate(energy) if rivals and one >= alpha * max(rivals)}
            assert got[head][block] == kept | {0, own}, (head, block)


def test_flashprefill_bears_huge_scores() -> None:
    q, k, v = make_qkv(0, 256, 4, 2)
    chunk = make_chunk(0, 256)
    for factor in (0.0, 1e4):
        selection = select(
            FlashPrefill(1.0, "all", last_rows_dense=0, window=1, sink=0), factor * q, k, v, chunk
        )
        mask = selected_mask(selection, chunk)
        assert mask.diagonal(dim1=1, dim2=2).all()
        if factor == 0:
            assert torch.equal(mask[0], causal(0, 256)), "equal energies are all within any factor"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("threshold", "top_k"), [(0.3, None), (0.9, None), (0.9, 2), (1.0, 3)])
def test_mean_pool_reads_the_pages_whose_means_fit(start: int, threshold: float, top_k: int | None) -> None:
    q, k, v = make_qkv(start, 192, 4, 2)
    q *= 4
    method = MeanPool(threshold=threshold, top_k=top_k, sink=1, window=1)
    got = read_by(select(method, q, k, v, make_chunk(start, 192)))
    mean_q = q.double().view(4, 3, PAGE, -1).mean(2)
    mean_k = k.double().view(2, -1, PAGE, k.shape[2]).mean(2)
    for head in range(4):
        for block in range(3):
            own = start // PAGE + block
            mass = (SCALE * mean_k[head // 2, : own + 1] @ mean_q[head, block]).softmax(0).tolist()
            kept = until_enough(mass, {0, own}, threshold)
            best = sorted(kept - {0, own}, key=lambda page: (-mass[page], page))[:top_k]
            assert got[head][block] == {0, own, *best}, (head, block)
