"""CudnnDense: chunks that read everything go to cuDNN's attention, where it can serve them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from sparse.attention import Attend, Attended
from sparse.base import Chunk, KeyView
from sparse.selection import Selection

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 128
LEAST_ROWS = 1024  # of a chunk: below, what the parts cost beside attention counts

Cudnn = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""q [1, Hq, Tq, D], k and v [1, Hkv, Tk, D], scale, causal -> out [1, Hq, Tq, D], lse of Hq x Tq numbers."""


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """As torch calls it. Its scaled_dot_product_attention calls the same, and keeps the lse to itself."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse


@dataclass(frozen=True, slots=True)
class CudnnDense:
    """Attention of a chunk: dense ones by cuDNN over gathered keys and values, all others as before.

    Its causal mask begins with the first key, so a chunk goes in parts: its own keys with that mask, and
    those before it without one. It builds a plan for every shape it meets, which takes longer than the
    attention: chunks have a power of two of rows here, and what is before them is cut into powers of two.

        start 7 x 2048    | 0 .. 8192 | .. 12288 | .. 14336 | the chunk's own, causal |
    """

    run: Cudnn
    other: Attend  # what serves the rest
    least: int = LEAST_ROWS

    def __call__(
        self,
        q: Tensor,
        keys: KeyView,
        chunk: Chunk,
        selection: Selection,
        *,
        scale: float,
        features: Features = NO_FEATURES,
    ) -> Attended:
        """What sparse.attention.attend gives. q [Hq, Tq, D] after RoPE."""
        if not self.serves(q, keys, chunk, selection, features):
            return self.other(q, keys, chunk, selection, scale=scale, features=features)
        k, v = (x.to(q.dtype).unsqueeze(0) for x in keys.contiguous())  # [1, Hkv, N, D]
        parts = []
        for first, last in cuts(chunk.start, chunk.length):
            causal = first == chunk.start
            out, lse = self.run(q.unsqueeze(0), k[:, :, first:last], v[:, :, first:last], scale, causal)
            parts.append(Attended(out[0], lse.reshape(q.shape[:2])))
        return joined(parts)

    def serves(
        self, q: Tensor, keys: KeyView, chunk: Chunk, selection: Selection, features: Features
    ) -> bool:
        """Pages that left would count as zeros. Of features torch passes none on."""
        head_dim, rows = q.shape[2], chunk.length
        fits = q.dtype in DTYPES and head_dim % 8 == 0 and head_dim <= LARGEST_HEAD
        plain = features.window is None and features.softcap is None and features.sinks is None
        on_grid = rows >= self.least and rows & (rows - 1) == 0 and chunk.start % rows == 0
        return selection.is_dense and fits and plain and on_grid and not keys.has_holes


def cuts(start: int, length: int) -> list[tuple[int, int]]:
    """Where parts of the keys [0, start + length) begin and end: powers of two, then the chunk's own."""
    found, first = [], 0
    while first < start:
        last = first + (1 << ((start - first).bit_length() - 1))
        found.append((first, last))
        first = last
    return [*found, (start, start + length)]


def joined(parts: list[Attended]) -> Attended:
    """Attention over all keys from that over parts of them."""
    if len(parts) == 1:
        return Attended(parts[0].out, parts[0].lse.float())
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)  # [Hq, Tq]
    out = torch.zeros(parts[0].out.shape, dtype=torch.float32, device=lse.device)
    for part in parts:
        out.addcmul_(part.out.float(), (part.lse - lse).exp().unsqueeze(-1))
    return Attended(out.to(parts[0].out.dtype), lse)
