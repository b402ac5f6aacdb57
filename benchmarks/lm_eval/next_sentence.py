"""Passages of a novel, each with the sentence that follows and three from elsewhere: a task for lm-eval."""

import random
import re
from pathlib import Path
from typing import Any

NOVEL = Path(__file__).parents[2] / "examples" / "texts" / "pride-and-prejudice.txt"
PASSAGES = 40
LENGTH = 8  # sentences before the one that is asked for


def documents() -> list[dict[str, Any]]:
    """The same ones every time: `passage`, four `sentences`, and which of them is `next`."""
    chosen = random.Random(0)
    text = re.sub(r"\s+", " ", NOVEL.read_text(encoding="utf-8"))
    sentences = re.split(r"(?<!Mr\.)(?<!Mrs\.)(?<=[.!?]) (?=[A-Z])", text)
    whole = [place for place, one in enumerate(sentences) if place >= LENGTH and 40 <= len(one) <= 200]
    found = []
    for place in chosen.sample(whole, PASSAGES):
        right = sentences[place]
        others = chosen.sample([sentences[other] for other in whole if other != place], 3)
        choices = chosen.sample([right, *others], 4)
        found.append(
            {
                "passage": " ".join(sentences[place - LENGTH : place]),
                "sentences": choices,
                "next": choices.index(right),
            }
        )
    return found


def dataset(**metadata: Any) -> dict[str, Any]:
    """What lm-eval asks for."""
    from datasets import Dataset

    return {"test": Dataset.from_list(documents())}
