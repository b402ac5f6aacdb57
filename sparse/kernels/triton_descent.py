"""HiP's stages on a GPU: descents into the pieces of all query blocks, and the pieces that go on."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.quantised import is_quantised
from sparse.base import Chunk, KeyView
from sparse.descent import Funnel, mean_queries
from sparse.kernels.triton_lines import kept_lines
from sparse.page_scores import block_pages, query_pages, rows_present

# ----------------------------------------------------------------------
# the kernels
#
# A program descends into BLOCK_C pieces at once, for one query head of a group after the other: each head
# finds its own way. A round reads two keys of every piece where they are. What goes on is then known from one
# score per piece: the pieces above a bar and the first that equal it, listed in order.
# ----------------------------------------------------------------------


@triton.jit
def _best_scores(
    queries,  # [BLOCK_R, BLOCK_D]
    k_pool,
    k_scales,
    pages,  # of this KV head
    places,  # [BLOCK_C] of keys
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """How well each key suits the query that it suits best: [BLOCK_C], -inf of dropped pages."""
    page = tl.load(pages + places // PAGE)
    held = page >= 0
    token = tl.maximum(page, 0).to(tl.int64) * PAGE + places % PAGE
    offset_d = tl.arange(0, BLOCK_D)
    mask = held[:, None] & (offset_d < D)[None, :]
    keys = tl.load(k_pool + token[:, None] * D + offset_d[None, :], mask=mask, other=0.0)
    scores = tl.max(tl.dot(keys.to(queries.dtype), tl.trans(queries), input_precision="ieee"), 1)
    if k_scales is not None:
        scores *= tl.load(k_scales + token, mask=held, other=0.0)
    return tl.where(held, scores, float("-inf"))


@triton.jit(
    do_not_specialize=[
        *("num_pieces", "num_blocks", "width", "num_rounds", "first_end"),
        *("stride_pages", "stride_list", "stride_block"),
    ],
    do_not_specialize_on_alignment=["pages"],
)
def _descents_kernel(
    means,  # [Hq, B, R, D] mean queries
    k_pool,  # [num_pages of the pool, PAGE, D]
    k_scales,  # [num_pages of the pool, PAGE] fp32, of codes (None without)
    pages,  # [Hkv, P] int32, -1 = dropped
    pieces,  # [H, B, C] int32, where they begin
    best,  # [Hkv, B, C] fp32 out, of the heads of a group; -inf of empty pieces
    num_pieces,  # C
    num_blocks,  # B
    width,  # keys of a piece
    num_rounds,
    first_end,  # where the keys end that the first query block chooses from
    stride_pages,
    stride_list,  # 0 if all KV heads choose together
    stride_block,
    GROUP: tl.constexpr,
    NUM_MEANS: tl.constexpr,  # R
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter multiplies raw bf16 bits
):
    tiles = tl.cdiv(num_pieces, BLOCK_C)
    block = tl.program_id(0) // tiles % num_blocks
    kv_head = (tl.program_id(0) // tiles // num_blocks).to(tl.int64)
    piece = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = piece < num_pieces
    begin = tl.load(pieces + kv_head * stride_list + block * stride_block + piece, mask=inside, other=0)
    end = tl.minimum(begin + width, first_end + block * PAGE)
    pages += kv_head * stride_pages
    is_full = inside & (begin < end)

    offset_d = tl.arange(0, BLOCK_D)
    row = tl.minimum(tl.arange(0, BLOCK_R), NUM_MEANS - 1)  # a tile has 16 rows or more: the last repeated
    peak = tl.full([BLOCK_C], float("-inf"), tl.float32)
    # pieces behind what the block chooses from: no head looks into them
    for i in tl.range(0, tl.where(tl.max(is_full.to(tl.int32), 0) > 0, GROUP, 0)):
        query = ((kv_head * GROUP + i) * num_blocks + block) * NUM_MEANS + row
        queries = tl.load(
            means + query[:, None] * D + offset_d[None, :], mask=(offset_d < D)[None, :], other=0.0
        )
        if UPCAST:
            queries = queries.to(tl.float32)
        left = tl.where(is_full, begin, 0)
        right = tl.where(is_full, end, 1)
        for _ in tl.range(0, num_rounds):
            middle = (left + right) // 2
            low, high = (left + middle) // 2, (middle + right) // 2
            in_left = _best_scores(queries, k_pool, k_scales, pages, low, D, BLOCK_D, PAGE)
            in_right = _best_scores(queries, k_pool, k_scales, pages, high, D, BLOCK_D, PAGE)
            peak = tl.maximum(peak, tl.maximum(in_left, in_right))
            goes_left = in_left > in_right
            left = tl.where(goes_left, left, middle)
            right = tl.where(goes_left, middle, right)
    target = (kv_head * num_blocks + block) * num_pieces + piece
    tl.store(best + target, tl.where(is_full, peak, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["num_pieces", "num_blocks", "most", "stride_list", "stride_block"])
def _keep_kernel(
    best,  # [H * B, C] fp32
    bars,  # [H * B] fp32
    rooms,  # [H * B] int64
    pieces,  # [H, B, C] int32
    kept,  # [H * B, most] int32 out: of the pieces, in their order
    num_pieces,  # C
    num_blocks,  # B
    most,
    stride_list,
    stride_block,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begins = pieces + row // num_blocks * stride_list + row % num_blocks * stride_block
    bar = tl.load(bars + row)
    room = tl.load(rooms + row)
    count = 0
    for i in tl.range(0, num_pieces, BLOCK):
        stays, num_equal = kept_lines(best + row * num_pieces, i, num_pieces, bar, room, 0, BLOCK)
        room -= num_equal
        place = count + tl.cumsum(stays.to(tl.int32), 0) - 1
        begin = tl.load(begins + i + tl.arange(0, BLOCK), mask=stays, other=0)
        tl.store(kept + row * most + place, begin, mask=stays)
        count += tl.sum(stays.to(tl.int32), 0)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

KEEP = 1024  # pieces of a query block at once
KEEP_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# nothing to pipeline: where a round reads, the one before it says
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def pieces_at_once(head_dim: int) -> int:
    """Pieces of a program: as many keys of either half as fit in registers."""
    return min(128, 8192 // int(triton.next_power_of_2(head_dim)))


def constants(*, head_dim: int, group: int, stride: int, interpreted: bool) -> dict[str, int | bool]:
    """The CAPITALS of the kernel that descends."""
    return {
        "GROUP": group,
        "NUM_MEANS": PAGE_SIZE // stride,
        "D": head_dim,
        "BLOCK_C": pieces_at_once(head_dim),
        "BLOCK_R": max(16, PAGE_SIZE // stride),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PAGE": PAGE_SIZE,
        "UPCAST": interpreted,
    }


def pruned_pieces(q: Tensor, keys: KeyView, chunk: Chunk, funnel: Funnel) -> Tensor:
    """What sparse.descent.pruned_pieces gives: two launches a stage, keys stay in place. No host sync."""
    of_codes = is_quantised(keys.k_pool.dtype)
    assert q.shape[1] == chunk.length and q.shape[0] % keys.pages.shape[0] == 0, (q.shape, chunk)
    assert keys.k_pool.is_contiguous() and (keys.k_scales is not None) == of_codes, keys.k_pool.dtype
    assert of_codes or keys.k_pool.dtype == q.dtype, (q.dtype, keys.k_pool.dtype)
    assert keys.pages.dtype == torch.int32 and keys.pages.stride(1) == 1
    num_tokens, num_blocks = chunk.start + chunk.length, len(block_pages(chunk, q.device))
    rows, present = query_pages(q, chunk.start), rows_present(chunk, q.device)
    means = {stride: mean_queries(rows, present, stride) for stride in set(funnel.strides)}
    left = None
    for stage, (width, kept, stride) in enumerate(
        zip(funnel.widths, funnel.keep, funnel.strides, strict=True)
    ):
        pieces = funnel.pieces(stage, num_tokens, left, q.device).int()
        pieces = pieces.expand(funnel.num_lists, num_blocks, -1)
        left = pieces
        if pieces.shape[2] > kept // width:  # else all go on, whatever they score
            best = _best_met(means[stride], keys, chunk, funnel, width, pieces)
            left = _best_pieces(
                best.view(funnel.num_lists, -1, *best.shape[1:]).amax(1), pieces, kept // width
            )
    assert left is not None, "a funnel has a stage"
    return left


def _best_met(
    means: Tensor, keys: KeyView, chunk: Chunk, funnel: Funnel, width: int, pieces: Tensor
) -> Tensor:
    """The best score that descents into pieces [H, B, C] meet, by KV head: [Hkv, B, C] float32."""
    num_heads, num_blocks, num_means, head_dim = means.shape
    num_kv_heads, num_pieces = keys.pages.shape[0], pieces.shape[2]
    best = torch.empty(num_kv_heads, num_blocks, num_pieces, dtype=torch.float32, device=means.device)
    tiles = triton.cdiv(num_pieces, pieces_at_once(head_dim))
    _descents_kernel[(num_kv_heads * num_blocks * tiles,)](
        means,
        keys.k_pool,
        keys.k_scales,
        keys.pages,
        pieces,
        best,
        num_pieces,
        num_blocks,
        width,
        width.bit_length(),
        (chunk.start // PAGE_SIZE - funnel.reach) * PAGE_SIZE,
        keys.pages.stride(0),
        0 if pieces.shape[0] == 1 else pieces.stride(0),
        pieces.stride(1),
        **constants(
            head_dim=head_dim,
            group=num_heads // num_kv_heads,
            stride=PAGE_SIZE // num_means,
            interpreted=triton.knobs.runtime.interpret,
        ),
        **OPTIONS,
    )
    return best


def _best_pieces(best: Tensor, pieces: Tensor, most: int) -> Tensor:
    """The pieces with the best scores best [H, B, C], `most` of them, in order: [H, B, most] int32."""
    highest = best.topk(most).values  # values are sure; among equals the indices are not
    bars = highest[..., -1].contiguous()
    rooms = most - (highest > bars[..., None]).sum(-1)
    kept = pieces.new_empty(*pieces.shape[:2], most)
    _keep_kernel[(bars.numel(),)](
        best,
        bars,
        rooms,
        pieces,
        kept,
        pieces.shape[2],
        pieces.shape[1],
        most,
        pieces.stride(0),
        pieces.stride(1),
        BLOCK=KEEP,
        **KEEP_OPTIONS,
    )
    return kept
