"""Time to first token: transformers' `generate` beside Farspan's engine, in this process or over HTTP.

    python -m benchmarks.ttft --lengths 2048 7936 --plans dense minference --repeats 5

The same tokens, dtype and threads for all. HuggingFace is taken at its best of dynamic and static cache.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import exit_with, interleaved_medians, print_table, write_results
from benchmarks.prompts import SHIPPED_TEXT, Text, load_text, load_tokenizer, model_folder
from benchmarks.serving import Server
from configs.loading import load_config
from engine.engine import Engine
from engine.messages import Cost, Sampling, Submit
from engine.startup import load, resolve

HF_CACHES = ("dynamic", "static")
STRIDE = 61  # tokens between the starts of two prompts


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length that all start differently: no prefix cache can answer for the kernels."""

    text: Text
    length: int
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def next(self) -> tuple[int, ...]:
        return self.text.ring(next(self.numbers) * STRIDE, self.length)


class HuggingFace:
    """The model with transformers' own attention and caches."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import transformers

        transformers.logging.disable_progress_bar()
        self.dtype = dtype
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def first_token(self, prompt: tuple[int, ...], cache: str) -> int:
        tokens = torch.tensor([prompt])
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=1,
            do_sample=False,
            cache_implementation=cache,
            pad_token_id=0,
        )
        return int(out[0, -1])


class InProcess:
    """Our engine, without server: what it costs beside HuggingFace is what the plans cost."""

    def __init__(self, model: str, plans: Sequence[str], dtype: str, threads: int) -> None:
        flags = {"engine.model": model, "engine.dtype": dtype, "engine.threads": threads, "plans": plans}
        # Two sequences of cache are enough for one at a time, whatever its plan promises.
        config = load_config(None, {**flags, "engine.device": "cpu", "scheduler.max_num_seqs": 2})
        self.engine: Engine
        self.engine, card = load(resolve(config))
        self.dtype = card.dtype
        self.plans = [plan.name for plan in card.plans]

    def first_token(self, prompt: tuple[int, ...], plan: str) -> dict[str, Any]:
        """Returns when the token is there, with what the prompt cost."""
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        self.engine.submit(Submit("ttft", prompt, len(prompt), plan, sampling))
        while self.engine.has_work:
            for output in self.engine.step().outputs:
                assert output.error is None, output.error
                if output.tokens:
                    assert output.cost is not None
                    return _cost(output.cost)
        raise AssertionError("the engine ended without a token")


class OverHttp:
    """A running server: adds HTTP, text and the way between processes. Its CPU time is not ours to see."""

    def __init__(self, url: str, plans: Sequence[str]) -> None:
        self.server = Server.at(url)
        self.plans = [Path(plan).stem for plan in plans]

    def first_token(self, prompt: tuple[int, ...], plan: str) -> dict[str, Any]:
        # One token, not streamed: the reply leaves when the first token is there.
        cost: dict[str, Any] = self.server.complete(prompt, plan, max_tokens=1)["farspan"]
        return cost


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "prefill_read_fraction": cost.prefill_read_fraction,
        "attention_recall": cost.attention_recall,
        "kv_tokens_kept": cost.kv_tokens_kept,
    }


@dataclass(frozen=True)
class Row:
    """One candidate at one length."""

    length: int
    candidate: str
    timing: dict[str, Any]
    ratio_to_hf: float  # our time over HuggingFace's best
    prefill_read_fraction: float | None = None
    attention_recall: float | None = None


def measure(ours: InProcess | OverHttp, peer: HuggingFace, prompts: Prompts, repeats: int) -> list[Row]:
    """All candidates at one length, interleaved."""
    costs: dict[str, dict[str, Any]] = {}

    def hf(cache: str) -> Callable[[int], object]:
        return lambda _: peer.first_token(prompts.next(), cache)

    def plan(name: str) -> Callable[[int], object]:
        return lambda _: costs.update({name: ours.first_token(prompts.next(), name)})

    candidates = {f"hf {cache}": hf(cache) for cache in HF_CACHES} | {name: plan(name) for name in ours.plans}
    timings = interleaved_medians(candidates, repeats)
    best = min(timings[f"hf {cache}"].wall for cache in HF_CACHES)
    rows = []
    for name, timing in timings.items():
        cost = costs.get(name, {})
        shown = timing.json()
        if name in costs and isinstance(ours, OverHttp):
            shown["cpu_s_per_thread"] = None  # the work was another process's
        rows.append(
            Row(
                prompts.length,
                name,
                shown,
                round(timing.wall / best, 4),
                cost.get("prefill_read_fraction"),
                cost.get("attention_recall"),
            )
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    headings = ("tokens", "candidate", "TTFT s", "CPU s/thread", "of best HF", "keys read", "recall")
    print_table(
        "Time to first token (medians)",
        headings,
        [
            (
                row.length,
                row.candidate,
                row.timing["wall_s"],
                row.timing["cpu_s_per_thread"],
                row.ratio_to_hf,
                row.prefill_read_fraction,
                row.attention_recall,
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 7936], help="prompt tokens")
    parser.add_argument("--plans", nargs="+", default=["dense", "minference", "minference-snapkv"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path, default=SHIPPED_TEXT)
    parser.add_argument("--server", metavar="URL", help="time a running server instead of the engine")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    asked = parser.parse_args(arguments)

    torch.set_num_threads(asked.threads)
    folder = model_folder(asked.model)
    text = load_text(asked.text, load_tokenizer(folder))
    peer = HuggingFace(folder, asked.dtype)
    ours = (
        OverHttp(asked.server, asked.plans)
        if asked.server
        else InProcess(asked.model, asked.plans, asked.dtype, asked.threads)
    )
    settings = {
        "model": folder.name,
        "dtype": asked.dtype,
        "threads": asked.threads,
        "text": text.name,
        "ours": "over HTTP" if asked.server else "in process",
    }
    rows: list[Row] = []
    for length in asked.lengths:
        rows += measure(ours, peer, Prompts(text, length), asked.repeats)
        results = {"settings": settings, "rows": [asdict(row) for row in rows]}
        path = write_results("ttft", results, folder=asked.out)
    show(rows)
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
