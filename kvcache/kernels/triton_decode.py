"""Decode attention over rows on a GPU: paged flash-decoding, the keys of a row split among programs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE
from configs.quantised import is_quantised
from configs.triton_softmax import LN_2, LOG2_E, fold, logits, read_page
from configs.triton_target import num_processors
from kvcache.decode import RowSelection

# ----------------------------------------------------------------------
# the kernels
#
# A row is one KV head of one sequence; its G query heads share every key that is read. `num_splits` programs
# share a row, by what it holds, so that one long row keeps the whole GPU busy and a short one does not wait:
#
#     held 700, 3 splits      pages 0 1 2 3 | 4 5 6 7 | 8 9 10        each leaves its part and its lse
#     held  70, 3 splits      pages 0 1     |         |               the empty ones leave at once
#
# Where a selection says what is read, as many of its units as make a page take the place of one.
# ----------------------------------------------------------------------


@triton.jit
def _split_pages(
    length,  # tokens held, or units selected
    num_splits,
    WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Of a row: its first page that is read, the page after its last one, and the pages of each split."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // PAGE
    if UNIT > 0:
        length *= UNIT
    end = tl.cdiv(length, PAGE)
    return first, end, tl.maximum(tl.cdiv(end - first, num_splits), LEAST)


@triton.jit
def _load_tokens(
    pool,
    page,
    offset,
    visible,
    like,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Tokens of any pages as `read_page` gives those of one. page, offset, visible [PAGE]."""
    offset_d = tl.arange(0, BLOCK_D)
    token = page.to(tl.int64) * PAGE + offset
    pointers = pool + token[:, None] * D + offset_d[None, :]
    mask = visible[:, None]
    if BLOCK_D != D:
        mask = mask & (offset_d < D)[None, :]
    tile = tl.load(pointers, mask=mask, other=0.0)
    return tile.to(like.dtype)


