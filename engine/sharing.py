"""Sharing: which beginning of a prompt may come from the prefix cache, and which of its own may go there."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE
from engine.plans import ResolvedPlan
from kvcache.prefix import chain_keys


@dataclass(slots=True, eq=False)
class Shareable:
    """Of one sequence. Counts are blocks of PAGE_SIZE tokens, from the first token on."""

    seed: bytes
    tokens: NDArray[np.int32]  # of the prompt
    keys: list[bytes]  # of the prompt's whole blocks
    unit: int  # a hit covers a multiple of so many
    usable: int  # a hit covers at most so many: the rest is computed, so that window and policy see it
    publishable: int  # blocks whose keys and values any prompt with this beginning would get

    def hit(self, known: int) -> int:
        """Blocks to take, of so many that are known."""
        return min(known, self.usable) // self.unit * self.unit

    def next_unit(self, have: int) -> bytes | None:
        """The key of the last block of the next unit that could be taken, if there is one."""
        end = have + self.unit
        return self.keys[end - 1] if end <= self.usable else None


def shareable(plan: ResolvedPlan, tokens: list[int], prompt: int, total: int, salt: str) -> Shareable:
    """What of this prompt may be shared under its plan (lengths in tokens).

    Rows that are computed unlike those of a longer prompt are not published: those of a last chunk whose
    method looks at the chunk as a whole, and last rows that read more because they are last.
    """
    text = np.array(tokens[:prompt], dtype=np.int32)
    seed = prefill_seed(plan, prompt, total, salt)
    unit = plan.chunk // PAGE_SIZE if plan.grid and not plan.is_dense(prompt) else 1
    usable = max(0, prompt - plan.window) // PAGE_SIZE // unit * unit
    publishable = prompt // PAGE_SIZE
    if not plan.is_dense(prompt):
        publishable = max(0, prompt - max(plan.window, plan.last_rows)) // PAGE_SIZE // unit * unit
    return Shareable(seed, text, chain_keys(seed, text), unit, usable, publishable)


def prefill_seed(plan: ResolvedPlan, prompt: int, total: int, salt: str) -> bytes:
    """All that decides how the keys and values of these tokens come out; those of one seed are alike."""
    how = b"dense" if plan.is_dense(prompt) else plan.prefill_identity
    parts = (plan.model_identity, how, plan.policy.prefill_key(total), salt.encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())  # so that no two lists of parts read the same
    return digest.digest()
