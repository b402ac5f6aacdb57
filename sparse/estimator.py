"""The last-window estimator: what a few rows attend to, summed by column and by diagonal, over every key."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse.attention import attend_dense, held_tokens
from sparse.base import KeyView


@dataclass(frozen=True, slots=True)
class Estimate:
    """Sums of the softmax of R rows over N keys: each adds up to R. out and lse are exact, not estimates."""

    columns: Tensor  # [Hq, N] float32: how much the rows look at key j
    diagonals: Tensor  # [Hq, N] float32: how much they look at the key `distance` before them
    out: Tensor  # [Hq, R, D] in the dtype of q: the dense output of the rows
    lse: Tensor  # [Hq, R] float32


class Estimator(Protocol):
    """The estimate of a device: see `estimate`."""

    def __call__(self, q_rows: Tensor, first_position: int, keys: KeyView, *, scale: float) -> Estimate: ...


def estimate(q_rows: Tensor, first_position: int, keys: KeyView, *, scale: float) -> Estimate:
    """Look at the rows at positions [first_position, first_position + R), N = first_position + R.

    q_rows [Hq, R, D] after RoPE. Holds one buffer of Hq * R * (N + R) scores, for all heads at once.
    """
    exact = attend_dense(q_rows, first_position, keys, scale=scale)
    num_heads, num_rows, _ = q_rows.shape
    num_tokens = first_position + num_rows
    dtype = torch.promote_types(q_rows.dtype, torch.float32)
    k = keys.contiguous()[0][:, :num_tokens].to(dtype)  # [Hkv, N, D]

    # R - 1 zeros to the left of every row. Read with a row stride of one more than the width, each row is
    # shifted left by one against the one above it, and the diagonals of the rows become columns:
    #
    #       0 0 a0 a1 -- --        stride        0  0 a0 a1        t = 0 .. N - 1 is distance N - 1 - t
    #       0 0 b0 b1 b2 --       ------->       0 b0 b1 b2
    #       0 0 c0 c1 c2 c3                     c0 c1 c2 c3
    pad = num_rows - 1
    width = pad + num_tokens
    buffer = torch.empty(num_heads, num_rows, width, dtype=dtype, device=q_rows.device)
    buffer[..., :pad] = 0
    weights = buffer[..., pad:]  # [Hq, R, N]
    num_kv_heads = k.shape[0]
    torch.baddbmm(
        exact.lse.to(dtype)
        .neg()
        .reshape(num_kv_heads, -1, 1),  # scores less their lse: exp gives the softmax
        q_rows.to(dtype).reshape(num_kv_heads, -1, k.shape[2]),
        k.mT,
        alpha=scale,
        out=buffer.view(num_kv_heads, -1, width)[..., pad:],
    )
    weights.exp_()
    weights[..., first_position:].tril_()  # a row does not see the rows after it
    held = held_tokens(keys, num_tokens)
    if held is not None:
        weights.masked_fill_(~held.repeat_interleave(num_heads // num_kv_heads, dim=0)[:, None], 0)

    shifted = buffer.as_strided((num_heads, num_rows, num_tokens), (num_rows * width, width + 1, 1))
    return Estimate(weights.sum(1), shifted.sum(1).flip(-1), exact.out, exact.lse)
