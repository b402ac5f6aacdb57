"""Asks about a long text under several plans, and shows what each of them read, kept and cost.

Start a server first (`farspan serve`), then: python examples/long_document.py
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

TEXT = Path(__file__).parent / "texts" / "pride-and-prejudice.txt"
QUESTION = "Who is Mr. Bingley, and what does his friend Mr. Darcy say about Elizabeth at the ball?"


@dataclass(frozen=True)
class Answer:
    """What came back under one plan."""

    plan: str
    first_token_seconds: float
    seconds: float
    prompt_tokens: int
    cost: dict[str, Any]  # the `farspan` object of the last chunk


def ask(client: OpenAI, model: str, plan: str, document: str, question: str, max_tokens: int) -> Answer:
    """Stream one answer to the terminal."""
    began = time.perf_counter()
    first = None
    cost: dict[str, Any] = {}
    prompt_tokens = 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{document}\n\n{question}"}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"plan": plan},  # what OpenAI's API has no field for travels like this
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage is not None:
            prompt_tokens = chunk.usage.prompt_tokens
        cost = (chunk.model_extra or {}).get("farspan") or cost
    print()
    ended = time.perf_counter()
    return Answer(plan, (first or ended) - began, ended - began, prompt_tokens, cost)


def show(answers: list[Answer]) -> None:
    """One line per plan."""
    table = Table(title=f"{answers[0].prompt_tokens} prompt tokens", box=SIMPLE)
    for heading in ("plan", "TTFT", "total", "read", "recall", "KV kept", "KV"):
        table.add_column(heading, justify="left" if heading == "plan" else "right", no_wrap=True)
    for answer in answers:
        cost = answer.cost
        recall = cost["attention_recall"]
        table.add_row(
            answer.plan,
            f"{answer.first_token_seconds:.1f} s",
            f"{answer.seconds:.1f} s",
            f"{cost['prefill_read_fraction']:.0%}",
            "all" if recall is None else f"{recall:.3f}",
            f"{cost['kv_tokens_kept']:.0f}/{cost['kv_tokens_total']}",
            f"{cost['kv_bytes'] / 2**20:.0f} MiB",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--plan", action="append", help="repeat it; default: dense and the server's default")
    parser.add_argument("--file", type=Path, default=TEXT, help="the text to ask about")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=96)
    arguments = parser.parse_args()

    document = arguments.file.read_text(encoding="utf-8")
    client = OpenAI(base_url=arguments.base_url, api_key="none", max_retries=0, timeout=3600)
    try:
        model = client.models.list().data[0]
        loaded: list[dict[str, Any]] = (model.model_extra or {})["plans"]
        plans = arguments.plan or list(dict.fromkeys(["dense", loaded[0]["name"]]))
        answers = []
        for plan in plans:
            print(f"\n--- {plan}: {arguments.question}\n")
            answers.append(ask(client, model.id, plan, document, arguments.question, arguments.max_tokens))
    except APIError as error:
        raise SystemExit(f"{arguments.base_url}: {error.message}") from error
    print()
    show(answers)


if __name__ == "__main__":
    main()
