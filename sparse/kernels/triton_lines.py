"""Columns and diagonals as lists on a GPU: heads mark what they keep, query blocks list what they read."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl

from configs.model import PAGE_SIZE
from sparse.estimator import Estimate
from sparse.head_patterns import NUM_LOCAL, NUM_SINKS, HeadGroup
from sparse.lines import LineLists, of_group
from sparse.pattern_masks import line_bar
from sparse.selection import BlockLists

# ----------------------------------------------------------------------
# the kernels
#
# A head walks its sums once, in order, because among equal sums the lower line is kept. What it leaves is
# small: the ids of its columns, and two marks for each page of distances. A query block then finds its pages
# by looking at the marks, and its columns by looking at the ids and, again, the marks.
# ----------------------------------------------------------------------


@triton.jit
def kept_lines(sums, i, num_lines, bar, room, FORCED: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the lines [i, i + BLOCK) are kept, and how many of them equal the bar."""
    line = i + tl.arange(0, BLOCK)
    inside = line < num_lines
    score = tl.load(sums + line, mask=inside, other=float("-inf"))
    forced = line < FORCED
    equal = inside & (forced == 0) & (score == bar)
    is_first = tl.cumsum(equal.to(tl.int32), 0) <= room
    return inside & (forced | (score > bar) | (equal & is_first)), tl.sum(equal.to(tl.int32), 0)


@triton.jit(do_not_specialize=["num_lines", "width"])
def _columns_kernel(
    sums,  # [n, N] fp32, by column
    bars,  # [n] fp32
    rooms,  # [n] int64
    ids,  # [n, width] int32 out: the kept columns, ascending
    counts,  # [n] int32 out
    num_lines,  # N
    width,
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    bar = tl.load(bars + head)
    room = tl.load(rooms + head)
    count = 0
    for i in tl.range(0, num_lines, BLOCK):
        kept, num_equal = kept_lines(sums + head * num_lines, i, num_lines, bar, room, FORCED, BLOCK)
        room -= num_equal
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(ids + head * width + place, i + tl.arange(0, BLOCK), mask=kept & (place < width))
        count += tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + head, count)


