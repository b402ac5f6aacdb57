"""Asks ten questions about one document at once, under several plans: what sharing and forgetting save.

Start a server first (`farspan serve --plan dense --plan snapkv --plan minference-snapkv`), then:

    python examples/many_questions.py --plan dense --plan snapkv --plan minference-snapkv
"""

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

TEXT = Path(__file__).parent / "texts" / "pride-and-prejudice.txt"
QUESTIONS = (
    "Who is Mr. Bingley?",
    "What does Mrs. Bennet want for her daughters?",
    "How many daughters do the Bennets have?",
    "What does Mr. Darcy say about Elizabeth at the ball?",
    "Who is Jane?",
    "What is Netherfield Park?",
    "Who are Mr. Bingley's sisters?",
    "What does Charlotte Lucas think about marriage?",
    "How does Mr. Bennet speak to his wife?",
    "What is the first sentence of the text?",
)


@dataclass(frozen=True)
class Answer:
    """One question's."""

    first_token_seconds: float
    cached_tokens: int
    prompt_tokens: int
    kv_bytes: int
    text: str


async def ask(client: AsyncOpenAI, model: str, plan: str, document: str, question: str, most: int) -> Answer:
    """The document comes first: what prompts have in common is their beginning."""
    began = time.perf_counter()
    first, text = None, ""
    usage: Any = None
    cost: dict[str, Any] = {}
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{document}\n\n{question}"}],
        max_tokens=most,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"plan": plan},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
        cost = (chunk.model_extra or {}).get("farspan") or cost
    return Answer(
        (first or time.perf_counter()) - began,
        usage.prompt_tokens_details.cached_tokens,
        usage.prompt_tokens,
        cost["kv_bytes"],
        text,
    )


def show(found: dict[str, list[Answer]]) -> None:
    """One line per plan."""
    tokens = next(iter(found.values()))[0].prompt_tokens
    table = Table(title=f"{len(QUESTIONS)} questions about a document of about {tokens} tokens", box=SIMPLE)
    for heading in ("plan", "TTFT first", "median", "last", "cached tokens", "KV per answer"):
        table.add_column(heading, justify="left" if heading == "plan" else "right", no_wrap=True)
    for plan, answers in found.items():
        times = sorted(answer.first_token_seconds for answer in answers)
        table.add_row(
            plan,
            f"{times[0]:.1f} s",
            f"{statistics.median(times):.1f} s",
            f"{times[-1]:.1f} s",
            f"{statistics.median(answer.cached_tokens for answer in answers):.0f}",
            f"{statistics.fmean(answer.kv_bytes for answer in answers) / 2**20:.0f} MiB",
        )
    Console().print(table)


async def run(arguments: argparse.Namespace) -> None:
    document = arguments.file.read_text(encoding="utf-8")
    client = AsyncOpenAI(base_url=arguments.base_url, api_key="none", max_retries=0, timeout=3600)
    try:
        model = (await client.models.list()).data[0]
        loaded: list[dict[str, Any]] = (model.model_extra or {})["plans"]
        found: dict[str, list[Answer]] = {}
        for plan in arguments.plan or [card["name"] for card in loaded]:
            asked = (
                ask(client, model.id, plan, document, question, arguments.max_tokens)
                for question in QUESTIONS
            )
            found[plan] = list(await asyncio.gather(*asked))
            print(f"\n--- {plan}")
            for question, answer in zip(QUESTIONS, found[plan], strict=True):
                print(f"{question}\n    {' '.join(answer.text.split())}")
    except APIError as error:
        raise SystemExit(f"{arguments.base_url}: {error.message}") from error
    print()
    show(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--plan", action="append", help="repeat it; default: every plan that is loaded")
    parser.add_argument("--file", type=Path, default=TEXT, help="the text to ask about")
    parser.add_argument("--max-tokens", type=int, default=32)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
