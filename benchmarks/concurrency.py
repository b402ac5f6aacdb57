"""Four requests at once against the same four in a row, through the real server.

    python -m benchmarks.concurrency --length 2048 --answer 128

What continuous batching gains: a decode step costs little more for four sequences than for one.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.asking import add_subject, command_line, parsed, serve_flags, subject_of
from benchmarks.common import exit_with, interleaved_medians, print_table, write_results
from benchmarks.prompts import Text
from benchmarks.serving import Server, serving

STRIDE = 61  # tokens between the starts of two prompts: none is another's prefix


def at_once(server: Server, prompts: Sequence[Sequence[int]], answer: int) -> None:
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, None, answer), prompts))


def in_a_row(server: Server, prompts: Sequence[Sequence[int]], answer: int) -> None:
    for prompt in prompts:
        server.complete(prompt, None, answer)


def prompts_of(text: Text, length: int, count: int, numbers: Iterator[int]) -> list[tuple[int, ...]]:
    """`count` prompts that were never sent before."""
    return [text.ring(next(numbers) * STRIDE, length) for _ in range(count)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="prompt tokens of each")
    parser.add_argument("--answer", type=int, default=128, help="tokens generated for each (ignore_eos)")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    numbers = itertools.count()

    def fresh() -> list[tuple[int, ...]]:
        return prompts_of(subject.text, asked.length, asked.requests, numbers)

    with serving(asked.model, *serve_flags(asked, [asked.plan])) as server:
        timings = interleaved_medians(
            {
                "in a row": lambda _: in_a_row(server, fresh(), asked.answer),
                "at once": lambda _: at_once(server, fresh(), asked.answer),
            },
            asked.repeats,
        )
    ratio = timings["at once"].wall / timings["in a row"].wall
    generated = asked.requests * asked.answer
    results = {
        "settings": {
            **subject.settings,
            "plan": asked.plan,
            "requests": asked.requests,
            "prompt_tokens": asked.length,
            "answer_tokens": asked.answer,
        },
        # The work is the server's: the CPU time of this process says nothing.
        "seconds": {name: timing.json() | {"cpu_s_per_thread": None} for name, timing in timings.items()},
        "ratio": round(ratio, 4),
    }
    path = write_results("concurrency", results, folder=asked.out)
    print_table(
        f"{asked.requests} requests of {asked.length} prompt and {asked.answer} answer tokens, {asked.plan}",
        ("", "seconds", "answer tokens/s"),
        [(name, timing.wall, generated / timing.wall) for name, timing in timings.items()],
    )
    print(f"at once / in a row: {ratio:.2f}\nwritten: {path.name}")


if __name__ == "__main__":
    exit_with(main)
