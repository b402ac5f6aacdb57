"""A long document asked about again after others had its pages: what copying it back from the host saves.

    python -m benchmarks.host_tier --length 7936 --plans dense minference

The pool holds one such prompt. First: time to the first token of document + question. Then another document
takes the pages. Again: the first document, another question, its columns copied back, and those of the other
copied out. Once more: a third question, when nothing has to be copied. The answer must be the one without any
cache (under a salt of its own). Only for plans that keep everything: no copy has room beside the prompt.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.asking import add_prompts, add_subject, command_line, parsed, serve_flags, subject_of
from benchmarks.common import exit_with, print_table, write_results
from benchmarks.prefix_cache import QUESTION, STRIDE, ask
from benchmarks.serving import Server, serving
from configs.schema import EngineConfig
from engine.models import model_info
from kvcache.pool import page_bytes, pages_for
from kvcache.state import StateRegistry

DOCUMENTS_ON_HOST = 4  # of the length that is asked for


@dataclass(frozen=True)
class Restored:
    """One document under one plan, asked about three times."""

    plan: str
    first_seconds: float
    again_seconds: float  # copied back from the host
    there_seconds: float  # still in the pool
    ratio: float  # again / first
    restore_ratio: float  # again - there, over first: the copies alone
    cached_tokens: int
    host_hits: int  # tokens that came from the host
    same_answer: bool  # as without the cache


def ask_thrice(
    server: Server,
    documents: Sequence[Sequence[int]],
    questions: Sequence[Sequence[int]],
    plan: str,
    answer: int,
) -> Restored:
    """documents: the one to come back to, and the other."""
    document, other = documents
    first, _ = ask(server, [*document, *questions[0]], plan)
    ask(server, [*other, *questions[0]], plan)
    before = server.metrics()["farspan:host_cache_hits_total"]
    again, cached = ask(server, [*document, *questions[1]], plan)
    hits = int(server.metrics()["farspan:host_cache_hits_total"] - before)
    there, _ = ask(server, [*document, *questions[2]], plan)
    warm = server.complete([*document, *questions[1]], plan, answer)["choices"][0]["text"]
    cold = server.complete([*document, *questions[1]], plan, answer, cache_salt="cold")["choices"][0]["text"]
    return Restored(
        plan=plan,
        first_seconds=round(first, 6),
        again_seconds=round(again, 6),
        there_seconds=round(there, 6),
        ratio=round(again / first, 4),
        restore_ratio=round((again - there) / first, 4),
        cached_tokens=cached,
        host_hits=hits,
        same_answer=warm == cold,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    add_prompts(parser, "dense", "minference", answer=16, why="they must be the same")
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    text = subject.text
    model = model_info(subject.folder, EngineConfig(model=asked.model))
    size = page_bytes(model.head_dim, getattr(torch, asked.dtype), StateRegistry())
    prompt_bytes = model.num_layers * model.num_kv_heads * pages_for(asked.length + asked.answer) * size
    flags = [*serve_flags(asked, asked.plans), "--kv-cache-memory-bytes", str(prompt_bytes)]
    flags += ["--host-memory", str(DOCUMENTS_ON_HOST * prompt_bytes), "--host-columns", "1"]
    names = [Path(plan).stem for plan in asked.plans]
    with serving(asked.model, *flags) as server:
        ask(server, text.ring(5, min(512, asked.length)), names[0])  # what is slow only once is slow now
        rows = []
        for number, plan in enumerate(names):
            start = STRIDE * (4 * number + 1)
            documents = [text.ring(start + shift * STRIDE, asked.length - QUESTION) for shift in (0, 2)]
            questions = [text.ring(start + shift, QUESTION) for shift in (7, 503, 1009)]
            rows.append(ask_thrice(server, documents, questions, plan, asked.answer))
    settings = {
        **subject.settings,
        "prompt_tokens": asked.length,
        "question_tokens": QUESTION,
        "answer_tokens": asked.answer,
        "pool_bytes": prompt_bytes,
    }
    results = {"settings": settings, "rows": [asdict(row) for row in rows]}
    path = write_results("host_tier", results, folder=asked.out)
    print_table(
        f"{asked.length} prompt tokens, asked about again with another question of {QUESTION}",
        ("plan", "first s", "again s", "there s", "ratio", "copies alone", "from host", "same answer"),
        [
            (
                row.plan,
                f"{row.first_seconds:.3f}",
                f"{row.again_seconds:.3f}",
                f"{row.there_seconds:.3f}",
                row.ratio,
                row.restore_ratio,
                row.host_hits,
                row.same_answer,
            )
            for row in rows
        ],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
