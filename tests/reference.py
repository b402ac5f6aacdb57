"""The slow, obvious attention: dense, with any mask, in the precision of its inputs. It judges the others."""

import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, features: Features = NO_FEATURES
) -> tuple[Tensor, Tensor]:
    """q [Hq, T, D] of the last rows, k and v [Hkv, N, D], mask bool, True = read, broadcasts to [Hq, T, N].

    Gives out [Hq, T, D] and lse [Hq, T]. A row that reads nothing has out 0 and lse -inf.
    """
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    mask = mask.expand(q.shape[0], q.shape[1], k.shape[1])
    scores = scale * q @ k.mT
    if features.softcap is not None:
        scores = features.softcap * torch.tanh(scores / features.softcap)
    if features.window is not None:
        positions = torch.arange(k.shape[1])
        mask = mask & (positions[-q.shape[1] :, None] - positions < features.window)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    if features.sinks is not None:
        lse = torch.logaddexp(lse, features.sinks.to(lse.dtype)[:, None])
    weights = (scores - lse[..., None]).exp().masked_fill(~mask, 0)
    return weights @ v, lse


def causal(start: int, length: int) -> Tensor:
    """bool [length, start + length]: row i stands at position start + i and reads what is not after it."""
    rows = torch.arange(start, start + length)
    return torch.arange(start + length) <= rows[:, None]