@triton.jit(
    do_not_specialize=["num_splits", "num_ids", "stride_pages_batch", "stride_pages_head"],
    # of any layer: parts of larger tensors begin anywhere
    do_not_specialize_on_alignment=["pages", "held", "ids", "counts"],
)
def _rows_kernel(
    q,  # [B, Hq, D], last axis contiguous
    k_pool,  # [num_pages, PAGE, D]
    v_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    v_scales,
    pages,  # [B, Hkv, P] int32, by place
    held,  # [B, Hkv] int32
    ids,  # [B, Hkv, num_ids] int32 of the units that are read, ascending (None: all is read)
    counts,  # [B, Hkv] int32: ids that count
    sinks,  # [Hq] fp32, natural log (None without)
    out,  # [B, Hq, D]; of several splits [B * Hkv, num_splits, GROUP, D] fp32
    lse,  # [B, Hq] fp32, natural log (None: not asked for); of splits [B * Hkv, num_splits, GROUP], base 2
    factor,  # scale * log2(e); with a softcap, 2 * log2(e) * scale / softcap
    num_splits,
    num_ids,
    stride_q_batch,
    stride_q_head,
    stride_pages_batch,
    stride_pages_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_M: tl.constexpr,  # GROUP rounded up to what tensor cores multiply
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,  # pages that are worth a split
    SPLIT: tl.constexpr,  # several programs per row
    UNIT: tl.constexpr,  # tokens that an id stands for, 0 = all is read
    WINDOW: tl.constexpr,  # the last tokens that are read, 0 = all
    SOFTCAP: tl.constexpr,  # 0 = none
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter multiplies raw bf16 bits
):
    row = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    num_held = tl.load(held + row)
    length = tl.load(counts + row) if UNIT > 0 else num_held
    first_page, end_page, span = _split_pages(length, num_splits, WINDOW, UNIT, PAGE, LEAST)
    begin = first_page + split * span
    end = tl.minimum(begin + span, end_page)
    if (begin >= end) & (split > 0):
        return

    batch = (row // KV_HEADS).to(tl.int64)
    kv_head = row % KV_HEADS
    offset_m = tl.arange(0, BLOCK_M)
    offset_d = tl.arange(0, BLOCK_D)
    head_mask = offset_m < GROUP
    tile_mask = head_mask[:, None] & (offset_d < D)[None, :]
    heads = kv_head * GROUP + offset_m
    q_offsets = batch * stride_q_batch + heads[:, None] * stride_q_head + offset_d[None, :]
    q_tile = tl.load(q + q_offsets, mask=tile_mask, other=0.0)
    if UPCAST:
        q_tile = q_tile.to(tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # a key with this logit and the value zero, in the first split
        sink = tl.load(sinks + heads, mask=head_mask, other=float("-inf"))
        peak = tl.where(split == 0, sink * LOG2_E, float("-inf"))
        total += tl.where(split == 0, 1.0, 0.0)
    # a softcap leaves base-2 logits behind; otherwise the factor rides on the FMA inside exp2
    fold_factor = 1.0 if SOFTCAP > 0 else factor

    page_row = pages + batch * stride_pages_batch + kv_head * stride_pages_head
    for i in tl.range(begin, end):
        place = i * PAGE + tl.arange(0, PAGE)
        # what is not held is unwritten memory: 0 * NaN would reach the sum
        if UNIT > 0:
            visible = place < length * UNIT
            unit = tl.load(ids + row.to(tl.int64) * num_ids + place // UNIT, mask=visible, other=0)
            place = unit * UNIT + place % UNIT
            visible &= place < num_held
            page = tl.load(page_row + place // PAGE, mask=visible, other=0)
            keys = _load_tokens(k_pool, page, place % PAGE, visible, q_tile, D, BLOCK_D, PAGE)
            values = _load_tokens(v_pool, page, place % PAGE, visible, q_tile, D, BLOCK_D, PAGE)
            token = page.to(tl.int64) * PAGE + place % PAGE
        else:
            page = tl.load(page_row + i)
            keys = read_page(k_pool, page, num_held - i * PAGE, q_tile, D, BLOCK_D, PAGE)
            values = read_page(v_pool, page, num_held - i * PAGE, q_tile, D, BLOCK_D, PAGE)
            token = page.to(tl.int64) * PAGE + tl.arange(0, PAGE)
            visible = place < num_held
            if WINDOW > 0:
                visible &= place >= num_held - WINDOW
        if k_scales is not None:
            key_scales = tl.load(k_scales + token, mask=visible, other=0.0)
            value_scales = tl.load(v_scales + token, mask=visible, other=0.0)
        else:
            key_scales = None
            value_scales = None
        scores = tl.where(visible[None, :], logits(q_tile, keys, key_scales, factor, SOFTCAP), float("-inf"))
        acc, peak, total = fold(acc, peak, total, scores, values, value_scales, fold_factor, 0.0)

    total = tl.where(total == 0.0, 1.0, total)  # a row that holds nothing: out 0, lse -inf
    acc = acc / total[:, None]
    log_sum = peak + tl.log2(total)
    if SPLIT:
        part = tl.program_id(0).to(tl.int64) * GROUP + offset_m
        tl.store(out + part[:, None] * D + offset_d[None, :], acc, mask=tile_mask)
        tl.store(lse + part, log_sum, mask=head_mask)
    else:
        head = batch * (KV_HEADS * GROUP) + heads
        tl.store(out + head[:, None] * D + offset_d[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
        if LSE:
            tl.store(lse + head, log_sum * LN_2, mask=head_mask)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["lengths"])
def _merge_kernel(
    part_out,  # [B * Hkv, num_splits, GROUP, D] fp32
    part_lse,  # [B * Hkv, num_splits, GROUP] fp32, base 2
    lengths,  # [B, Hkv] int32 tokens held, or units selected
    out,  # [B, Hq, D]
    lse,  # [B, Hq] fp32, natural log (None: not asked for)
    num_splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # parts taken at once
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    WINDOW: tl.constexpr,
    LSE: tl.constexpr,
):
    head = tl.program_id(0)  # of all query heads of the batch
    row = head // GROUP
    first_page, end_page, span = _split_pages(tl.load(lengths + row), num_splits, WINDOW, UNIT, PAGE, LEAST)
    live = tl.maximum(tl.cdiv(end_page - first_page, span), 1)  # splits that left something
    first = row.to(tl.int64) * num_splits * GROUP + head % GROUP
    offset_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = float("-inf")
    total = 0.0
    for s in tl.range(0, live, BLOCK_S):
        offset_s = s + tl.arange(0, BLOCK_S)
        inside = offset_s < live
        part = first + offset_s * GROUP
        log_sums = tl.load(part_lse + part, mask=inside, other=float("-inf"))
        mask = inside[:, None] & (offset_d < D)[None, :]
        outs = tl.load(part_out + part[:, None] * D + offset_d[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(log_sums, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(log_sums - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(outs * weights[:, None], 0)
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)
    out_offsets = head.to(tl.int64) * D + offset_d
    tl.store(out + out_offsets, (acc / total).to(out.dtype.element_ty), mask=offset_d < D)
    if LSE:
        tl.store(lse + head, (peak + tl.log2(total)) * LN_2)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

LEAST_PAGES = 4  # of a split: below, starting a program costs more than it saves
MOST_SPLITS = 128  # of a row: beyond, merging them costs more than it saves
MERGED_AT_ONCE = 16
PROGRAMS_PER_PROCESSOR = 4  # enough loads in flight to hide the latency of memory


@dataclass(frozen=True, slots=True)
class Build:
    """How a program is built."""

    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool | None]:
        """Triton's compile options."""
        # enable_fp_fusion: the default differs between versions of Triton
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# head size rounded up -> build. Decode moves bytes: pages in flight count, and four warps copy one fast.
# Chosen without a GPU, such that several programs fit a multiprocessor (docs/kernels.md).
ROWS_BUILD = {64: Build(4, 5), 128: Build(4, 3), 256: Build(8, 2)}
MERGE_BUILD = Build(4, 1)


def build_for(head_dim: int) -> Build:
    return ROWS_BUILD[max(64, triton.next_power_of_2(head_dim))]


def num_splits(num_rows: int, longest: int, device: torch.device) -> int:
    """Programs per row: enough to fill the device, each with work. longest: tokens that a row may read."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors(device) // max(1, num_rows))
    useful = -(-longest // (PAGE_SIZE * LEAST_PAGES))
    return max(1, min(wanted, useful, MOST_SPLITS))


def constants(
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    split: bool,
    features: Features,
    unit: int,
    lse: bool,
    interpreted: bool,
) -> dict[str, int | float | bool]:
    """The CAPITALS of the kernel over rows."""
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "BLOCK_M": max(16, triton.next_power_of_2(group)),
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PAGE": PAGE_SIZE,
        "LEAST": LEAST_PAGES,
        "SPLIT": split,
        "UNIT": unit,
        "WINDOW": features.window or 0,
        "SOFTCAP": features.softcap or 0.0,
        "SINKS": features.sinks is not None,
        "LSE": lse,
        "UPCAST": interpreted,
    }


def merge_constants(
    *, group: int, head_dim: int, window: int | None, unit: int, lse: bool
) -> dict[str, int | float | bool]:
    """The CAPITALS of the kernel that merges splits."""
    return {
        "GROUP": group,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_S": MERGED_AT_ONCE,
        "PAGE": PAGE_SIZE,
        "LEAST": LEAST_PAGES,
        "UNIT": unit,
        "WINDOW": window or 0,
        "LSE": lse,
    }


def attend_rows(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pages: Tensor,
    held: Tensor,
    *,
    scale: float,
    max_held: int,
    features: Features = NO_FEATURES,
    selection: RowSelection | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """What kvcache.decode.attend_rows gives, in one launch or two and without a host sync: [B, Hq, D].

    q [B, Hq, D], pools [num_pages, PAGE_SIZE, D], pages int32 [B, Hkv, P] by place, held int32 [B, Hkv], none
    over max_held. A window is the last tokens of a row; no selection goes with it. lse [B, Hq] fp32, if
    given, is filled with the log-sum-exp of every head, natural log, sinks included.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = held.shape[1]
    group = num_heads // num_kv_heads
    assert group * num_kv_heads == num_heads and pages.shape[:2] == held.shape, (q.shape, pages.shape)
    assert max_held <= pages.shape[2] * PAGE_SIZE, f"{max_held} tokens in {pages.shape[2]} pages"
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and k_pool.shape == v_pool.shape
    of_codes = is_quantised(k_pool.dtype)
    assert k_pool.dtype == v_pool.dtype and (of_codes or k_pool.dtype == q.dtype), (q.dtype, k_pool.dtype)
    assert (k_scales is not None) == (v_scales is not None) == of_codes, k_pool.dtype
    assert k_pool.shape[1:] == (PAGE_SIZE, head_dim), k_pool.shape
    assert pages.dtype == held.dtype == torch.int32 and pages.stride(2) == 1 and held.is_contiguous()
    assert lse is None or (lse.shape == (batch, num_heads) and lse.is_contiguous())

    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device)
    longest = max_held if features.window is None else min(max_held, features.window + PAGE_SIZE)
    unit, ids, counts = 0, None, None
    if selection is not None:
        assert features.window is None, "layers with a window read all of it"
        unit, ids, counts = selection.unit, selection.ids.contiguous(), selection.counts.contiguous()
        longest = min(max_held, ids.shape[2] * unit)
    splits = num_splits(held.numel(), longest, q.device)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = q.new_empty(held.numel(), splits, group, head_dim, dtype=torch.float32)
        part_lse = q.new_empty(held.numel(), splits, group, dtype=torch.float32)
    log2_scale = scale * math.log2(math.e)
    _rows_kernel[(held.numel() * splits,)](
        q,
        k_pool,
        v_pool,
        k_scales,
        v_scales,
        pages,
        held,
        ids,
        counts,
        features.sinks,
        part_out,
        part_lse,
        log2_scale if features.softcap is None else 2 * log2_scale / features.softcap,
        splits,
        0 if ids is None else ids.shape[2],
        q.stride(0),
        q.stride(1),
        pages.stride(0),
        pages.stride(1),
        **constants(
            num_kv_heads=num_kv_heads,
            group=group,
            head_dim=head_dim,
            split=splits > 1,
            features=features,
            unit=unit,
            lse=lse is not None,
            interpreted=triton.knobs.runtime.interpret,
        ),
        **build_for(head_dim).options(),
    )
    if splits > 1:
        _merge_kernel[(batch * num_heads,)](
            part_out,
            part_lse,
            held if counts is None else counts,
            out,
            lse,
            splits,
            **merge_constants(
                group=group, head_dim=head_dim, window=features.window, unit=unit, lse=lse is not None
            ),
            **MERGE_BUILD.options(),
        )
    return out
