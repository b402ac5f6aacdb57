"""The softmax of attention in base 2, a tile of keys at a time: what the Triton kernels of ours share."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def logits(q, keys, scales, factor, SOFTCAP: tl.constexpr):
    """q [M, D], keys [N, D] -> scores [M, N]: raw ones, or with a softcap base-2 logits.

    scales [N] fp32 of keys that are codes, else None: one product a score, not one a number.
    """
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if scales is not None:
        scores *= scales[None, :]
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2x)) saturates rightly where exp overflows
        scores = LOG2_E * SOFTCAP * (1 - 2 / (1 + tl.exp2(scores * factor)))
    return scores


@triton.jit
def fold(acc, peak, total, scores, values, scales, factor, bias):
    """One step of the online softmax in base 2. `bias` is 0, or -inf where the whole step must not count.

    acc [M, D], peak [M], total [M], scores [M, N] with -inf where masked, values [N, D], and their scales [N]
    if they are codes, else None.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor + bias)
    # a row that has seen nothing yet: exp2(-inf), never exp2(-inf - -inf)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * factor + (bias - shift)[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    if scales is not None:
        weights *= scales[None, :]
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def read_page(pool, page, length, like, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr):
    """The first `length` tokens of a page as [PAGE, BLOCK_D] in the dtype of `like`, zeros after them.

    Length 0 reads nothing. Codes are exact in every dtype; what they mean, `logits` and `fold` know.
    """
    offset_n = tl.arange(0, PAGE)
    offset_d = tl.arange(0, BLOCK_D)
    # a 64-bit base and 32-bit offsets inside the page: the offsets stay in registers over the whole list
    pointers = pool + page.to(tl.int64) * (PAGE * D) + (offset_n[:, None] * D + offset_d[None, :])
    mask = (offset_n < length)[:, None]
    if BLOCK_D != D:
        mask = mask & (offset_d < D)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(like.dtype)


@triton.jit
def read_scales(scales, page, length, PAGE: tl.constexpr):
    """The scales of the first `length` tokens of a page [PAGE], zeros after them."""
    offset_n = tl.arange(0, PAGE)
    return tl.load(scales + page.to(tl.int64) * PAGE + offset_n, mask=offset_n < length, other=0.0)
