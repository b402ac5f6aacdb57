"""The softmax of attention in base 2, a tile of keys at a time: what the Triton kernels of ours share."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def logits(q, keys, factor, SOFTCAP: tl.constexpr):
    """q [M, D], keys [N, D] -> scores [M, N]: raw ones, or with a softcap base-2 logits."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2x)) saturates rightly where exp overflows
        scores = LOG2_E * SOFTCAP * (1 - 2 / (1 + tl.exp2(scores * factor)))
    return scores


@triton.jit
def fold(acc, peak, total, scores, values, factor, bias):
    """One step of the online softmax in base 2. `bias` is 0, or -inf where the whole step must not count.

    acc [M, D], peak [M], total [M], scores [M, N] with -inf where masked, values [N, D].
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor + bias)
    # a row that has seen nothing yet: exp2(-inf), never exp2(-inf - -inf)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * factor + (bias - shift)[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def load_page(
    pool, page, length, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr
):
    """The first `length` tokens of a page as [PAGE, BLOCK_D], zeros after them; length 0 reads nothing."""
    offset_n = tl.arange(0, PAGE)
    offset_d = tl.arange(0, BLOCK_D)
    # a 64-bit base and 32-bit offsets inside the page: the offsets stay in registers over the whole list
    pointers = pool + page.to(tl.int64) * (PAGE * D) + (offset_n[:, None] * D + offset_d[None, :])
    mask = (offset_n < length)[:, None]
    if BLOCK_D != D:
        mask = mask & (offset_d < D)[None, :]
    tile = tl.load(pointers, mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile
