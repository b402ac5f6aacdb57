"""The last-window estimator on a GPU: a few rows attend to every key, and their weights summed by line."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.quantised import is_quantised
from configs.triton_softmax import LN_2, fold, logits, read_page, read_scales
from configs.triton_target import num_processors
from sparse.base import KeyView
from sparse.estimator import Estimate

# ----------------------------------------------------------------------
# the kernels
#
# Up to 64 rows of one query head are a tile. The keys are read twice: for the rows' softmax, shared among
# `num_splits` programs per head and merged, then, with its lse known, for sums of finished weights. Every sum
# has one owner, so the same rows give the same bits.
# ----------------------------------------------------------------------


@triton.jit
def _load_rows(
    q,
    head,
    num_rows,
    stride_head,
    stride_row,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The rows of one head as [PAGE, BLOCK_D], zeros after them."""
    offset_m = tl.arange(0, PAGE)
    offset_d = tl.arange(0, BLOCK_D)
    pointers = q + head.to(tl.int64) * stride_head + offset_m[:, None] * stride_row + offset_d[None, :]
    tile = tl.load(pointers, mask=(offset_m < num_rows)[:, None] & (offset_d < D)[None, :], other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _visible(i, page, first, num_rows, PAGE: tl.constexpr):
    """Which keys of block i each row sees: [PAGE, PAGE]."""
    rows = tl.arange(0, PAGE)
    position = i * PAGE + tl.arange(0, PAGE)
    seen = (position[None, :] <= first + rows[:, None]) & (rows < num_rows)[:, None]
    return seen & (page >= 0)


@triton.jit(
    do_not_specialize=["first", "num_rows", "num_pages", "num_splits", "stride_pages"],
    do_not_specialize_on_alignment=["pages"],
)
def _attend_kernel(
    q,  # [Hq, R, D], last axis contiguous
    k_pool,  # [num_pages, PAGE, D]
    v_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    v_scales,
    pages,  # [Hkv, P] int32, -1 = dropped
    part_out,  # [Hq, num_splits, R, D] fp32
    part_lse,  # [Hq, num_splits, R] fp32, base 2
    factor,  # scale * log2(e)
    first,  # position of the first row
    num_rows,  # R
    num_pages,  # that hold keys of the rows
    num_splits,
    stride_q_head,
    stride_q_row,
    stride_pages,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # the heads of a group are neighbours: they share keys in L2
    head = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    span = tl.cdiv(num_pages, num_splits)
    q_tile = _load_rows(q, head, num_rows, stride_q_head, stride_q_row, PAGE, D, BLOCK_D, UPCAST)
    acc = tl.zeros([PAGE, BLOCK_D], tl.float32)
    peak = tl.full([PAGE], float("-inf"), tl.float32)
    total = tl.zeros([PAGE], tl.float32)
    page_row = pages + (head // GROUP).to(tl.int64) * stride_pages
    for i in tl.range(split * span, tl.minimum(split * span + span, num_pages)):
        page = tl.load(page_row + i)
        # beyond the last token the page is unwritten memory: 0 * NaN would reach the sum
        length = tl.where(page >= 0, first + num_rows - i * PAGE, 0)
        keys = read_page(k_pool, page, length, q_tile, D, BLOCK_D, PAGE)
        values = read_page(v_pool, page, length, q_tile, D, BLOCK_D, PAGE)
        if k_scales is not None:
            key_scales = read_scales(k_scales, page, length, PAGE)
            value_scales = read_scales(v_scales, page, length, PAGE)
        else:
            key_scales = None
            value_scales = None
        visible = _visible(i, page, first, num_rows, PAGE)
        scores = tl.where(visible, logits(q_tile, keys, key_scales, factor, 0.0), float("-inf"))
        acc, peak, total = fold(acc, peak, total, scores, values, value_scales, factor, 0.0)
    total = tl.where(total == 0.0, 1.0, total)
    offset_m = tl.arange(0, PAGE)
    offset_d = tl.arange(0, BLOCK_D)
    row_mask = offset_m < num_rows
    part = tl.program_id(0).to(tl.int64) * num_rows + offset_m
    mask = row_mask[:, None] & (offset_d < D)[None, :]
    tl.store(part_out + part[:, None] * D + offset_d[None, :], acc / total[:, None], mask=mask)
    tl.store(part_lse + part, peak + tl.log2(total), mask=row_mask)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_kernel(
    part_out,  # [Hq, num_splits, R, D] fp32
    part_lse,  # [Hq, num_splits, R] fp32, base 2
    out,  # [Hq, R, D]
    lse,  # [Hq, R] fp32, natural log
    num_rows,
    num_splits,
    TILES: tl.constexpr,  # per head
    BLOCK_M: tl.constexpr,  # rows per tile
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = (tl.program_id(0) // TILES).to(tl.int64)
    offset_m = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_d = tl.arange(0, BLOCK_D)
    row_mask = offset_m < num_rows
    mask = row_mask[:, None] & (offset_d < D)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in tl.range(0, num_splits):
        part = (head * num_splits + split) * num_rows + offset_m
        log_sum = tl.load(part_lse + part, mask=row_mask, other=float("-inf"))
        part_tile = tl.load(part_out + part[:, None] * D + offset_d[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, log_sum)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(log_sum - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + weight
        acc = acc * decay[:, None] + part_tile * weight[:, None]
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)
    row = head * num_rows + offset_m
    acc = acc / total[:, None]
    tl.store(out + row[:, None] * D + offset_d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row, (peak + tl.log2(total)) * LN_2, mask=row_mask)


@triton.jit(
    do_not_specialize=["first", "num_rows", "num_pages", "num_runs", "run", "stride_pages"],
    do_not_specialize_on_alignment=["pages"],
)
def _lines_kernel(
    q,  # [Hq, R, D], last axis contiguous
    k_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    pages,  # [Hkv, P] int32, -1 = dropped
    lse,  # [Hq, R] fp32, natural log
    columns,  # [Hq, N] fp32
    diagonals,  # [Hq, N] fp32, by distance
    factor,
    first,
    num_rows,
    num_pages,
    num_runs,
    run,  # blocks of keys that a program owns
    stride_q_head,
    stride_q_row,
    stride_pages,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Row r stands at first + r, key c of block i at i * PAGE + c: their distance is first - i * PAGE + r - c.
    # The segment of distances [first - i * PAGE, + PAGE) thus gets the cells with r >= c of block i, and
    # those with r < c of the block before it. A program owns the columns and segments of its blocks, and
    # reads the block before them once more. After the last block comes one more segment.
    head = tl.program_id(0) // num_runs
    begin = (tl.program_id(0) % num_runs) * run
    end = tl.minimum(begin + run, num_pages + 1)
    num_tokens = first + num_rows
    offset = tl.arange(0, PAGE)
    rows = offset[:, None]
    shift = offset[None, :]
    q_tile = _load_rows(q, head, num_rows, stride_q_head, stride_q_row, PAGE, D, BLOCK_D, UPCAST)
    row_lse = tl.load(lse + head * num_rows + offset, mask=offset < num_rows, other=float("-inf"))
    is_seen = row_lse > float("-inf")  # else the row saw nothing
    log_sum = tl.where(is_seen, row_lse / LN_2, 0.0)
    page_row = pages + (head // GROUP).to(tl.int64) * stride_pages
    line_row = head.to(tl.int64) * num_tokens
    before = tl.zeros([PAGE], tl.float32)
    for i in tl.range(tl.maximum(begin - 1, 0), end):
        page = tl.load(page_row + i, mask=i < num_pages, other=-1)
        length = tl.where(page >= 0, num_tokens - i * PAGE, 0)
        keys = read_page(k_pool, page, length, q_tile, D, BLOCK_D, PAGE)
        key_scales = read_scales(k_scales, page, length, PAGE) if k_scales is not None else None
        visible = _visible(i, page, first, num_rows, PAGE) & is_seen[:, None]
        scores = logits(q_tile, keys, key_scales, factor, 0.0) * factor - log_sum[:, None]
        weights = tl.exp2(tl.where(visible, scores, float("-inf")))
        # [r, t]: the one cell of row r with (r - c) % PAGE == t
        turned = tl.gather(weights, (rows - shift) & (PAGE - 1), 1)
        near = tl.sum(tl.where(shift <= rows, turned, 0.0), 0)
        if i >= begin:
            position = i * PAGE + offset
            tl.store(columns + line_row + position, tl.sum(weights, 0), mask=position < num_tokens)
            distance = first - i * PAGE + offset
            inside = (distance >= 0) & (distance < num_tokens)
            tl.store(diagonals + line_row + distance, near + before, mask=inside)
        before = tl.sum(tl.where(shift > rows, turned, 0.0), 0)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

PROGRAMS_PER_PROCESSOR = 4  # enough loads in flight to hide the latency of memory
# num_warps: a warpgroup of 4 for 64 rows, two where a head of 256 doubles the accumulator
OPTIONS = {
    128: {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
    256: {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True},
}
MERGE_ROWS = 8
MERGE_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}


def options(head_dim: int) -> dict[str, int | bool]:
    """Triton's compile options of the kernels that multiply."""
    return OPTIONS[max(128, triton.next_power_of_2(head_dim))]


def constants(*, head_dim: int, group: int, interpreted: bool) -> dict[str, int | float | bool]:
    """The CAPITALS of the kernels that multiply."""
    return {
        "GROUP": group,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PAGE": PAGE_SIZE,
        "UPCAST": interpreted,
    }


def merge_constants(head_dim: int) -> dict[str, int | float | bool]:
    """The CAPITALS of the kernel that merges splits."""
    block = max(16, triton.next_power_of_2(head_dim))
    return {"TILES": PAGE_SIZE // MERGE_ROWS, "BLOCK_M": MERGE_ROWS, "D": head_dim, "BLOCK_D": block}


def estimate(q_rows: Tensor, first_position: int, keys: KeyView, *, scale: float) -> Estimate:
    """What sparse.estimator.estimate gives for up to 64 rows, in three launches and without a host sync."""
    num_heads, num_rows, head_dim = q_rows.shape
    num_kv_heads = keys.pages.shape[0]
    assert 0 < num_rows <= PAGE_SIZE, num_rows
    assert keys.k_pool.is_contiguous() and keys.v_pool.is_contiguous()
    of_codes = is_quantised(keys.k_pool.dtype)
    assert keys.k_pool.dtype == keys.v_pool.dtype, (keys.k_pool.dtype, keys.v_pool.dtype)
    assert of_codes or keys.k_pool.dtype == q_rows.dtype, (q_rows.dtype, keys.k_pool.dtype)
    assert (keys.k_scales is not None) == (keys.v_scales is not None) == of_codes, keys.k_pool.dtype
    assert keys.pages.dtype == torch.int32 and keys.pages.stride(1) == 1
    assert num_heads % num_kv_heads == 0 and scale > 0, (num_heads, num_kv_heads, scale)
    q = q_rows if q_rows.stride(2) == 1 else q_rows.contiguous()
    num_tokens = first_position + num_rows
    num_pages = triton.cdiv(num_tokens, PAGE_SIZE)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors(q.device), num_heads)
    splits = max(1, min(wanted, num_pages))
    run = triton.cdiv(num_pages + 1, splits)
    part_out = q.new_empty(num_heads, splits, num_rows, head_dim, dtype=torch.float32)
    part_lse = q.new_empty(num_heads, splits, num_rows, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(num_heads, num_rows, dtype=torch.float32)
    columns = q.new_empty(num_heads, num_tokens, dtype=torch.float32)
    diagonals = torch.empty_like(columns)
    capitals = constants(
        head_dim=head_dim,
        group=num_heads // num_kv_heads,
        interpreted=triton.knobs.runtime.interpret,
    )
    factor = scale * math.log2(math.e)
    _attend_kernel[(num_heads * splits,)](
        q,
        keys.k_pool,
        keys.v_pool,
        keys.k_scales,
        keys.v_scales,
        keys.pages,
        part_out,
        part_lse,
        factor,
        first_position,
        num_rows,
        num_pages,
        splits,
        q.stride(0),
        q.stride(1),
        keys.pages.stride(0),
        **capitals,
        **options(head_dim),
    )
    _merge_kernel[(num_heads * PAGE_SIZE // MERGE_ROWS,)](
        part_out,
        part_lse,
        out,
        lse,
        num_rows,
        splits,
        **merge_constants(head_dim),
        **MERGE_OPTIONS,
    )
    num_runs = triton.cdiv(num_pages + 1, run)
    _lines_kernel[(num_heads * num_runs,)](
        q,
        keys.k_pool,
        keys.k_scales,
        keys.pages,
        lse,
        columns,
        diagonals,
        factor,
        first_position,
        num_rows,
        num_pages,
        num_runs,
        run,
        q.stride(0),
        q.stride(1),
        keys.pages.stride(0),
        **capitals,
        **options(head_dim),
    )
    return Estimate(columns, diagonals, out, lse)
