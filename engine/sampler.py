"""Sampling: one token per row of logits, with noise that depends on (seed, choice, position) and nothing
else.

The noise of a token never depends on its batch mates, and a replay of the request repeats it: a
counter-based generator (SplitMix64's finaliser, https://doi.org/10.1145/2660193.2660195) is evaluated at
(key, vocabulary index), and the token with the largest `log p + Gumbel noise` is an exact sample of p.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import Sampling

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What sampling one row needs beside its logits."""

    sampling: Sampling
    position: int  # of the token to be sampled
    choice: int = 0


def sample(logits: Tensor, rows: list[SampledRow]) -> list[int]:
    """One token id per row. logits [B, V], any float dtype. The only host synchronisation of a step."""
    tokens = logits.argmax(-1)
    noisy = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if noisy:
        index = torch.tensor(noisy, device=logits.device)
        tokens[index] = _sample_noisy(logits[index].float(), [rows[i] for i in noisy])
    return [int(token) for token in tokens.tolist()]


def _sample_noisy(logits: Tensor, rows: list[SampledRow]) -> Tensor:
    """logits [B, V] float32 -> token ids [B] int64."""
    device = logits.device
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=device)
    logits = logits / temperature[:, None]
    if any(row.sampling.top_k > 0 or row.sampling.top_p < 1 for row in rows):
        logits = _restrict(logits, rows)
    keys = torch.tensor([_key(row) for row in rows], device=device)
    noise = gumbel_noise(keys, logits.shape[-1])
    return (logits + noise).argmax(-1)


def _restrict(logits: Tensor, rows: list[SampledRow]) -> Tensor:
    """-inf outside the top k, then outside the smallest set of at least top_p mass; ties go to the lower
    token id."""
    device, vocab = logits.device, logits.shape[-1]
    top_k = torch.tensor([min(row.sampling.top_k or vocab, vocab) for row in rows], device=device)
    top_p = torch.tensor([row.sampling.top_p for row in rows], device=device)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab, device=device)
    ordered = ordered.masked_fill(ranks >= top_k[:, None], -torch.inf)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass  # the first token has nothing before it, so it always stays
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (ranks > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def gumbel_noise(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise [B, size] float32 for keys [B] int64."""
    index = torch.arange(1, size + 1, dtype=torch.int64, device=keys.device)
    bits = _mix(keys[:, None] + index * _GAMMA)
    uniform = (_shift(bits, 40) + 0.5) * 2.0**-24  # 24 bits: never 0 and, in float32, never 1
    return -torch.log(-torch.log(uniform.float().clamp(max=1 - 2.0**-24)))


def _key(row: SampledRow) -> int:
    """64 bits for one token of one request, as int64."""
    packed = struct.pack("<qqq", row.sampling.seed, row.choice, row.position)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (two's complement products wrap as unsigned ones do)."""
    bits = (bits ^ _shift(bits, 30)) * _MIX1
    bits = (bits ^ _shift(bits, 27)) * _MIX2
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift right: int64 shifts drag the sign bit along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
