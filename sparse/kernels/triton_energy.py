"""Queries times mean keys on a GPU: one number for each block of queries of a group of heads, and page."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.triton_softmax import LN_2, logits
from sparse.base import Chunk
from sparse.selection import num_query_blocks

# ----------------------------------------------------------------------
# the kernel
# ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "num_rows", "num_blocks", "num_pages"])
def _energy_kernel(
    q,  # [Hq, Tq, D], last axis contiguous
    means,  # [Hkv, P, D] fp32
    energy,  # [Hkv, B, P] fp32 out, natural log; -inf after the rows' own page
    factor,  # scale * log2(e)
    start,  # position of the first row
    num_rows,  # Tq
    num_blocks,  # B
    num_pages,  # P
    stride_q_head,
    stride_q_row,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pages per program
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter multiplies raw bf16 bits
):
    tiles = tl.cdiv(num_pages, BLOCK_P)
    first = tl.program_id(0) % tiles * BLOCK_P
    block = tl.program_id(0) // tiles % num_blocks
    kv_head = tl.program_id(0) // tiles // num_blocks
    own_page = start // PAGE + block

    pages = first + tl.arange(0, BLOCK_P)
    offset_d = tl.arange(0, BLOCK_D)
    rows = own_page * PAGE + tl.arange(0, PAGE) - start
    row_mask = (rows >= 0) & (rows < num_rows)  # the chunk may begin or end inside a block
    mean_offsets = (kv_head.to(tl.int64) * num_pages + pages)[:, None] * D + offset_d[None, :]
    mean_mask = (pages <= own_page)[:, None] & (offset_d < D)[None, :]
    mean_tile = tl.load(means + mean_offsets, mask=mean_mask, other=0.0)
    mean_tile = mean_tile if UPCAST else mean_tile.to(q.dtype.element_ty)
    peak = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    # no page of this tile may be read: no head looks at it
    for i in tl.range(0, tl.where(first <= own_page, GROUP, 0)):
        head = kv_head * GROUP + i
        q_offsets = head.to(tl.int64) * stride_q_head + rows.to(tl.int64) * stride_q_row
        q_mask = row_mask[:, None] & (offset_d < D)[None, :]
        q_tile = tl.load(q + q_offsets[:, None] + offset_d[None, :], mask=q_mask, other=0.0)
        q_tile = q_tile.to(mean_tile.dtype)
        scores = logits(q_tile, mean_tile, None, factor, 0.0) * factor  # [PAGE, BLOCK_P]
        scores = tl.where(row_mask[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(scores - shift[None, :]), 0)
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)
    log_sum = tl.where(pages <= own_page, (peak + tl.log2(total)) * LN_2, float("-inf"))
    target = (kv_head.to(tl.int64) * num_blocks + block) * num_pages + pages
    tl.store(energy + target, log_sum, mask=pages < num_pages)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

BLOCK_P = 64


def options(head_dim: int) -> dict[str, int | bool]:
    """Triton's compile options: twice the warps where a head of 256 would spill a register."""
    return {"num_warps": 8 if head_dim > 128 else 4, "num_stages": 2, "enable_fp_fusion": True}


def constants(*, head_dim: int, group: int, interpreted: bool) -> dict[str, int | bool]:
    """The kernel's CAPITALS."""
    return {
        "GROUP": group,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_P": BLOCK_P,
        "PAGE": PAGE_SIZE,
        "UPCAST": interpreted,
    }


def log_energy(q: Tensor, mean_k: Tensor, chunk: Chunk, *, scale: float) -> Tensor:
    """What sparse.page_scores.log_energy gives, in one launch. Means are rounded to the dtype of q."""
    num_heads, length, head_dim = q.shape
    num_kv_heads, num_pages, _ = mean_k.shape
    assert length == chunk.length and mean_k.dtype == torch.float32, (q.shape, chunk, mean_k.dtype)
    assert mean_k.is_contiguous() and num_heads % num_kv_heads == 0, (num_heads, mean_k.shape)
    q = q if q.stride(2) == 1 else q.contiguous()
    num_blocks = num_query_blocks(chunk.start, length, PAGE_SIZE)
    energy = torch.empty(num_kv_heads, num_blocks, num_pages, dtype=torch.float32, device=q.device)
    _energy_kernel[(num_kv_heads * num_blocks * triton.cdiv(num_pages, BLOCK_P),)](
        q,
        mean_k,
        energy,
        scale * math.log2(math.e),
        chunk.start,
        length,
        num_blocks,
        num_pages,
        q.stride(0),
        q.stride(1),
        **constants(
            head_dim=head_dim,
            group=num_heads // num_kv_heads,
            interpreted=triton.knobs.runtime.interpret,
        ),
        **options(head_dim),
    )
    return energy
