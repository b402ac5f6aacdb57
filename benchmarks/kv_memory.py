"""Memory that a compressed cache holds, and who uses what it gave back, read from a server's /metrics.

    python -m benchmarks.kv_memory --length 7936 --compressed snapkv

Held: KV bytes of one living sequence after its prompt, under each plan. Reused: in a pool of 1.2 uncompressed
prompts, a second request is admitted while the first still generates only if the first gave memory back.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.asking import add_subject, command_line, parsed, serve_flags, subject_of
from benchmarks.common import exit_with, print_table, write_results
from benchmarks.serving import Server, serving
from configs.model import PAGE_SIZE

KEEP_ALL = "dense"  # the plan that forgets nothing
POOL = 1.2  # uncompressed prompts
POLL_SECONDS = 0.01
START_OF_SECOND = 1000  # tokens into the text: a prompt of its own, not the first one's prefix
HELD, RUNNING = "farspan:kv_cache_bytes", "farspan:num_requests_running"


@dataclass(frozen=True)
class Together:
    """Two requests under one plan in the small pool."""

    plan: str
    ran_at_once: bool  # both were admitted while the first was alive
    most_bytes: int  # held by both at one moment, at most; of the first alone if they never met
    room_beside_uncompressed: int  # bytes of the pool that an uncompressed first would leave
    uses_freed_pages: bool  # the second held more than that room


def held_after_prompt(server: Server, prompt: Sequence[int], plan: str, answer: int) -> int:
    """KV bytes of one sequence behind its prompt, the page for the first answer tokens included."""
    with server.streaming(prompt, plan, answer) as pieces:
        for _ in range(2):  # the first token is there before a page is taken for it
            next(pieces)
        metrics = server.metrics()
    assert metrics[RUNNING] == 1, f"{metrics[RUNNING]} sequences were alive: generate more tokens"
    return int(metrics[HELD])


def together(
    server: Server, prompts: Sequence[Sequence[int]], plan: str, answer: int, room: int, growth: int
) -> Together:
    """Start a second request when the first has its first token, and watch what they hold."""
    most, ran_at_once = 0, False
    with ThreadPoolExecutor(1) as pool, server.streaming(prompts[0], plan, answer) as pieces:
        next(pieces)
        alone = int(server.metrics()[HELD])
        second = pool.submit(server.complete, prompts[1], plan, 1)
        while not second.done():
            metrics = server.metrics()
            if metrics[RUNNING] == 2:
                ran_at_once = True
                most = max(most, int(metrics[HELD]))
            time.sleep(POLL_SECONDS)
        second.result()
    # What the first may have grown by meanwhile is not the second's.
    uses = ran_at_once and most - alone - growth > room
    return Together(plan, ran_at_once, most if ran_at_once else alone, room, uses)


def pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    parser.add_argument("--compressed", default="snapkv", help="plan to compare with: a name or a file")
    parser.add_argument("--length", type=int, default=7936, help="prompt tokens")
    parser.add_argument("--answer", type=int, default=256, help="tokens that keep a sequence alive")
    parser.add_argument("--cache-dtype", default="auto", choices=["auto", "int8", "fp8"])
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    prompts = [subject.text.ring(start, asked.length) for start in (0, START_OF_SECOND)]
    plans = (KEEP_ALL, Path(asked.compressed).stem)
    flags = [asked.model, *serve_flags(asked, [KEEP_ALL, asked.compressed])]
    flags += ["--cache-dtype", asked.cache_dtype, "--max-model-len", str(asked.length + asked.answer)]

    with serving(*flags) as server:
        held = {plan: held_after_prompt(server, prompts[0], plan, asked.answer) for plan in plans}
    per_block = held[KEEP_ALL] // pages(asked.length + 1)  # bytes of one block of tokens over all rows
    uncompressed = per_block * pages(asked.length + asked.answer)
    pool_bytes = int(POOL * uncompressed)
    growth = per_block * pages(asked.answer)

    # Nearly all time goes to prompts: the first must still be alive when the second has its own.
    small = ("--kv-cache-memory-bytes", str(pool_bytes), "--prefill-share", "0.9")
    with serving(*flags, *small) as server:
        pairs = [
            together(server, prompts, plan, asked.answer, pool_bytes - uncompressed, growth) for plan in plans
        ]
    results = {
        "settings": {
            **subject.settings,
            "prompt_tokens": asked.length,
            "cache_dtype": asked.cache_dtype,
            "compressed": plans[1],
            "pool_bytes": pool_bytes,
        },
        "held_bytes": held,
        "ratio": round(held[plans[1]] / held[KEEP_ALL], 4),
        "together": [asdict(pair) for pair in pairs],
    }
    path = write_results("kv_memory", results, folder=asked.out)
    mib = 2**20
    print_table(
        f"KV memory after {asked.length} prompt tokens; then two requests in {pool_bytes / mib:.0f} MiB",
        ("plan", "held MiB", "of keep_all", "two at once", "most MiB", "second uses freed pages"),
        [
            (
                pair.plan,
                held[pair.plan] / mib,
                held[pair.plan] / held[KEEP_ALL],
                pair.ran_at_once,
                pair.most_bytes / mib,
                pair.uses_freed_pages,
            )
            for pair in pairs
        ],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
