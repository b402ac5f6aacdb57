"""FlashDense: chunks that read everything go to the flash-attn package, where it can serve them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from sparse.attention import Attend, Attended
from sparse.base import Chunk, KeyView
from sparse.selection import Selection

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True)
class FlashDense:
    """Attention of a chunk: dense ones by flash-attn over gathered keys and values, all others as before.

    https://github.com/Dao-AILab/flash-attention. It has pages of its own, of one table for all heads, so ours
    are gathered first: `N` tokens copied once for `Tq x N` scores.
    """

    flash: Callable[..., Any]  # flash_attn.flash_attn_func, 2.8 or later
    other: Attend  # what serves the rest

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
        if not self.serves(q, keys, selection, features):
            return self.other(q, keys, chunk, selection, scale=scale, features=features)
        k, v = (x[:, : chunk.start + chunk.length].to(q.dtype) for x in keys.contiguous())  # [Hkv, N, D]
        behind = -1 if features.window is None else features.window - 1  # keys beside a query's own
        out, lse, _ = self.flash(
            *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),  # [1, T, H, D]
            softmax_scale=scale,
            causal=True,  # the last query sees the last key
            window_size=(behind, 0 if features.window else -1),
            softcap=features.softcap or 0.0,
            return_attn_probs=True,  # else no lse
        )
        return Attended(out[0].transpose(0, 1), lse[0])

    @staticmethod
    def serves(q: Tensor, keys: KeyView, selection: Selection, features: Features) -> bool:
        """Pages that left would count as zeros, but for those behind a window, which nobody sees."""
        head_dim = q.shape[2]
        fits = q.dtype in DTYPES and head_dim % 8 == 0 and head_dim <= LARGEST_HEAD
        whole = not keys.has_holes or features.window is not None
        return selection.is_dense and fits and whole and features.sinks is None
