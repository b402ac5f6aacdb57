"""What stretching RoPE at load gives: needles found beyond the context that a model was made for, and within.

    python -m benchmarks.context_extension --lengths 4096 12288 --scalings none linear:2 yarn:2

Needles as in benchmarks.quality, under dense attention. A text that is too short begins anew; the needles
stay the only ones of their kind.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.asking import add_device, add_dtype, add_model, command_line, parsed
from benchmarks.common import exit_with, print_table, write_results
from benchmarks.prompts import SHIPPED_TEXT, load_text, load_tokenizer, model_folder
from benchmarks.quality import DENSE, Tally, judge
from benchmarks.scoring import Scorer
from benchmarks.tasks import Task, needles
from configs.loading import load_plan
from configs.schema import EngineConfig

NONE = "none"
ANSWER = 16  # tokens of one answer, at most


def measure(scorer: Scorer, tasks: Sequence[Task], length: int, scaling: str) -> dict[str, Any]:
    """One line of the result."""
    tally = Tally()
    for task in tasks:
        scored = scorer.score(DENSE, task.tokens, task.prompt_length, task.positions)
        judge("needles", task, scored, None, tally)
    nll = tally.mean("nll digits")
    assert nll is not None
    return {
        "length": length,
        "scaling": scaling,
        "needles": len(tally.right_by_needle),
        "digit_accuracy": statistics.fmean(hit for needle in tally.right_by_needle for hit in needle),
        "needles_exact": statistics.fmean(map(all, tally.right_by_needle)),
        "digit_log_probability": -nll,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    names = {
        "length": "tokens", "scaling": "scaling", "needles": "needles",
        "digit_accuracy": "digits", "needles_exact": "exact", "digit_log_probability": "log p",
    }  # fmt: skip
    print_table("Context extension", list(names.values()), [[row[name] for name in names] for row in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_model(parser)
    parser.add_argument("--text", type=Path, default=SHIPPED_TEXT, help="what the needles are hidden in")
    parser.add_argument("--scalings", nargs="+", default=[NONE, "yarn:2"], help=f"{NONE}, linear:F, yarn:F")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 12_288], help="prompt tokens")
    parser.add_argument("--needles", type=int, default=5, help="hidden in one prompt")
    parser.add_argument("--prompts", type=int, default=2, help="per length")
    add_dtype(parser, "float16")
    add_device(parser)
    asked = parsed(parser, arguments)
    folder = model_folder(asked.model)
    tokenizer = load_tokenizer(folder)
    text = load_text(asked.text, tokenizer)
    tasks = {
        length: [
            needles(text.ring(number * 997, length), tokenizer, asked.needles, length, number)
            for number in range(asked.prompts)
        ]
        for length in asked.lengths
    }
    names = ("lengths", "scalings", "needles", "prompts", "dtype", "threads")
    settings = {name: getattr(asked, name) for name in names}
    settings |= {"model": folder.name, "text": text.name, "sha256": text.sha256}
    rows: list[dict[str, Any]] = []
    for scaling in asked.scalings:
        scorer = Scorer(
            folder,
            EngineConfig(model=asked.model, rope_scaling=None if scaling == NONE else scaling),
            [load_plan(DENSE)],
            dtype=asked.dtype,
            device=asked.device,
            longest=max(asked.lengths) + ANSWER * asked.needles + 1,
        )
        for length in asked.lengths:
            rows.append(measure(scorer, tasks[length], length, scaling))
            results = {"settings": settings, "rows": rows}
            write_results("context_extension", results, torch.device(asked.device), asked.out)
    show(rows)
    print("written: context_extension.json")


if __name__ == "__main__":
    exit_with(main)
