"""Texts that tell good selection from bad: needles to find, a passage to copy, and plain prose.

Each is a sequence of given tokens, of which some are judged. Plain perplexity hardly sees what a plan leaves
out; digits far back in the prompt and a passage that comes twice do.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

CITIES = (
    *("Paris", "London", "Madrid", "Rome", "Vienna", "Dublin", "Athens", "Warsaw", "Oslo", "Lisbon"),
    *("Tokyo", "Cairo", "Lima", "Boston", "Chicago", "Moscow", "Berlin", "Sydney", "Toronto", "Dallas"),
    *("Havana", "Geneva", "Prague", "Delhi", "Milan", "Denver", "Seattle", "Quebec", "Naples", "Venice"),
)
Chat = Callable[[str], tuple[list[int], list[int]]]  # a question -> tokens before and after the document
# Tokens from a passage to its repeat, at most: over 7,000, SmolLM2 copies nothing, even where all is read.
APART = 4096
CUE = 16  # first tokens of a repeated passage: nobody can know yet that it comes again


@dataclass(frozen=True)
class Task:
    """Given tokens, and the positions whose next token is judged."""

    tokens: tuple[int, ...]
    prompt_length: int
    positions: tuple[int, ...]  # logits at i judge tokens[i + 1]
    groups: tuple[int, ...] = ()  # for needles: which needle each position belongs to

    @property
    def targets(self) -> list[int]:
        return [self.tokens[position + 1] for position in self.positions]

    def decoded(self) -> "Task":
        """Only what is judged behind the prompt, its last row included."""
        return replace(self, positions=tuple(p for p in self.positions if p >= self.prompt_length - 1))

    @property
    def in_prompt(self) -> list[bool]:
        """Was the row of each position prefilled (else replayed from the cache)?"""
        return [position < self.prompt_length - 1 for position in self.positions]


def plain(piece: Sequence[int], replayed: int, rows: int) -> Task:
    """Prose: `rows` rows over the last three quarters of the prompt, and every replayed token."""
    prompt_length = len(piece) - replayed
    first = prompt_length // 4
    step = max(1, (prompt_length - 1 - first) // rows)
    prompt_rows = range(first, prompt_length - 1, step)[:rows]
    return Task(tuple(piece), prompt_length, (*prompt_rows, *range(prompt_length - 1, len(piece) - 1)))


def repeated(piece: Sequence[int], replayed: int, passage: int) -> Task:
    """A passage, prose, and the passage again, whose last `replayed` tokens are no part of the prompt."""
    assert passage - replayed > CUE, f"a passage of {passage} tokens is too short to replay {replayed}"
    # `piece` has as many tokens as the task: what the repeat displaces is cut from the end of the prose.
    again = len(piece) - passage
    start = max(0, again - APART)
    tokens = (*piece[:again], *piece[start : start + passage])
    first = len(tokens) - passage + CUE - 1
    return Task(tokens, len(tokens) - replayed, tuple(range(first, len(tokens) - 1)))


def needles(
    piece: Sequence[int], tokenizer: Any, count: int, prompt_length: int, seed: int, chat: Chat | None = None
) -> Task:
    """Magic numbers of `count` cities hidden in prose at depths .05 to .95, all of them asked for.

    The prompt ends where the first answer starts; the answers are replayed, so that a wrong digit spoils no
    other. Only digits are judged. Without `chat`, document and question are raw text.
    """
    draw = random.Random(seed)
    cities = draw.sample(CITIES, count)
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in cities]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    asked = ", ".join(cities)
    question = f"\n\nWhat are the magic numbers of {asked}? "
    before, after = chat(question) if chat else ([], encode(question))
    answer, groups = _answer(cities, numbers, encode, tokenizer)
    lead = groups.index(0)  # the first judged digit: all before it is prompt
    hidden = [
        encode(f" The magic number of {city} is {number}.")
        for city, number in zip(cities, numbers, strict=True)
    ]
    room = prompt_length - len(before) - len(after) - lead - sum(map(len, hidden))
    assert 0 < room <= len(piece), f"{prompt_length} tokens do not hold {count} needles and their prose"
    haystack = _hide(piece[:room], hidden, tokenizer)
    tokens = (*before, *haystack, *after, *answer)
    assert len(tokens) - len(answer) + lead == prompt_length
    start = len(tokens) - len(answer)
    judged = [place for place, group in enumerate(groups) if group is not None]
    return Task(
        tuple(tokens),
        prompt_length,
        tuple(start + place - 1 for place in judged),
        tuple(group for group in groups if group is not None),
    )


def _answer(
    cities: Sequence[str], numbers: Sequence[str], encode: Callable[[str], list[int]], tokenizer: Any
) -> tuple[list[int], list[int | None]]:
    """The right answer's tokens, and for each the needle whose digit it is, or None."""
    tokens: list[int] = []
    groups: list[int | None] = []
    for needle, (city, number) in enumerate(zip(cities, numbers, strict=True)):
        ids = encode(f" The magic number of {city} is {number}.")
        tokens += ids
        groups += [needle if any(c.isdigit() for c in tokenizer.decode([i])) else None for i in ids]
    return tokens, groups


def _hide(prose: Sequence[int], hidden: Sequence[list[int]], tokenizer: Any) -> list[int]:
    """Put each needle after the next end of a sentence behind its depth."""
    depths = [0.05 + 0.9 * i / max(1, len(hidden) - 1) for i in range(len(hidden))]
    found: list[int] = []
    done = 0
    for depth, needle in zip(depths, hidden, strict=True):
        place = max(done, int(depth * len(prose)))
        while place < len(prose) - 1 and "." not in tokenizer.decode([prose[place]]):
            place += 1
        place = min(place + 1, len(prose))
        found += [*prose[done:place], *needle]
        done = place
    return found + list(prose[done:])
