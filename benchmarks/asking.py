"""How benchmarks are asked: options that mean the same in all of them, and the model and text they name."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.prompts import SHIPPED_TEXT, Text, load_text, load_tokenizer, model_folder


@dataclass(frozen=True)
class Subject:
    """The model and text that a benchmark asks about."""

    folder: Path  # of the model
    text: Text
    settings: dict[str, Any]  # what results say of both


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """`--threads` and `--out`, which all have. doc: the module's own words."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="as the server takes it")


def add_dtype(parser: argparse.ArgumentParser, *more: str) -> None:
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", *more])


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def add_subject(parser: argparse.ArgumentParser) -> None:
    """What `subject_of` reads."""
    add_model(parser)
    add_dtype(parser)
    parser.add_argument("--text", type=Path, default=SHIPPED_TEXT)


def add_prompts(parser: argparse.ArgumentParser, *plans: str, answer: int, why: str) -> None:
    """Prompts of one length under some plans, and the tokens behind each, which are there for a reason."""
    parser.add_argument("--plans", nargs="+", default=list(plans), help="names or files")
    parser.add_argument("--length", type=int, default=7936, help="prompt tokens")
    parser.add_argument("--answer", type=int, default=answer, help=f"generated tokens: {why}")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked. Torch has those threads from here on: the device's name in results says how many."""
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    return asked


def subject_of(asked: argparse.Namespace) -> Subject:
    folder = model_folder(asked.model)
    text = load_text(asked.text, load_tokenizer(folder))
    settings = {"model": folder.name, "dtype": asked.dtype, "threads": asked.threads, "text": text.name}
    return Subject(folder, text, settings)


def serve_flags(asked: argparse.Namespace, plans: Sequence[str | Path] = ()) -> list[str]:
    """The same for `farspan serve`."""
    named = [part for plan in plans for part in ("--plan", str(plan))]
    return [*named, "--dtype", asked.dtype, "--threads", str(asked.threads)]
