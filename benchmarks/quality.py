"""What plans lose against dense, on real text: needles, copying, next-token distributions, perplexity.

    python -m benchmarks.quality --calibrate emma.txt --plans a.yaml b.yaml    # to choose a setting
    python -m benchmarks.quality --report mansfield.txt --plans a.yaml         # to say what it costs
    python -m benchmarks.quality --plans snapkv:kv.budget=512 snapkv           # with an option changed

"prefill" columns judge rows of the prompt, read as the prefill method says; "decode" columns judge tokens
replayed behind it, read from what the KV policy kept. The gate for any speed claim: digits at most 3 points
under dense, over at least 100 paired needles, and perplexity of a repeated passage at most 1.05 x dense.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.asking import add_device, add_dtype, add_model, command_line, parsed
from benchmarks.common import (
    CannotRun,
    exit_with,
    print_table,
    results_folder,
    write_results,
)
from benchmarks.kvpress_scorer import KvpressScorer
from benchmarks.prompts import SHIPPED_TEXT, Text, load_text, load_tokenizer, model_folder
from benchmarks.scoring import Scored, Scorer
from benchmarks.tasks import CITIES, Chat, Task, needles, plain, repeated
from benchmarks.variants import load_variant
from configs.plan import PlanFile
from configs.schema import EngineConfig
from server.tokenizer import Tokenizer

DENSE = "dense"
PASSAGE = 832  # tokens of the repeated passage, less in short prompts
Score = Callable[[Sequence[int], int, Sequence[int]], Scored]  # tokens, prompt length, positions
GATE_NEEDLES = 100
GATE_DIGITS = 0.03
GATE_COPY = 1.05


@dataclass
class Tally:
    """What one plan did at one length, over all tasks. Lists hold one number per judged token."""

    reads: list[float] = field(default_factory=list)  # per prompt
    recalls: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of prompts that no other plan has computed, too
    tokens: dict[str, list[float]] = field(default_factory=dict)  # by "nll prose prefill" and the like
    right_by_needle: list[list[bool]] = field(default_factory=list)

    def count(self, scored: Scored) -> None:
        cost = scored.cost
        self.reads.append(cost.prefill_read_fraction)
        self.kept.append(cost.kv_tokens_kept / cost.kv_tokens_total)
        if cost.attention_recall is not None:
            self.recalls.append(cost.attention_recall)

    def add(self, name: str, task: Task, values: Tensor) -> None:
        for inside, value in zip(task.in_prompt, values.tolist(), strict=True):
            self.tokens.setdefault(f"{name} {'prefill' if inside else 'decode'}", []).append(value)

    def mean(self, name: str) -> float | None:
        values = self.tokens.get(name)
        return statistics.fmean(values) if values else None

    def perplexity(self, name: str) -> float | None:
        mean = self.mean(f"nll {name}")
        return None if mean is None else math.exp(mean)


def judge(kind: str, task: Task, scored: Scored, dense: Tensor | None, tally: Tally) -> Tensor:
    """Count one task for one plan; returns the log-probabilities [R, V]. dense: those of the dense plan."""
    tally.count(scored)
    log_probabilities = scored.logits.log_softmax(-1)
    targets = torch.tensor(task.targets)
    nll = -log_probabilities.gather(1, targets[:, None])[:, 0]
    if kind == "needles":
        right = (log_probabilities.argmax(-1) == targets).tolist()
        by_needle: dict[int, list[bool]] = {}
        for group, hit in zip(task.groups, right, strict=True):
            by_needle.setdefault(group, []).append(hit)
        tally.right_by_needle += by_needle.values()
        tally.tokens.setdefault("nll digits", []).extend(nll.tolist())
        return log_probabilities
    tally.add(f"nll {kind}", task, nll)
    if kind == "prose" and dense is not None:
        tally.add("kl", task, (dense.exp() * (dense - log_probabilities)).sum(-1))
        tally.add("top1", task, (dense.argmax(-1) == log_probabilities.argmax(-1)).float())
    return log_probabilities


def tasks(
    text: Text, tokenizer: Any, chat: Chat | None, length: int, asked: argparse.Namespace
) -> Iterator[tuple[str, Task]]:
    """All tasks of one length, by kind. The same for every plan: comparisons are paired."""
    passage = min(PASSAGE, length // 4)
    replayed = min(asked.replayed, passage // 2)
    for number in range(asked.samples):
        piece = text.piece(number, asked.samples, length + replayed)
        judged = plain(piece, replayed, asked.rows), repeated(piece, replayed, passage)
        prose, copy = (task.decoded() for task in judged) if asked.decode_only else judged
        yield "prose", prose
        yield "copy", copy
    texts = -(-asked.needles // asked.needles_per_text)
    for number in range(texts):
        piece = text.piece(number, texts, length)
        yield "needles", needles(piece, tokenizer, asked.needles_per_text, length, number, chat)


def row(length: int, plan: str, tally: Tally, dense: Tally) -> dict[str, Any]:
    """One line of the result."""
    digits = [hit for needle in tally.right_by_needle for hit in needle]
    accuracy = statistics.fmean(digits) if digits else None
    found: dict[str, Any] = {
        "length": length,
        "plan": plan,
        "read_fraction": statistics.fmean(tally.reads),
        "recall": statistics.fmean(tally.recalls) if tally.recalls else None,
        "kept": statistics.fmean(tally.kept),
        "seconds": round(statistics.median(tally.seconds), 2) if tally.seconds else None,
    }
    for part in ("prefill", "decode"):
        found[f"kl_{part}"] = tally.mean(f"kl {part}")
        found[f"top1_{part}"] = tally.mean(f"top1 {part}")
        found[f"perplexity_{part}"] = tally.perplexity(f"prose {part}")
        found[f"copy_perplexity_{part}"] = tally.perplexity(f"copy {part}")
    found["needles"] = len(tally.right_by_needle)
    found["digit_accuracy"] = accuracy
    found["needles_exact"] = statistics.fmean(map(all, tally.right_by_needle)) if digits else None
    nll = tally.mean("nll digits")
    found["digit_log_probability"] = None if nll is None else -nll
    if plan != DENSE:
        found["gate"] = gate(tally, dense)
    return found


def gate(tally: Tally, dense: Tally) -> str:
    """Does a plan pass the quality gate? In words, with the reason if not."""
    if len(tally.right_by_needle) < GATE_NEEDLES:
        return f"open: {len(tally.right_by_needle)} needles"
    ours, theirs = (
        statistics.fmean(hit for needle in each.right_by_needle for hit in needle) for each in (tally, dense)
    )
    failed = [] if ours >= theirs - GATE_DIGITS else ["digits"]
    if dense.perplexity("copy decode") is None:
        return "open: nothing copied"
    for part in ("prefill", "decode"):
        copied, exact = tally.perplexity(f"copy {part}"), dense.perplexity(f"copy {part}")
        if copied is None or exact is None:
            continue  # not judged: plans that read a prompt alike do not differ in it
        if copied > GATE_COPY * exact:
            failed.append(f"copy {part}")
    return f"fails: {', '.join(failed)}" if failed else "passes"


def refuse_calibration_text(text: Text, folder: Path) -> None:
    """A report on the text that a setting was chosen on would praise the choice."""
    for earlier in folder.glob("quality*-calibration.json"):
        if json.loads(earlier.read_text())["settings"]["sha256"] == text.sha256:
            raise CannotRun(f"{text.name} is the text of {earlier.name}: report on another one")


def show(rows: Sequence[dict[str, Any]]) -> None:
    names = {
        "length": "tokens", "plan": "plan", "read_fraction": "read", "recall": "recall", "kept": "kept",
        "kl_prefill": "KL pre", "kl_decode": "KL dec",
        "top1_prefill": "top-1 pre", "top1_decode": "top-1 dec",
        "digit_accuracy": "digits", "needles_exact": "exact", "digit_log_probability": "log p",
        "copy_perplexity_prefill": "copy pre", "copy_perplexity_decode": "copy dec",
        "perplexity_prefill": "ppl pre", "perplexity_decode": "ppl dec",
        "seconds": "s", "gate": "gate",
    }  # fmt: skip
    print_table("Quality", list(names.values()), [[row.get(name) for name in names] for row in rows])


def chat_form(folder: Path) -> Chat:
    """A user's message around a document, in this model's chat template, as tokens before and after it."""
    tokenizer = Tokenizer(folder)
    mark = "\x00"

    def chat(question: str) -> tuple[list[int], list[int]]:
        before, after = tokenizer.render_chat([{"role": "user", "content": mark + question}]).split(mark)
        return (
            tokenizer.encode(before, add_special_tokens=False),
            tokenizer.encode(after, add_special_tokens=False),
        )

    return chat


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add_model(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--calibrate", type=Path, metavar="FILE", help="text to choose settings on")
    text.add_argument("--report", type=Path, metavar="FILE", default=SHIPPED_TEXT, help="text to report on")
    parser.add_argument("--plans", nargs="+", default=["minference", "snapkv", "minference-snapkv"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 7936], help="prompt tokens")
    parser.add_argument("--needles", type=int, default=100, help="paired needles per length, at least")
    parser.add_argument("--needles-per-text", type=int, default=5, help="hidden in one prompt")
    parser.add_argument("--form", choices=["raw", "chat"], default="raw", help="of the prompts with needles")
    parser.add_argument("--samples", type=int, default=4, help="pieces of prose, and of copies, per length")
    parser.add_argument("--rows", type=int, default=256, help="judged rows of a prompt of prose")
    parser.add_argument("--replayed", type=int, default=64, help="judged tokens behind the prompt")
    parser.add_argument(
        "--decode-only",
        action="store_true",
        help="judge no row of a prompt: plans that read prompts alike compute each once, together",
    )
    parser.add_argument(
        "--kvpress-python", metavar="PYTHON", help="an interpreter that has kvpress: its SnapKV, too"
    )
    parser.add_argument("--kvpress-budgets", type=int, nargs="+", default=[512, 1024, 2048])
    add_dtype(parser, "float16")
    parser.add_argument(
        "--cache-dtype", choices=["int8", "fp8"], help="judge every plan over pages of codes, too"
    )
    parser.add_argument(
        "--weights-dtype", choices=["bfloat16", "int8"], help="judge every plan with such weights, too"
    )
    add_device(parser)
    parser.add_argument("--name", default="quality", help="of the JSON file: one run, one file")
    asked = parsed(parser, arguments)
    if not 0 < asked.needles_per_text <= len(CITIES):
        parser.error(f"--needles-per-text: {asked.needles_per_text} must be 1 to {len(CITIES)}")
    return asked


def score_by_name(
    asked: argparse.Namespace, folder: Path, plans: Sequence[PlanFile], stack: ExitStack
) -> dict[str, Score]:
    """How each plan, and each peer, scores given tokens. `stack` ends what is started."""
    found: dict[str, Score] = {}
    narrow = (asked.cache_dtype or "auto", asked.weights_dtype or "auto")
    for cache_dtype, weights_dtype in dict.fromkeys([("auto", "auto"), narrow]):
        scorer = Scorer(
            folder,
            EngineConfig(model=asked.model, weights_dtype=weights_dtype),
            plans,
            dtype=asked.dtype,
            device=asked.device,
            longest=max(asked.lengths) + max(asked.replayed, 16 * asked.needles_per_text) + 1,
            cache_dtype=cache_dtype,
        )
        over = "" if cache_dtype == "auto" else f" over {cache_dtype}"
        over += "" if weights_dtype == "auto" else f", {weights_dtype} weights"
        found |= {f"{plan.name}{over}": partial(scorer.score, plan.name) for plan in plans}
    if asked.kvpress_python is not None:
        if not asked.decode_only:
            raise CannotRun("kvpress keeps the logits of a prompt to itself: add --decode-only")
        kvpress = KvpressScorer(asked.kvpress_python, folder, asked.threads)
        stack.callback(kvpress.close)
        for budget in asked.kvpress_budgets:
            found[f"kvpress {kvpress.version}: snapkv {budget}"] = partial(kvpress.score, budget)
    return found


def judge_all(score: dict[str, Score], work: Iterator[tuple[str, Task]], length: int) -> dict[str, Tally]:
    """Every task of one length under every plan, dense first."""
    tallies = {name: Tally() for name in score}
    for number, (kind, task) in enumerate(work, start=1):
        print(f"{length} tokens, text {number}: {kind}", file=sys.stderr)
        dense: Tensor | None = None
        for name, tally in tallies.items():
            began = time.perf_counter()
            scored = score[name](task.tokens, task.prompt_length, task.positions)
            if any(task.in_prompt):
                tally.seconds.append(time.perf_counter() - began)
            judged = judge(kind, task, scored, dense, tally)
            dense = judged if dense is None else dense
    return tallies


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    folder = model_folder(asked.model)
    tokenizer = load_tokenizer(folder)
    text = load_text(asked.calibrate or asked.report, tokenizer)
    device = torch.device(asked.device)
    out = asked.out or results_folder(device)
    if asked.calibrate is None:
        refuse_calibration_text(text, out)
    chat = chat_form(folder) if asked.form == "chat" else None
    plans = list({plan.name: plan for plan in map(load_variant, [DENSE, *asked.plans])}.values())
    names = ("lengths", "needles", "needles_per_text", "form", "samples", "rows", "replayed")
    settings = {name: getattr(asked, name) for name in (*names, "dtype", "cache_dtype", "weights_dtype")}
    settings |= {"model": folder.name, "text": text.name, "sha256": text.sha256, "threads": asked.threads}
    settings["plans"] = {plan.name: plan.model_dump(mode="json") for plan in plans}
    rows: list[dict[str, Any]] = []
    name = asked.name if asked.calibrate is None else f"{asked.name}-calibration"
    skipped: dict[int, str] = {}
    with oracle.offered(), ExitStack() as stack:
        score = score_by_name(asked, folder, plans, stack)
        for length in asked.lengths:
            try:
                tallies = judge_all(score, tasks(text, tokenizer, chat, length, asked), length)
            except CannotRun as error:
                skipped[length] = str(error)
                print(f"{length} tokens skipped: {error}")
                continue
            rows += [row(length, plan, tally, tallies[DENSE]) for plan, tally in tallies.items()]
            write_results(name, {"settings": settings, "rows": rows, "skipped": skipped}, device, out)
    if not rows:
        raise CannotRun("the text is too short for every length")
    show(rows)
    print(f"written: {name}.json")


if __name__ == "__main__":
    exit_with(main)
