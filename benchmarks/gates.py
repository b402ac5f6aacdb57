"""Do trained gates choose better pages than what needs no training? At equal budget, on text they never saw.

    python -m benchmarks.gates --report mansfield.txt    # which they must not have been trained on

Every block of queries reads `budget` pages: the first, its own, and the best others by a score. Scores are
compared: of a gate; of mean queries and mean keys; of nearness; of chance; and of attention itself, summed
over each page, which none can beat in mass. Two numbers tell them apart: the share of attention that falls on
the pages, and the perplexity of a passage that comes again when all layers read nothing else.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.asking import add_model, command_line, parsed
from benchmarks.common import CannotRun, exit_with, print_table, results_folder, write_results
from benchmarks.prompts import SHIPPED_TEXT, Text, load_text, load_tokenizer, model_folder
from benchmarks.scoring import Scorer
from benchmarks.tasks import Task, plain, repeated
from configs.loading import SHIPPED_PLANS, load_plan
from configs.model import PAGE_SIZE, ModelInfo
from configs.schema import EngineConfig
from engine.gate_features import FeatureReader
from engine.gate_prefill import page_attention
from engine.models import model_info
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.gate_files import Gate, read_gates
from sparse.page_rules import forced_pages, read_pages, visible_pages
from sparse.page_scores import block_pages, key_pages, mean_pages, pooled_keys
from sparse.pattern_masks import page_means
from sparse.seerattention import gate_scores
from sparse.selection import Selection, dense

SHIPPED_GATES = SHIPPED_PLANS / "seerattention-smollm2.safetensors"
TASKS = ("copy", "prose")
KINDS = ("gate", "mean_pool", "local", "random", "attention")


@dataclass
class Pages:
    """What scores look at in one chunk of one layer."""

    layer: int
    q: Tensor  # [Hq, Tq, D] after RoPE
    keys: KeyView
    chunk: Chunk
    scale: float
    gates: list[Gate]

    def scores(self, kind: str) -> Tensor:
        """[Hq, B, P]; what is not in the past means nothing."""
        q, chunk = self.q, self.chunk
        num_tokens = chunk.start + chunk.length
        block_page = block_pages(chunk, q.device)
        shape = (q.shape[0], block_page.shape[0], -(-num_tokens // PAGE_SIZE))
        match kind:
            case "gate":
                pooled = pooled_keys(key_pages(self.keys, num_tokens), num_tokens, chunk.rotation)
                mean_q = page_means(chunk.pre_rope()[0], chunk.start % PAGE_SIZE)
                return gate_scores(self.gates[self.layer], mean_q, pooled, block_page, chunk.rotation)
            case "mean_pool":
                mean_k = mean_pages(self.keys, num_tokens)
                mean_q = page_means(q, chunk.start % PAGE_SIZE)
                return mean_q @ mean_k.repeat_interleave(q.shape[0] // mean_k.shape[0], 0).mT
            case "local":
                return torch.arange(shape[2], dtype=torch.float32).expand(shape)
            case "random":
                draw = torch.Generator().manual_seed(self.layer)
                return torch.rand(shape, generator=draw)
        return self.mass()

    def mass(self) -> Tensor:
        """The attention that each block of queries pays to each page: [Hq, B, P]."""
        chunk = self.chunk
        num_tokens = chunk.start + chunk.length
        assert chunk.start % PAGE_SIZE == num_tokens % PAGE_SIZE == 0, "whole pages"
        k = key_pages(self.keys, num_tokens).flatten(1, 2)
        found = torch.zeros(self.q.shape[0], chunk.length // PAGE_SIZE, num_tokens // PAGE_SIZE)
        for block in range(found.shape[1]):
            rows = self.q[:, block * PAGE_SIZE : (block + 1) * PAGE_SIZE]
            end = chunk.start + (block + 1) * PAGE_SIZE
            found[:, block, : end // PAGE_SIZE] = page_attention(rows, k[:, :end], self.scale)[1]
        return found

    def best(self, scores: Tensor, budget: int) -> Tensor:
        """The first page, a block's own, and the best others, `budget` in all: bool [Hq, B, P]."""
        block_page = block_pages(self.chunk, scores.device)
        forced = forced_pages(1, 1, block_page, scores.shape[2])
        others = scores.masked_fill(forced | ~visible_pages(block_page, scores.shape[2]), float("-inf"))
        top = others.topk(min(budget - 2, scores.shape[2]), dim=-1)
        chosen = torch.zeros_like(others, dtype=torch.bool).scatter_(-1, top.indices, top.values > -math.inf)
        return chosen | forced


