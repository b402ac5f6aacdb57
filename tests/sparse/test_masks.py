"""A mask of pages takes from every kind of selection exactly what it hides, and adds nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from sparse.attention import attend
from sparse.base import Chunk
from sparse.masks import intersect
from sparse.recall import read_cells
from sparse.selection import ALL, BlockLists, ExactRows, Selection, dense, lists_from_mask
from tests.reference import attention, causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection, selected_mask

HEADS, KV_HEADS = 4, 2
CHUNKS = [make_chunk(0, 300), make_chunk(192, 130), make_chunk(64, 1)]
SHAPES = [(lists, block, unit) for lists in (1, 2, 4) for block in (64, 128) for unit in (None, 1, 16)]


def random_mask(chunk: Chunk, density: float = 0.6, seed: int = 1) -> Tensor:
    """A causal mask [KV_HEADS, B, P] in which every page of queries reads itself."""
    first, last = chunk.start // PAGE_SIZE, -(-(chunk.start + chunk.length) // PAGE_SIZE)
    mask = torch.rand(KV_HEADS, last - first, last, generator=torch.Generator().manual_seed(seed)) < density
    own = torch.eye(last, dtype=torch.bool)[first:]
    return (mask | own) & (torch.arange(last) <= torch.arange(first, last)[:, None])


def by_token(mask: Tensor, chunk: Chunk) -> Tensor:
    """[KV_HEADS, B, P] -> [HEADS, Tq, N]."""
    rows = (chunk.start + torch.arange(chunk.length)) // PAGE_SIZE - chunk.start // PAGE_SIZE
    keys = torch.arange(chunk.start + chunk.length) // PAGE_SIZE
    return mask[:, rows][..., keys].repeat_interleave(HEADS // KV_HEADS, dim=0)


def to_heads(mask: Tensor) -> Tensor:
    return mask.repeat_interleave(HEADS // mask.shape[0], dim=0)


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: f"{chunk.start}+{chunk.length}")
@pytest.mark.parametrize(("lists", "block", "unit"), SHAPES)
def test_what_is_left_is_what_both_name(chunk: Chunk, lists: int, block: int, unit: int | None) -> None:
    selection = random_selection(chunk, lists, block, unit)
    mask = random_mask(chunk)
    left = intersect(selection, mask, chunk)
    expected = to_heads(selected_mask(selection, chunk)) & by_token(mask, chunk)
    assert left.query_block == 64 and left.pages.num_heads == max(lists, KV_HEADS)
    assert torch.equal(to_heads(selected_mask(left, chunk)), expected)
    assert int(read_cells(left, chunk, HEADS)) == int(expected.sum()), "nothing is listed twice"


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: f"{chunk.start}+{chunk.length}")
def test_of_a_dense_selection_the_mask_is_left(chunk: Chunk) -> None:
    mask = random_mask(chunk)
    left = intersect(dense(torch.device("cpu")), mask, chunk)
    expected = by_token(mask, chunk) & causal(chunk.start, chunk.length)
    assert torch.equal(to_heads(selected_mask(left, chunk)), expected)


def test_lists_with_room_to_spare_in_any_order_are_filtered_alike() -> None:
    chunk = make_chunk(128, 130)
    selection = random_selection(chunk, HEADS, 64, 8)
    gathered = selection.gathered
    assert gathered is not None
    width = gathered.indices.shape[0] // gathered.starts.numel()
    order = torch.randperm(gathered.starts.numel(), generator=torch.Generator().manual_seed(2))
    starts = (order * (width + 5) + 3).view(gathered.starts.shape)
    indices = torch.full((order.numel() * (width + 5) + 3,), 10**6, dtype=torch.int32)
    for old, new in zip(gathered.starts.flatten().tolist(), starts.flatten().tolist(), strict=True):
        indices[new : new + width] = gathered.indices[old : old + width]
    moved = replace(selection, gathered=BlockLists(starts, gathered.counts, indices, 8))
    mask = random_mask(chunk)
    expected = selected_mask(intersect(selection, mask, chunk), chunk)
    assert torch.equal(selected_mask(intersect(moved, mask, chunk), chunk), expected)


def test_empty_lists_may_begin_where_others_do() -> None:
    """As heads do that gather nothing beside heads that do."""
    chunk = make_chunk(128, 64)
    units = torch.zeros(1, 1, 24, dtype=torch.bool)
    units[..., [1, 3, 8]] = True
    real = lists_from_mask(units, 8)
    zero = torch.zeros(HEADS, 1, dtype=torch.int64)
    for owner in range(HEADS):
        counts = zero.int()
        counts[owner] = real.counts[0]
        pages = lists_from_mask(torch.zeros(HEADS, 1, 3, dtype=torch.bool), PAGE_SIZE)
        selection = Selection(64, pages, BlockLists(zero, counts, real.indices, 8))
        mask = torch.ones(KV_HEADS, 1, 3, dtype=torch.bool)
        mask[:, :, 0] = owner % 2 == 0
        found = selected_mask(intersect(selection, mask, chunk), chunk)
        expected = selected_mask(selection, chunk) & by_token(mask, chunk)
        assert torch.equal(found, expected) and found[owner].any()


def test_exact_rows_obey_the_mask_and_read_all_of_it() -> None:
    chunk = make_chunk(128, 192)
    q, k, v = make_qkv(chunk.start, chunk.length, HEADS, KV_HEADS)
    keys = make_keys(k, v)
    rows = ExactRows(torch.full((HEADS, 30, 16), 7.0), torch.zeros(HEADS, 30))
    selection = replace(random_selection(chunk, HEADS, 64, 16), exact=rows)
    mask = random_mask(chunk)
    left = intersect(selection, mask, chunk)
    assert left.exact is None
    allowed = to_heads(selected_mask(selection, chunk))
    allowed[:, -64:] = True  # their whole page of queries
    allowed &= by_token(mask, chunk) & causal(chunk.start, chunk.length)
    assert torch.equal(selected_mask(left, chunk), allowed)
    out = attend(q, keys, chunk, left, scale=0.25).out
    torch.testing.assert_close(out, attention(q, k, v, allowed, 0.25)[0], atol=1e-5, rtol=1e-5)  # float32


def test_a_list_of_everything_becomes_the_mask_and_gathers_nothing_beside_it() -> None:
    chunk = make_chunk(64, 128)
    selection = random_selection(chunk, HEADS, 64, 1)
    everything = torch.full_like(selection.pages.counts, ALL)
    selection = replace(selection, pages=replace(selection.pages, counts=everything))
    mask = random_mask(chunk)
    left: Selection = intersect(selection, mask, chunk)
    assert left.gathered is not None and not left.gathered.counts.any()
    assert torch.equal(selected_mask(left, chunk), by_token(mask, chunk) & causal(chunk.start, chunk.length))
