"""`farspan bench`: load on a running server, and how it answers: first tokens, gaps, throughput."""

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from server.commands.answers import TEXT, Answer, ask
from server.commands.exits import FAILED, INTERRUPTED, fail
from server.commands.remote import DEFAULT_URL, ApiKey, Remote, Trouble, Url

PERCENTILES = (50, 90, 99)
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
)


def bench(
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="How many at once.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 1024,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer, exactly.")] = 64,
    plan: Annotated[
        str | None, typer.Option(help="Plan to answer under.", show_default="the server's")
    ] = None,
    seed: Annotated[int, typer.Option(help="Other prompts, which the prefix cache does not know yet.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Put load on a running server and measure what clients feel. Every prompt is different.

    [bold]Examples[/bold]

      farspan bench
      farspan bench --concurrency 8 --prompt-tokens 4096 --plan dense --json
    """
    try:
        with Remote(url, api_key) as remote:
            found = _run(remote, requests, concurrency, prompt_tokens, output_tokens, plan, seed)
    except Trouble as trouble:
        fail(str(trouble), trouble.code)
    except KeyboardInterrupt:
        fail("stopped", INTERRUPTED)
    figures = found.figures() | {"concurrency": concurrency, "plan": plan}
    print(json.dumps(figures, indent=2)) if as_json else _show(figures)
    if found.failures:
        fail(f"{len(found.failures)} of {requests} requests failed; the first: {found.failures[0]}", FAILED)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that came back, and how long it took in all."""

    answers: Sequence[Answer]
    failures: Sequence[str]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """Times in seconds, rates per second of the whole run."""
        gaps = [
            later - earlier
            for answer in self.answers
            for earlier, later in zip(answer.arrivals, answer.arrivals[1:], strict=False)
        ]
        prompts = sum(int(answer.usage.get("prompt_tokens") or 0) for answer in self.answers)
        outputs = sum(answer.num_tokens for answer in self.answers)
        return {
            "requests": len(self.answers),
            "failed": len(self.failures),
            "seconds": self.seconds,
            "requests_per_second": len(self.answers) / self.seconds,
            "prompt_tokens_per_second": prompts / self.seconds,
            "output_tokens_per_second": outputs / self.seconds,
            "first_token_seconds": spread([answer.arrivals[0] for answer in self.answers if answer.arrivals]),
            "between_tokens_seconds": spread(gaps),
            "request_seconds": spread([answer.seconds for answer in self.answers]),
            "read_fraction": _mean(self.answers, lambda cost: cost["prefill_read_fraction"]),
            "kept_fraction": _mean(
                self.answers, lambda cost: cost["kv_tokens_kept"] / max(1, cost["kv_tokens_total"])
            ),
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles (nearest rank); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {percent: max(0, -(-percent * len(ordered) // 100) - 1) for percent in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered)} | {
        f"p{percent}": ordered[rank] for percent, rank in ranks.items()
    }


def _mean(answers: Sequence[Answer], value: Any) -> float | None:
    values = [value(answer.cost) for answer in answers if answer.cost]
    return sum(values) / len(values) if values else None


def _run(
    remote: Remote,
    requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    plan: str | None,
    seed: int,
) -> Run:
    from rich.console import Console
    from rich.progress import Progress

    options: dict[str, Any] = {"model": remote.model()["id"], "max_tokens": output_tokens, "ignore_eos": True}
    options |= {"temperature": 0} | ({} if plan is None else {"plan": plan})
    answers: list[Answer] = []
    failures: list[str] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        making = progress.add_task("making prompts", total=requests)
        prompts = []
        for number in range(requests):
            prompts.append(_prompt(remote, prompt_tokens, random.Random(f"{seed}/{number}")))
            progress.advance(making)
        answering = progress.add_task("answering", total=requests)

        def one(prompt: list[int]) -> None:
            try:
                answers.append(ask(remote, TEXT, {**options, "prompt": prompt}))
            except Trouble as trouble:
                failures.append(str(trouble))
            progress.advance(answering)

        began = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as threads:
            try:
                list(threads.map(one, prompts))
            except KeyboardInterrupt:
                threads.shutdown(wait=False, cancel_futures=True)
                remote.close()  # or the threads would wait for their answers
                raise
        return Run(answers, failures, time.perf_counter() - began)


def _prompt(remote: Remote, length: int, rng: random.Random) -> list[int]:
    """Exactly so many tokens of random words, in the server's own tokens."""
    tokens: list[int] = []
    while len(tokens) < length:
        text = " ".join(rng.choices(WORDS, k=length))
        tokens += remote.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    return tokens[:length]


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("seconds")
    for heading in ("mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(heading, justify="right")
    for name, words in (
        ("first_token_seconds", "to the first token"),
        ("between_tokens_seconds", "between tokens"),
        ("request_seconds", "whole request"),
    ):
        if figures[name] is not None:
            table.add_row(words, *(f"{value:.3f}" for value in figures[name].values()))
    console.print(table)
    parts = [
        f"{figures['requests']} requests in {figures['seconds']:.1f} s",
        f"{figures['prompt_tokens_per_second']:,.0f} prompt tokens/s",
        f"{figures['output_tokens_per_second']:,.1f} output tokens/s",
    ]
    if figures["read_fraction"] is not None:
        parts += [f"read {figures['read_fraction']:.0%}", f"kept {figures['kept_fraction']:.0%}"]
    console.print(" · ".join(parts))
