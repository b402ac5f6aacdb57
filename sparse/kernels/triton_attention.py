"""Block-sparse attention on a GPU: one Triton launch reads the pages and units that a selection lists."""

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
from configs.triton_softmax import LN_2, LOG2_E, fold, logits, read_page, read_scales
from configs.triton_target import architecture
from sparse.attention import Attended
from sparse.base import Chunk, KeyView
from sparse.correction import corrected
from sparse.selection import ALL, BlockLists, Selection, num_query_blocks

# ----------------------------------------------------------------------
# the kernel
#
# One program owns one tile of BLOCK_M query rows and walks one list. `PACK` query heads of a KV group share
# the tile, position by position, so that every key read from memory serves all of them:
#
#     PACK = 3:   row      0      1      2      3      4      5   ...
#                 query  p0 h0  p0 h1  p0 h2  p1 h0  p1 h1  p1 h2
# ----------------------------------------------------------------------


@triton.jit
def _unit(indices, first, i, is_all, DENSE: tl.constexpr):
    """The i-th page of a list; of a list that says ALL, page i."""
    if DENSE:
        return i
    else:
        return tl.where(is_all, i, tl.load(indices + first + i, mask=is_all == 0, other=0))


@triton.jit(
    do_not_specialize=["start", "num_rows", "num_blocks", "stride_pages", "stride_lse_head"],
    do_not_specialize_on_alignment=["pages"],  # of any layer: parts of larger tensors begin anywhere
)
def _attend_kernel(
    q,  # [Hq, Tq, D], last axis contiguous
    k_pool,  # [num_pages, PAGE, D]
    v_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    v_scales,
    pages,  # [Hkv, P] int32, -1 = dropped
    order,  # [H * B] int64: which list a program walks, longest first (None when DENSE)
    starts,  # [H, B] int64  (None when DENSE, and so are the next two)
    counts,  # [H, B] int32, -1 = ALL
    indices,  # [total] int32
    unit_starts,  # [H, B] int64  (None when UNIT is 0, and so are the next two)
    unit_counts,  # [H, B] int32
    unit_indices,  # [total] int32
    sinks,  # [Hq] fp32, natural log (None without)
    out,  # [Hq, Tq, D]
    lse,  # [Hq, Tq] fp32, natural log
    factor,  # scale * log2(e); with a softcap, 2 * log2(e) * scale / softcap
    start,  # position of the first row
    num_rows,  # Tq, less the rows whose output is known
    num_blocks,  # B
    stride_q_head,
    stride_q_row,
    stride_out_head,
    stride_out_row,
    stride_lse_head,
    stride_pages,
    GROUP: tl.constexpr,  # query heads per KV head
    PACK: tl.constexpr,  # query heads in one tile: GROUP or 1
    SHARE: tl.constexpr,  # groups of PACK heads that walk the same list
    QUERY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two
    PAGE: tl.constexpr,
    DENSE: tl.constexpr,  # every causal page, no lists
    UNIT: tl.constexpr,  # keys per gathered unit, 0 = no gathered part
    WINDOW: tl.constexpr,  # sliding window in tokens, 0 = none
    SOFTCAP: tl.constexpr,  # 0 = none
    SINKS: tl.constexpr,
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter multiplies raw bf16 bits
):
    # which list, which heads, which rows. Tiles of one list are neighbours: they share its keys in L2.
    TILES: tl.constexpr = PACK * QUERY_BLOCK // BLOCK_M
    program = tl.program_id(0)
    tile = program % TILES
    if DENSE:
        block = num_blocks - 1 - program // (TILES * SHARE)  # the last block reads most: first
        head_group = (program // TILES) % SHARE
    else:
        list_id = tl.load(order + program // (TILES * SHARE))
        block = (list_id % num_blocks).to(tl.int32)
        head_group = (list_id // num_blocks).to(tl.int32) * SHARE + (program // TILES) % SHARE
    first_head = head_group * PACK
    kv_head = first_head // GROUP

    offset_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    block_position = (start // QUERY_BLOCK + block) * QUERY_BLOCK
    positions = block_position + offset_m // PACK  # [M]
    rows = positions - start
    row_mask = (rows >= 0) & (rows < num_rows)  # the chunk may begin or end inside a block
    heads = first_head + offset_m % PACK
    offset_d = tl.arange(0, BLOCK_D)
    q_mask = row_mask[:, None] & (offset_d < D)[None, :]
    q_offsets = heads.to(tl.int64) * stride_q_head + rows.to(tl.int64) * stride_q_row
    q_tile = tl.load(q + q_offsets[:, None] + offset_d[None, :], mask=q_mask, other=0.0)
    if UPCAST:
        q_tile = q_tile.to(tl.float32)

    # the pages of this tile: [0, full) need no mask, [full, end) hold a row's own position, none lies beyond
    end_position = start + num_rows
    tile_first = block_position + tile * BLOCK_M // PACK
    tile_last = tl.minimum(block_position + (tile * BLOCK_M + BLOCK_M - 1) // PACK, end_position - 1)
    first_page = tile_first // PAGE
    last_page = tile_last // PAGE
    page_row = pages + kv_head.to(tl.int64) * stride_pages
    begin = 0
    if DENSE:
        first = 0
        is_all = True
        full = first_page
        end = last_page + 1
    else:
        first = tl.load(starts + list_id)
        count = tl.load(counts + list_id)
        is_all = count < 0
        # ascending lists: only the last two entries can reach into a tile, which spans at most two pages
        tail = tl.load(indices + first + count - 1, mask=count > 0, other=-1)
        before = tl.load(indices + first + count - 2, mask=count > 1, other=-1)
        full = count - (tail >= first_page).to(tl.int32) - (before >= first_page).to(tl.int32)
        end = count - (tail > last_page).to(tl.int32) - (before > last_page).to(tl.int32)
        full = tl.where(is_all, first_page, full)
        end = tl.where(is_all, last_page + 1, end)
    if WINDOW > 0:
        if DENSE:
            begin = tl.maximum(tile_first - WINDOW + 1, 0) // PAGE
        else:
            begin = tl.where(is_all, tl.maximum(tile_first - WINDOW + 1, 0) // PAGE, 0)
        full = begin  # the far edge of the window cuts pages too: mask them all
    has_rows = (tile_last >= tile_first) & (tile_last >= start)
    full = tl.where(has_rows, full, begin)
    end = tl.where(has_rows, end, begin)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # a key with this logit and the value zero
        peak = tl.load(sinks + heads) * LOG2_E
        total += 1.0
    # a softcap leaves base-2 logits behind; otherwise the factor rides on the FMA inside exp2
    fold_factor = 1.0 if SOFTCAP > 0 else factor

    if WINDOW == 0:
        for i in tl.range(begin, full):
            page = tl.load(page_row + _unit(indices, first, i, is_all, DENSE))
            length = tl.where(page >= 0, PAGE, 0)
            keys = read_page(k_pool, page, length, q_tile, D, BLOCK_D, PAGE)
            values = read_page(v_pool, page, length, q_tile, D, BLOCK_D, PAGE)
            if k_scales is not None:
                key_scales = read_scales(k_scales, page, length, PAGE)
                value_scales = read_scales(v_scales, page, length, PAGE)
            else:
                key_scales = None
                value_scales = None
            scores = logits(q_tile, keys, key_scales, factor, SOFTCAP)
            bias = tl.where(page >= 0, 0.0, float("-inf"))
            acc, peak, total = fold(acc, peak, total, scores, values, value_scales, fold_factor, bias)

    # with a window this loop reads everything, else two pages at most: not worth filling a pipeline for
    for i in tl.range(full, end, num_stages=None if WINDOW > 0 else 1):
        unit = _unit(indices, first, i, is_all, DENSE)
        page = tl.load(page_row + unit)
        # beyond the last token the page is unwritten memory: 0 * NaN would reach the sum
        length = tl.where(page >= 0, end_position - unit * PAGE, 0)
        keys = read_page(k_pool, page, length, q_tile, D, BLOCK_D, PAGE)
        values = read_page(v_pool, page, length, q_tile, D, BLOCK_D, PAGE)
        if k_scales is not None:
            key_scales = read_scales(k_scales, page, length, PAGE)
            value_scales = read_scales(v_scales, page, length, PAGE)
        else:
            key_scales = None
            value_scales = None
        key_positions = unit * PAGE + tl.arange(0, PAGE)
        visible = key_positions[None, :] <= positions[:, None]
        if WINDOW > 0:
            visible &= key_positions[None, :] > positions[:, None] - WINDOW
        scores = tl.where(visible, logits(q_tile, keys, key_scales, factor, SOFTCAP), float("-inf"))
        bias = tl.where(page >= 0, 0.0, float("-inf"))
        acc, peak, total = fold(acc, peak, total, scores, values, value_scales, fold_factor, bias)

    if UNIT > 0:
        # gathered units lie before the block, so causality asks nothing. ALL reads them as pages already.
        unit_first = tl.load(unit_starts + list_id)
        unit_keys = tl.load(unit_counts + list_id) * UNIT
        unit_keys = tl.where(has_rows & (is_all == 0), unit_keys, 0)
        # each row has an address of its own, and addresses are what spills first
        GATHER: tl.constexpr = PAGE if BLOCK_D <= 128 else 32
        AHEAD: tl.constexpr = BLOCK_D <= 64 or (BLOCK_D <= 128 and WINDOW == 0 and SOFTCAP == 0)
        for i in tl.range(0, unit_keys, GATHER, num_stages=None if AHEAD else 1):
            offset_n = i + tl.arange(0, GATHER)
            inside = offset_n < unit_keys
            unit = tl.load(unit_indices + unit_first + offset_n // UNIT, mask=inside, other=0)
            key_positions = unit * UNIT + offset_n % UNIT
            page = tl.load(page_row + key_positions // PAGE, mask=inside, other=-1)
            held = page >= 0
            tokens = page.to(tl.int64) * PAGE + key_positions % PAGE
            offsets = tokens * D
            key_mask = held[:, None] & (offset_d < D)[None, :]
            keys = tl.load(k_pool + offsets[:, None] + offset_d[None, :], mask=key_mask, other=0.0)
            values = tl.load(v_pool + offsets[:, None] + offset_d[None, :], mask=key_mask, other=0.0)
            if k_scales is not None:
                key_scales = tl.load(k_scales + tokens, mask=held, other=0.0)
                value_scales = tl.load(v_scales + tokens, mask=held, other=0.0)
            else:
                key_scales = None
                value_scales = None
            keys = keys.to(q_tile.dtype)
            values = values.to(q_tile.dtype)
            if WINDOW > 0:
                visible = held[None, :] & (key_positions[None, :] > positions[:, None] - WINDOW)
            else:
                visible = held[None, :]
            scores = tl.where(visible, logits(q_tile, keys, key_scales, factor, SOFTCAP), float("-inf"))
            acc, peak, total = fold(acc, peak, total, scores, values, value_scales, fold_factor, 0.0)

    total = tl.where(total == 0.0, 1.0, total)  # a row that saw nothing: out 0, lse -inf
    acc = acc / total[:, None]
    out_offsets = heads.to(tl.int64) * stride_out_head + rows.to(tl.int64) * stride_out_row
    tl.store(out + out_offsets[:, None] + offset_d[None, :], acc.to(out.dtype.element_ty), mask=q_mask)
    log_sum = (peak + tl.log2(total)) * LN_2
    tl.store(lse + heads.to(tl.int64) * stride_lse_head + rows, log_sum, mask=row_mask)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program is built."""

    rows: int  # BLOCK_M
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None = as ptxas likes

    def options(self) -> dict[str, int | bool | None]:
        """Triton's compile options."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # the default differs between versions of Triton
            "maxnreg": self.max_registers,
        }


# architecture -> (head size rounded up, 128 where the rows of a list divide by it) -> how to build a tile.
# Chosen without a GPU, by what the compiler makes of it (docs/kernels.md): the most rows for each key loaded,
# then the deepest pipeline, that spill no register in any combination of parts.
#   sm_80   mma.sync holds Q and K in registers: 64 rows need 8 warps, 128 rows of 128 spill
#   sm_90   wgmma reads K and V from shared memory: a warpgroup of 4 for each 64 rows, two for 128;
#           a head of 256 doubles the accumulator, so even 64 rows are shared by 8 warps
#   sm_100  accumulators live in tensor memory, but the softmax needs them in registers all the same
TILES = {
    80: {
        (64, 64): Tile(64, 8, 2),
        (64, 128): Tile(128, 8, 3),
        (128, 64): Tile(64, 8, 2),
        (128, 128): Tile(64, 8, 2),
        (256, 64): Tile(64, 8, 2),
        (256, 128): Tile(64, 8, 2),
    },
    90: {
        (64, 64): Tile(64, 4, 3),
        (64, 128): Tile(128, 8, 3),
        (128, 64): Tile(64, 4, 3),
        (128, 128): Tile(128, 8, 3),
        (256, 64): Tile(64, 8, 2),
        (256, 128): Tile(64, 8, 2),
    },
    100: {
        (64, 64): Tile(64, 4, 3),
        (64, 128): Tile(128, 8, 3),
        (128, 64): Tile(64, 8, 3, max_registers=255),  # else ptxas spills one to get by with 128
        (128, 128): Tile(128, 8, 3),
        (256, 64): Tile(64, 8, 2),
        (256, 128): Tile(64, 8, 2),
    },
}


def tile_for(architecture: int, head_dim: int, packed_rows: int) -> Tile:
    """The tile for the PACK * QUERY_BLOCK rows of a list, always a multiple of 64: no tile has idle rows."""
    return TILES[architecture][
        max(64, triton.next_power_of_2(head_dim)), 128 if packed_rows % 128 == 0 else 64
    ]


def _architecture() -> int:
    """The one in the table that is most like the GPU's."""
    return min(max(architecture() // 10, 8), 10) * 10


def constants(
    *,
    head_dim: int,
    group: int,
    pack: int,
    share: int,
    query_block: int,
    rows: int,
    unit: int | None,
    features: Features,
    interpreted: bool,
) -> dict[str, int | float | bool]:
    """The kernel's CAPITALS. unit: None = dense, 0 = pages only, else keys per gathered unit."""
    return {
        "GROUP": group,
        "PACK": pack,
        "SHARE": share,
        "QUERY_BLOCK": query_block,
        "BLOCK_M": rows,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PAGE": PAGE_SIZE,
        "DENSE": unit is None,
        "UNIT": unit or 0,
        "WINDOW": features.window or 0,
        "SOFTCAP": features.softcap or 0.0,
        "SINKS": features.sinks is not None,
        "UPCAST": interpreted,
    }


def attend(
    q: Tensor,
    keys: KeyView,
    chunk: Chunk,
    selection: Selection,
    *,
    scale: float,
    features: Features = NO_FEATURES,
) -> Attended:
    """What sparse.attention.attend gives, in one launch and without a host sync. q [Hq, Tq, D] after RoPE.

    `out` is a view of [Tq, Hq, D] memory, which is how a model wants it back.
    """
    num_heads, length, head_dim = q.shape
    num_kv_heads = keys.pages.shape[0]
    assert length == chunk.length and keys.num_tokens >= chunk.start + length, (q.shape, chunk)
    assert keys.k_pool.is_contiguous() and keys.v_pool.is_contiguous()
    of_codes = is_quantised(keys.k_pool.dtype)
    assert keys.k_pool.dtype == keys.v_pool.dtype, (keys.k_pool.dtype, keys.v_pool.dtype)
    assert of_codes or keys.k_pool.dtype == q.dtype, (q.dtype, keys.k_pool.dtype)
    assert (keys.k_scales is not None) == (keys.v_scales is not None) == of_codes, keys.k_pool.dtype
    assert keys.pages.dtype == torch.int32 and keys.pages.stride(1) == 1
    assert num_heads % num_kv_heads == 0 and scale > 0, (num_heads, num_kv_heads, scale)

    out = q.new_empty(length, num_heads, head_dim).transpose(0, 1)
    lse = q.new_empty(num_heads, length, dtype=torch.float32)
    exact = selection.exact
    num_rows = length - (0 if exact is None else exact.lse.shape[1])
    if exact is not None:
        out[:, num_rows:] = exact.out
        lse[:, num_rows:] = exact.lse
    if num_rows == 0:
        return Attended(out, lse)

    lists = None if selection.is_dense else selection.pages
    gathered = selection.gathered
    group = num_heads // num_kv_heads
    pack = group if lists is None or lists.num_heads in (1, num_kv_heads) else 1
    share = num_heads // pack // (1 if lists is None else lists.num_heads)
    query_block = (
        selection.query_block if lists is not None else 128
    )  # without lists there is nothing to align to
    num_blocks = num_query_blocks(chunk.start, length, query_block)
    assert lists is None or lists.counts.shape[1] == num_blocks, (lists.counts.shape, num_blocks)
    order = None if lists is None else _longest_first(lists, gathered, chunk.start, query_block)
    tile = tile_for(_architecture(), head_dim, pack * query_block)
    num_lists = num_blocks if order is None else order.shape[0]
    log2_scale = scale * math.log2(math.e)
    q = q if q.stride(2) == 1 else q.contiguous()
    _attend_kernel[(num_lists * share * (pack * query_block // tile.rows),)](
        q,
        keys.k_pool,
        keys.v_pool,
        keys.k_scales,
        keys.v_scales,
        keys.pages,
        order,
        *_pointers(lists),
        *_pointers(gathered),
        features.sinks,
        out,
        lse,
        log2_scale if features.softcap is None else 2 * log2_scale / features.softcap,
        chunk.start,
        num_rows,
        num_blocks,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        keys.pages.stride(0),
        **constants(
            head_dim=head_dim,
            group=group,
            pack=pack,
            share=share,
            query_block=query_block,
            rows=tile.rows,
            unit=None if lists is None else gathered.unit if gathered is not None else 0,
            features=features,
            interpreted=triton.knobs.runtime.interpret,
        ),
        **tile.options(),
    )
    return Attended(*corrected(out, lse, q, chunk, selection, scale, features))


def _pointers(lists: BlockLists | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if lists is None else (lists.starts, lists.counts, lists.indices)


def _longest_first(lists: BlockLists, gathered: BlockLists | None, start: int, query_block: int) -> Tensor:
    """The lists by falling work, int64 [H * B]: a dense head that started last would run alone at the end."""
    first_block = start // query_block
    ends = torch.arange(1, lists.counts.shape[1] + 1, device=lists.counts.device) + first_block
    keys = lists.counts * PAGE_SIZE
    if gathered is not None:
        keys = keys + gathered.counts * gathered.unit
    keys = torch.where(lists.counts == ALL, ends * query_block, keys)
    return keys.flatten().argsort(descending=True)
