"""Footprint: the KV memory that a sequence takes under a plan, told before any weights load."""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import ConfigError
from engine.plans import ResolvedPlan
from engine.startup import Resolution

ANSWER = 256  # tokens, where nobody says how long answers are


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of the pages of one sequence. Before it answers, its policy gives back what it drops."""

    prompt: int  # tokens
    total: int  # tokens, the answer included
    computing: int  # bytes at most, while the prompt is computed
    answering: int  # bytes at most, from then on

    def of(self, sequences: int) -> int:
        """Bytes of so many sequences that answer."""
        return sequences * self.answering

    def that_fit(self, capacity: int) -> int:
        """Sequences that live in so many bytes at once, the last of them still to be computed."""
        if self.computing > capacity:
            return 0
        return 1 + (capacity - self.computing) // max(1, self.answering)


def footprint(plan: ResolvedPlan, page_bytes: int, prompt: int, total: int) -> Footprint:
    """What a prompt of so many tokens takes, with an answer up to `total`."""
    computing, answering = plan.pages_needed(prompt, total), plan.policy.pages_after_prefill(prompt, total)
    return Footprint(prompt, total, computing * page_bytes, answering * page_bytes)


def footprints(
    resolution: Resolution, plan: ResolvedPlan, prompts: Sequence[int] = (), answer: int = ANSWER
) -> list[Footprint]:
    """For these prompt lengths; by default for the longest, and its halves down to 1,024 tokens.

    Raises ConfigError for a prompt that the model has no room for.
    """
    longest = resolution.model.max_length
    if prompts and max(prompts) >= longest:
        raise ConfigError(
            f"a prompt of {max(prompts)} tokens and an answer do not fit the context of {longest}"
        )
    if not prompts:
        halves = [longest >> shift for shift in range(1, 8) if longest >> shift >= 1024]
        prompts = [*halves, max(1, longest - answer)]
    page_bytes = resolution.bytes_per_page
    return [footprint(plan, page_bytes, prompt, min(prompt + answer, longest)) for prompt in sorted(prompts)]
