"""Texts that gates learn from: prose, and prose around long-range tasks, without which a gate never learns to
look far back.

    prose    a piece of the given text
    copy     a passage of it that comes again
    pairs    a list of names and numbers, then the same names in another order, each with its number
    needles  such facts hidden in prose, all of them asked for at the end
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from configs.errors import ConfigError

KINDS = ("prose", "copy", "pairs", "prose", "copy", "needles")  # in turn
COLOURS = (
    *("amber", "azure", "black", "bronze", "brown", "copper", "coral", "crimson", "golden", "green"),
    *("grey", "indigo", "ivory", "orange", "purple", "red", "silver", "violet", "white", "yellow"),
)
ANIMALS = (
    *("badger", "bear", "beaver", "crane", "deer", "eagle", "falcon", "ferret", "fox", "goat"),
    *("heron", "horse", "lynx", "mole", "otter", "owl", "rabbit", "raven", "seal", "wolf"),
)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TrainingText:
    """One file in one model's tokens."""

    name: str
    sha256: str  # of the file
    tokens: tuple[int, ...]


def read_text(path: Path, tokenizer: tokenizers.Tokenizer, length: int) -> TrainingText:
    """A text file, long enough for pieces of `length` tokens. Line breaks inside paragraphs become spaces."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text: {path} cannot be read as UTF-8 text: {error}") from error
    paragraphs = (" ".join(paragraph.split()) for paragraph in content.split("\n\n"))
    flowing = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    ids = tokenizer.encode(flowing, add_special_tokens=False).ids
    if len(ids) < length:
        raise ConfigError(
            f"--text: {path} has {len(ids)} tokens; a piece has {length}: give a longer text or less --length"
        )
    return TrainingText(path.name, hashlib.sha256(content.encode()).hexdigest(), tuple(ids))


def piece(texts: Sequence[TrainingText], encode: Encode, number: int, length: int, seed: int) -> list[int]:
    """The tokens of piece `number`, `length` of them. It does not depend on how many others there are."""
    draw = random.Random(f"{seed} {number}")
    text = draw.choice(texts).tokens
    start = draw.randrange(len(text) - length + 1)
    prose = list(text[start : start + length])
    match KINDS[number % len(KINDS)]:
        case "copy":
            tokens = _copy(prose, draw)
        case "pairs":
            tokens = _pairs(prose, encode, draw)
        case "needles":
            tokens = _needles(prose, encode, draw)
        case _:
            tokens = prose
    return tokens[:length]


def _copy(prose: list[int], draw: random.Random) -> list[int]:
    """A passage of an eighth to two fifths of the piece, anywhere, comes again anywhere behind itself."""
    length = len(prose)
    passage = draw.randint(length // 8, 2 * length // 5)
    first = draw.randint(0, length - 2 * passage)
    again = draw.randint(first + passage, length - passage)
    return prose[:again] + prose[first : first + passage] + prose[again:]


def _pairs(prose: list[int], encode: Encode, draw: random.Random) -> list[int]:
    """Facts fill the first part, and are asked for in another order until the piece is full."""
    facts = _facts(draw)
    known: list[int] = []
    asked = 0
    while len(known) < len(prose) // 2:
        name, value = facts[asked % len(facts)]
        known += encode(f"{name}: {value}\n")
        asked += 1
    facts = facts[:asked]
    gap = draw.randint(0, len(prose) // 8)
    tokens = known + encode("\n") + prose[:gap] + encode("\n\n")
    while len(tokens) < len(prose):
        draw.shuffle(facts)
        for name, value in facts:
            tokens += encode(f"{name}: {value}\n")
    return tokens


def _needles(prose: list[int], encode: Encode, draw: random.Random) -> list[int]:
    """Facts at random places of the first three quarters; the last quarter asks for all of them."""
    facts = _facts(draw)[: max(4, len(prose) // 160)]
    hidden = [encode(f" The access code of the {name} is {value}.") for name, value in facts]
    room = max(0, 3 * len(prose) // 4 - sum(map(len, hidden)))
    tokens: list[int] = []
    done = 0
    for place, fact in zip(sorted(draw.randint(0, room) for _ in hidden), hidden, strict=True):
        tokens += prose[done:place] + fact
        done = place
    tokens += prose[done:room]
    draw.shuffle(facts)
    while len(tokens) < len(prose):
        for name, value in facts:
            tokens += encode(f"\nWhich access code has the {name}? The access code of the {name} is {value}.")
    return tokens


def _facts(draw: random.Random) -> list[tuple[str, int]]:
    """All names in random order, each with a number of five digits."""
    names = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    draw.shuffle(names)
    return [(name, draw.randrange(10_000, 100_000)) for name in names]