@triton.jit(do_not_specialize=["num_lines", "num_marks"])
def _diagonals_kernel(
    sums,  # [n, N] fp32, by distance
    bars,  # [n] fp32
    rooms,  # [n] int64
    floors,  # [n, num_marks] int8 out: does a kept distance d have floor(d / PAGE) of this?
    ceils,  # [n, num_marks] int8 out: the same of ceil(d / PAGE)
    num_lines,  # N
    num_marks,  # P + 1
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,  # lines
    PAGE: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    bar = tl.load(bars + head)
    room = tl.load(rooms + head)
    pages = tl.arange(0, BLOCK // PAGE)
    for i in tl.range(0, num_lines, BLOCK):
        kept, num_equal = kept_lines(sums + head * num_lines, i, num_lines, bar, room, FORCED, BLOCK)
        room -= num_equal
        by_page = tl.reshape(kept.to(tl.int32), [BLOCK // PAGE, PAGE])
        between = tl.where(tl.arange(0, PAGE)[None, :] > 0, by_page, 0)  # not whole pages away
        mark = head * num_marks + i // PAGE + pages
        inside = i // PAGE + pages < num_marks - 1
        tl.store(floors + mark, tl.max(by_page, 1).to(tl.int8), mask=inside)
        tl.store(ceils + mark + 1, tl.max(between, 1).to(tl.int8), mask=inside)


@triton.jit
def _marked(floors, ceils, row, back, inside):
    """Do kept diagonals run through the page that is `back` pages before the block's own?"""
    floor = tl.load(floors + row + back, mask=inside, other=0)
    return (floor | tl.load(ceils + row + back, mask=inside, other=0)) != 0


@triton.jit(do_not_specialize=["first_page", "num_blocks", "num_marks", "page_width", "column_width"])
def _lists_kernel(
    floors,  # [n, num_marks] int8
    ceils,  # [n, num_marks] int8
    ids,  # [n, column_width] int32, ascending
    id_counts,  # [n] int32
    pages,  # [n * B, page_width] int32 out
    page_counts,  # [n * B] int32 out
    columns,  # [n * B, column_width] int32 out
    column_counts,  # [n * B] int32 out
    first_page,
    num_blocks,  # B
    num_marks,
    page_width,
    column_width,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head = program // num_blocks
    own_page = first_page + (program % num_blocks).to(tl.int32)
    marks = head * num_marks
    offset = tl.arange(0, BLOCK)
    count = 0
    for i in tl.range(0, own_page + 1, BLOCK):
        page = i + offset
        inside = page <= own_page
        read = _marked(floors, ceils, marks, own_page - page, inside)
        place = count + tl.cumsum(read.to(tl.int32), 0) - 1
        tl.store(pages + program * page_width + place, page, mask=read & (place < page_width))
        count += tl.sum(read.to(tl.int32), 0)
    tl.store(page_counts + program, count)
    num_columns = tl.load(id_counts + head)
    count = 0
    for i in tl.range(0, num_columns, BLOCK):
        is_column = i + offset < num_columns
        column = tl.load(ids + head * column_width + i + offset, mask=is_column, other=0)
        back = own_page - column // PAGE
        before = is_column & (back > 0)
        alone = before & (_marked(floors, ceils, marks, back, before) == 0)
        place = count + tl.cumsum(alone.to(tl.int32), 0) - 1
        tl.store(columns + program * column_width + place, column, mask=alone)
        count += tl.sum(alone.to(tl.int32), 0)
    tl.store(column_counts + program, count)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

WALK = 4096  # lines of a head at once: one program has a head to itself
WALK_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
LIST = 512  # pages or columns of a query block at once
LIST_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def constants(kernel: str) -> dict[str, int]:
    """The CAPITALS of the kernel that walks columns or diagonals, or makes lists."""
    return {
        "columns": {"FORCED": NUM_SINKS, "BLOCK": WALK},
        "diagonals": {"FORCED": NUM_LOCAL, "BLOCK": WALK, "PAGE": PAGE_SIZE},
        "lists": {"BLOCK": LIST, "PAGE": PAGE_SIZE},
    }[kernel]


def line_lists(
    seen: Estimate, group: HeadGroup, first_page: int, threshold: float | None = None
) -> LineLists:
    """What sparse.lines.line_lists gives: bars by torch, the rest in three launches. No host sync."""
    columns, diagonals = of_group(seen.columns, group), of_group(seen.diagonals, group)
    assert columns.is_contiguous() and diagonals.is_contiguous() and columns.shape == diagonals.shape
    num_heads, num_tokens = columns.shape
    num_pages = triton.cdiv(num_tokens, PAGE_SIZE)
    most_columns, most_diagonals = (min(most, num_tokens) for most in group.most)
    page_width = min(num_pages, 2 * most_diagonals)  # a diagonal of tokens runs through at most two of pages

    ids = columns.new_empty(num_heads, most_columns, dtype=torch.int32)
    id_counts = columns.new_empty(num_heads, dtype=torch.int32)
    bar = line_bar(columns, group.budgets[0], NUM_SINKS, most_columns, threshold)
    _columns_kernel[(num_heads,)](
        columns,
        bar.score,
        bar.room,
        ids,
        id_counts,
        num_tokens,
        most_columns,
        **constants("columns"),
        **WALK_OPTIONS,
    )
    floors = columns.new_zeros(num_heads, num_pages + 1, dtype=torch.int8)
    ceils = torch.zeros_like(floors)
    bar = line_bar(diagonals, group.budgets[1], NUM_LOCAL, most_diagonals, threshold)
    _diagonals_kernel[(num_heads,)](
        diagonals,
        bar.score,
        bar.room,
        floors,
        ceils,
        num_tokens,
        num_pages + 1,
        **constants("diagonals"),
        **WALK_OPTIONS,
    )
    num_blocks = num_pages - first_page
    pages = _empty_lists(num_heads, num_blocks, page_width, PAGE_SIZE, columns.device)
    alone = _empty_lists(num_heads, num_blocks, most_columns, 1, columns.device)
    _lists_kernel[(num_heads * num_blocks,)](
        floors,
        ceils,
        ids,
        id_counts,
        pages.indices,
        pages.counts,
        alone.indices,
        alone.counts,
        first_page,
        num_blocks,
        num_pages + 1,
        page_width,
        most_columns,
        **constants("lists"),
        **LIST_OPTIONS,
    )
    return LineLists(pages, alone)


def _empty_lists(num_heads: int, num_blocks: int, width: int, unit: int, device: torch.device) -> BlockLists:
    """Lists with room for `width` units each, to be written."""
    starts = torch.arange(num_heads * num_blocks, device=device).view(num_heads, num_blocks) * width
    counts = torch.empty(num_heads, num_blocks, dtype=torch.int32, device=device)
    indices = torch.empty(num_heads * num_blocks * width, dtype=torch.int32, device=device)
    return BlockLists(starts, counts, indices, unit)