class _Method:
    """What every method of this page is, beside its choice."""

    grid = False
    last_rows = 0

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state."""


@dataclass
class Captured(_Method):
    """Reads everything, and notes how much of it lies on the pages that each score would have chosen."""

    gates: list[Gate]
    budgets: Sequence[int]
    shares: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        pages = Pages(layer, q, keys, chunk, scale, self.gates)
        mass = pages.mass()
        judged = block_pages(chunk, q.device) >= chunk.prompt_length // PAGE_SIZE // 4
        for kind in KINDS:
            scores = mass if kind == "attention" else pages.scores(kind)
            for budget in self.budgets:
                share = (mass * pages.best(scores, budget)).sum(-1)[:, judged]
                self.shares.setdefault((kind, budget), []).append(float(share.mean()))
        return dense(q.device)


@dataclass
class Budget(_Method):
    """Reads the pages that one score chooses."""

    kind: str
    budget: int
    gates: list[Gate]

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        pages = Pages(layer, q, keys, chunk, scale, self.gates)
        return read_pages(pages.best(pages.scores(self.kind), self.budget), chunk, 0)


def refuse_training_text(text: Text, gates: Path) -> None:
    """What gates have learnt by heart says nothing of them."""
    made = gates.with_suffix(".json")
    if made.exists() and text.sha256 in {
        one["sha256"] for one in json.loads(made.read_text()).get("texts", ())
    }:
        raise CannotRun(f"{text.name} is a text that {gates.name} was trained on: report on another one")


def captured(
    reader: FeatureReader, gates: list[Gate], text: Text, asked: argparse.Namespace
) -> dict[Any, float]:
    """Mean share of attention on the chosen pages, by (score, budget): all layers, last 3/4 of rows."""
    method = Captured(gates, asked.budgets)
    for number in range(asked.samples):
        reader.run(text.piece(number, asked.samples, asked.length), method)
    return {key: statistics.fmean(values) for key, values in method.shares.items()}


def perplexity(scorer: Scorer, plan: str, tasks: Sequence[Task]) -> tuple[float, float]:
    """Of the judged tokens of some tasks under one plan, and its mean read fraction."""
    nll: list[float] = []
    reads: list[float] = []
    for task in tasks:
        scored = scorer.score(plan, task.tokens, task.prompt_length, task.positions)
        log_probabilities = scored.logits.log_softmax(-1)
        nll += (-log_probabilities.gather(1, torch.tensor(task.targets)[:, None])[:, 0]).tolist()
        reads.append(scored.cost.prefill_read_fraction)
    return math.exp(statistics.fmean(nll)), statistics.fmean(reads)


def tasks_of(text: Text, asked: argparse.Namespace) -> dict[str, list[Task]]:
    """By kind; every judged row is one of the prompt, whose last token alone is replayed."""
    pieces = [text.piece(number, asked.samples, asked.length + 1) for number in range(asked.samples)]
    passage = 2 * asked.length // 5
    made = {
        "copy": lambda piece: repeated(piece, 1, passage),
        "prose": lambda piece: plain(piece, 1, asked.length),
    }
    return {name: [made[name](piece) for piece in pieces] for name in asked.tasks}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add_model(parser)
    parser.add_argument("--gates", type=Path, default=SHIPPED_GATES, help="file of gates to judge")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", default=SHIPPED_TEXT, help="text they never saw"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a piece, whole pages")
    parser.add_argument("--samples", type=int, default=4, help="pieces")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 6, 8, 12], help="pages a block reads")
    parser.add_argument("--scored-budgets", type=int, nargs="*", default=[6, 10], help="for perplexity")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="for perplexity")
    return parsed(parser, arguments)


def scored_rows(
    scorer: Scorer, gates: list[Gate], text: Text, asked: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Perplexities of dense attention, then of every score at every budget, in all layers."""
    exact, tasks = scorer.plans["dense"], tasks_of(text, asked)
    choices = [(kind, budget) for budget in asked.scored_budgets for kind in KINDS]
    for kind, budget in (("dense", None), *choices):
        methods = exact.methods if budget is None else (Budget(kind, budget, gates),) * len(exact.methods)
        scorer.plans["dense"] = dataclasses.replace(exact, methods=methods)
        row: dict[str, Any] = {"score": kind, "budget": budget}
        for name, given in tasks.items():
            row[f"{name}_perplexity"], row[f"{name}_read_fraction"] = perplexity(scorer, "dense", given)
        yield row


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    config = EngineConfig(model=asked.model)
    folder = model_folder(asked.model)
    info = model_info(folder, config)
    text = load_text(asked.report, load_tokenizer(folder))
    refuse_training_text(text, asked.gates)
    gates = read_gates(asked.gates, info)
    out = asked.out or results_folder()
    names = ("length", "samples", "budgets", "scored_budgets", "tasks", "threads")
    settings = {name: getattr(asked, name) for name in names}
    settings |= {"model": folder.name, "gates": asked.gates.name, "text": text.name, "sha256": text.sha256}
    reader = FeatureReader(folder, info, length=asked.length, device="cpu", dtype="float32")
    shares = captured(reader, gates, text, asked)
    del reader
    rows = {key: {"score": key[0], "budget": key[1], "captured": share} for key, share in shares.items()}
    write_results("gates", {"settings": settings, "rows": list(rows.values())}, folder=out)
    if asked.scored_budgets:
        longest = asked.length + 1
        plans = [load_plan("dense")]
        scorer = Scorer(folder, config, plans, dtype="float32", device="cpu", longest=longest)
        for row in scored_rows(scorer, gates, text, asked):
            rows.setdefault((row["score"], row["budget"]), {}).update(row)
            write_results("gates", {"settings": settings, "rows": list(rows.values())}, folder=out)
    show(list(rows.values()))
    print("written: gates.json")


def show(rows: Sequence[dict[str, Any]]) -> None:
    headings = {
        "score": "pages by", "budget": "pages", "captured": "attention captured",
        "copy_perplexity": "copy ppl", "prose_perplexity": "prose ppl", "copy_read_fraction": "read",
    }  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["budget"] or 0, row["score"]))
    print_table("Gates", list(headings.values()), [[row.get(name) for name in headings] for row in ordered])


if __name__ == "__main__":
    exit_with(main)
