"""A long document asked twice, with another question: what the prefix cache saves, through the real server.

    python -m benchmarks.prefix_cache --length 7936 --plans dense minference

First: time to the first token of document + question. Second: the same document, another question. Its answer
must be the one it has without the cache (under a salt of its own).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.asking import add_prompts, add_subject, command_line, parsed, serve_flags, subject_of
from benchmarks.common import exit_with, print_table, write_results
from benchmarks.serving import Server, serving

QUESTION = 96  # tokens at the end of each prompt that are its own
STRIDE = 911  # tokens between the starts of two documents


@dataclass(frozen=True)
class Asked:
    """One document under one plan, asked twice."""

    plan: str
    first_seconds: float
    second_seconds: float
    ratio: float
    cached_tokens: int
    same_answer: bool  # as without the cache


def ask(server: Server, prompt: Sequence[int], plan: str, **options: Any) -> tuple[float, int]:
    """Seconds to the first token, and tokens that came from the cache."""
    began = time.perf_counter()
    reply = server.complete(prompt, plan, 1, **options)
    return time.perf_counter() - began, reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def ask_twice(
    server: Server, document: Sequence[int], questions: Sequence[Sequence[int]], plan: str, answer: int
) -> Asked:
    first, _ = ask(server, [*document, *questions[0]], plan)
    second, cached = ask(server, [*document, *questions[1]], plan)
    warm = server.complete([*document, *questions[1]], plan, answer)["choices"][0]["text"]
    cold = server.complete([*document, *questions[1]], plan, answer, cache_salt="cold")["choices"][0]["text"]
    return Asked(plan, round(first, 6), round(second, 6), round(second / first, 4), cached, warm == cold)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    add_prompts(parser, "dense", "minference", answer=16, why="they must be the same")
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    text = subject.text
    names = [Path(plan).stem for plan in asked.plans]
    with serving(asked.model, *serve_flags(asked, asked.plans)) as server:
        ask(server, text.ring(5, min(512, asked.length)), names[0])  # what is slow only once is slow now
        rows = []
        for number, plan in enumerate(names):
            start = STRIDE * (2 * number + 1)
            document = text.ring(start, asked.length - QUESTION)
            questions = [text.ring(start + shift, QUESTION) for shift in (7, 503)]
            rows.append(ask_twice(server, document, questions, plan, asked.answer))
    settings = {
        **subject.settings,
        "prompt_tokens": asked.length,
        "question_tokens": QUESTION,
        "answer_tokens": asked.answer,
    }
    results = {"settings": settings, "rows": [asdict(row) for row in rows]}
    path = write_results("prefix_cache", results, folder=asked.out)
    print_table(
        f"{asked.length} prompt tokens, asked again with another question of {QUESTION}",
        ("plan", "first s", "second s", "ratio", "cached tokens", "same answer"),
        [
            (
                row.plan,
                f"{row.first_seconds:.3f}",
                f"{row.second_seconds:.3f}",
                row.ratio,
                row.cached_tokens,
                row.same_answer,
            )
            for row in rows
        ],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
