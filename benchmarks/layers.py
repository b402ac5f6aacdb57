"""A whole forward on CPU, with what layers.cpp does between matrix products and with HuggingFace's own code.

    python -m benchmarks.layers --tokens 1 4 16 512 --rounds 9

Both models use linear.cpp and torch's attention, without a cache: only norms, rotations and gates differ.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.asking import add_model, command_line, parsed
from benchmarks.common import exit_with, interleaved_medians, print_table, write_results
from benchmarks.prompts import model_folder
from engine.layers import fuse_layers
from engine.linear import speed_up_decode
from engine.models import load_model


def forward(network: Any, tokens: int) -> Callable[[int], Any]:
    """A forward over this many tokens, others in every round."""

    def run(round_: int) -> Any:
        ids = torch.arange(10 + round_, 10 + round_ + tokens)[None]
        with torch.inference_mode():
            return network(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_model(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 512])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parsed(parser, arguments)
    folder = model_folder(asked.model)
    networks = {}
    for name in ("huggingface", "farspan"):
        networks[name] = load_model(folder, dtype="float32", device="cpu", attention="sdpa")
        speed_up_decode(networks[name])
    fuse_layers(networks["farspan"])
    rows = []
    for tokens in asked.tokens:
        cases = {name: forward(network, tokens) for name, network in networks.items()}
        times = interleaved_medians(cases, asked.rounds)
        theirs, ours = times["huggingface"], times["farspan"]
        row = {"tokens": tokens, "huggingface": theirs.json(), "farspan": ours.json()}
        rows.append(row | {"speedup": round(theirs.wall / ours.wall, 3)})
    settings = {"model": folder.name, "dtype": "float32", "threads": asked.threads}
    path = write_results("layers", {"settings": settings, "rows": rows}, folder=asked.out)
    print_table(
        "A forward, float32",
        ("tokens", "HuggingFace's layers, ms", "layers.cpp, ms", "speed-up"),
        [
            (
                row["tokens"],
                row["huggingface"]["wall_s"] * 1e3,
                row["farspan"]["wall_s"] * 1e3,
                row["speedup"],
            )
            for row in rows
        ],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
