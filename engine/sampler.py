"""Sampling: one token per row of logits, with noise that depends on (seed, choice, position) and nothing
else.

The noise of a token never depends on its batch mates, and a replay of the request repeats it: a
counter-based generator (SplitMix64's finaliser, https://doi.org/10.1145/2660193.2660195) is evaluated at
(key, vocabulary index), and the token with the largest `log p + Gumbel noise` is an exact sample of p.

Logits are changed in vLLM's order: masks, biases and penalties, temperature, min-p, top-k, top-p.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import Logprobs, Sampling

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB
LEAST_TEMPERATURE = 1e-5  # below, logits over it pass float32: the likeliest token, as at 0
_LEAST_LOGPROB = -9999.0  # in place of -inf, which JSON cannot say


class TokenCounts:
    """Which tokens one request has used, for its penalties. Catches up with its tokens as they grow."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.generated = torch.zeros(vocab, device=device)  # how often, in the answer
        self._counted = 0  # tokens

    def catch_up(self, tokens: list[int], prompt_length: int) -> None:
        """Count what has been added to the tokens since the last call."""
        device = self.generated.device
        prompt = tokens[self._counted : prompt_length]
        answer = tokens[max(self._counted, prompt_length) :]
        if prompt:
            self.in_prompt[torch.tensor(prompt, device=device)] = True
        if answer:
            index = torch.tensor(answer, device=device)
            self.generated.index_add_(0, index, torch.ones(len(answer), device=device))
        self._counted = len(tokens)


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What sampling one row needs beside its logits."""

    sampling: Sampling
    position: int  # of the token to be sampled
    choice: int = 0
    num_generated: int = 0  # tokens of the answer so far
    counts: TokenCounts | None = None  # set where there are penalties
    allowed: Tensor | None = None  # bool [V]: what a grammar lets follow


def has_penalties(sampling: Sampling) -> bool:
    """Does choosing a token depend on those before it?"""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)


def sample(logits: Tensor, rows: list[SampledRow]) -> list[int]:
    """One token id per row. logits [B, V], any float dtype, left as they are. The only host synchronisation
    of a step in which nobody asks for logprobs."""
    logits = _adjust(logits, rows)
    tokens = logits.argmax(-1)
    noisy = [i for i, row in enumerate(rows) if row.sampling.temperature >= LEAST_TEMPERATURE]
    if noisy:
        index = torch.tensor(noisy, device=logits.device)
        tokens[index] = _sample_noisy(logits[index].float(), [rows[i] for i in noisy])
    return [int(token) for token in tokens.tolist()]


def logprobs_of(logits: Tensor, tokens: list[int], counts: list[int]) -> list[Logprobs]:
    """How likely each row's token was, with the most likely `counts[row]` tokens. logits [B, V]."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > own).sum(-1) + 1
    best, ids = logprobs.topk(min(max(counts), logits.shape[-1]), dim=-1)
    best, own = best.clamp(min=_LEAST_LOGPROB), own.clamp(min=_LEAST_LOGPROB)
    columns = zip(own[:, 0].tolist(), ranks.tolist(), ids.tolist(), best.tolist(), counts, strict=True)
    return [
        Logprobs(logprob, rank, tuple(zip(row_ids[:count], row_best[:count], strict=True)))
        for logprob, rank, row_ids, row_best, count in columns
    ]


def _adjust(logits: Tensor, rows: list[SampledRow]) -> Tensor:
    """Logits [B, V] with the masks, biases and penalties of the rows; the same tensor if none has any."""
    changed = logits
    for i, row in enumerate(rows):
        adjusted = _adjust_row(logits[i], row)
        if adjusted is not None:
            if changed is logits:
                changed = logits.float() if logits.dtype != torch.float32 else logits.clone()
            changed[i] = adjusted
    return changed


def _adjust_row(logits: Tensor, row: SampledRow) -> Tensor | None:
    """float32 [V], or None where nothing changes. Row by row: so nothing depends on batch mates."""
    sampling = row.sampling
    early = row.num_generated < sampling.min_tokens and bool(sampling.stop_token_ids)
    if not (early or sampling.logit_bias or row.counts is not None or row.allowed is not None):
        return None
    logits = logits.float().clone()
    device = logits.device
    if row.allowed is not None:
        logits.masked_fill_(~row.allowed, -torch.inf)
    if early:
        logits[torch.tensor(sampling.stop_token_ids, device=device)] = -torch.inf
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        logits[torch.tensor(ids, device=device)] += torch.tensor(biases, device=device)
    if row.counts is not None:
        logits = _penalise(logits, sampling, row.counts)
    return logits


def _penalise(logits: Tensor, sampling: Sampling, counts: TokenCounts) -> Tensor:
    """[V] -> [V]. Repetition scales what was used anywhere; the others lower what was used in the answer."""
    used, penalty = counts.in_prompt | (counts.generated > 0), sampling.repetition_penalty
    logits = torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits -= sampling.frequency_penalty * counts.generated
    return logits - sampling.presence_penalty * (counts.generated > 0)


def _sample_noisy(logits: Tensor, rows: list[SampledRow]) -> Tensor:
    """logits [B, V] float32 -> token ids [B] int64."""
    device = logits.device
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=device)
    logits = logits / temperature[:, None]
    if any(row.sampling.min_p > 0 for row in rows):
        min_p = torch.tensor([row.sampling.min_p for row in rows], device=device)
        floor = logits.amax(-1) + min_p.log()  # 0 gives -inf: nothing lies below
        logits = logits.masked_fill(logits < floor[:, None], -torch.inf)
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
