"""How many sequences live at once in a pool of four uncompressed ones, and how fast they generate together.

    python -m benchmarks.live_sequences --length 7936 --plans dense snapkv

Each plan gets a server of its own with the same bytes. All requests come at once, no prompt like another.
Generated tokens per second are counted from the last first token on, until the first sequence ends.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.asking import add_prompts, add_subject, command_line, parsed, serve_flags, subject_of
from benchmarks.common import exit_with, print_table, write_results
from benchmarks.serving import Server, serving
from configs.loading import load_plan
from configs.model import PAGE_SIZE
from configs.schema import EngineConfig
from engine.models import model_info
from engine.plans import resolve_plan
from kvcache.policy import KVPolicy
from kvcache.pool import page_bytes, pages_for
from kvcache.state import StateRegistry

UNCOMPRESSED = 4  # sequences that the pool holds
STRIDE = 401  # tokens between the starts of two prompts: none is another's prefix
# Prompts first: or those that were computed early have ended before the last one begins.
CROWDING = ["--prefill-share", "0.99", "--step-seconds", "30"]


@dataclass
class Crowd:
    """What the requests of one plan saw, filled by their threads."""

    first: list[float] = field(default_factory=list)  # when each got its first token
    ends: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)  # when each token after the first came
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Lived:
    """One plan in the pool."""

    plan: str
    requests: int
    bound: int  # that could live at once, from what the plan promises
    live: int  # that did, with their first token
    tokens_per_second: float | None  # together, once all of those had their first token
    seconds: float  # until all requests were answered


def one(server: Server, prompt: Sequence[int], plan: str, answer: int, crowd: Crowd) -> None:
    with server.streaming(prompt, plan, answer) as pieces:
        for number, _ in enumerate(pieces):
            with crowd.lock:
                (crowd.tokens if number else crowd.first).append(time.perf_counter())
    with crowd.lock:
        crowd.ends.append(time.perf_counter())


def how_many(policy: KVPolicy, num_pages: int, prompt: int, total: int, chunk: int) -> int:
    """Sequences that promises allow: one with its prompt in work, the others with what they keep (tokens)."""
    left = num_pages - policy.pages_needed(prompt, total, chunk)
    return 1 + left // policy.pages_after_prefill(prompt, total)


def live_at(crowd: Crowd, moment: float) -> int:
    return sum(first <= moment for first in crowd.first) - sum(end <= moment for end in crowd.ends)


def run(server: Server, prompts: Sequence[Sequence[int]], plan: str, answer: int, bound: int) -> Lived:
    crowd = Crowd()
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: one(server, prompt, plan, answer, crowd), prompts))
    live = max(live_at(crowd, moment) for moment in crowd.first)
    full = next(moment for moment in sorted(crowd.first) if live_at(crowd, moment) == live)
    until = min(end for end in crowd.ends if end > full)
    generated = sum(full < moment <= until for moment in crowd.tokens)
    speed = round(generated / (until - full), 2) if generated else None
    return Lived(plan, len(prompts), bound, live, speed, round(time.perf_counter() - began, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    add_prompts(parser, "dense", "snapkv", answer=256, why="they keep a sequence alive")
    parser.add_argument(
        "--requests", type=int, help="at once, at most; default: what the plan's promises allow"
    )
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    model = model_info(subject.folder, EngineConfig(model=asked.model))
    total = asked.length + asked.answer
    rows_of = model.num_layers * model.num_kv_heads
    num_pages = UNCOMPRESSED * rows_of * pages_for(total)
    size = page_bytes(model.head_dim, getattr(torch, asked.dtype), StateRegistry())
    rows = []
    for source in asked.plans:
        plan = resolve_plan(load_plan(source), model)
        bound = how_many(plan.policy, num_pages, asked.length, total, plan.chunk)
        count = min(bound, asked.requests or bound)
        prompts = [subject.text.ring(STRIDE * number, asked.length) for number in range(count)]
        flags = [*serve_flags(asked, [source]), "--kv-cache-memory-bytes", str(num_pages * size)]
        flags += ["--max-num-seqs", str(count), "--max-model-len", str(-(-total // PAGE_SIZE) * PAGE_SIZE)]
        flags += CROWDING
        with serving(asked.model, *flags) as server:
            rows.append(run(server, prompts, plan.name, asked.answer, bound))
        results = {
            "settings": {
                **subject.settings,
                "prompt_tokens": asked.length,
                "answer_tokens": asked.answer,
                "pool_bytes": num_pages * size,
            },
            "rows": [asdict(row) for row in rows],
        }
        path = write_results("live_sequences", results, folder=asked.out)
    print_table(
        f"A pool of {UNCOMPRESSED} uncompressed sequences of {asked.length} + {asked.answer} tokens",
        ("plan", "requests", "bound", "live at once", "tokens/s together", "seconds"),
        [(r.plan, r.requests, r.bound, r.live, r.tokens_per_second, r.seconds) for r in rows],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
