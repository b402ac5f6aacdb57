"""A decode step's linear layers on CPU: engine/linear.cpp beside torch, over weights that no cache holds.

python -m benchmarks.linear --rounds 9
"""

import argparse
import os
from collections.abc import Callable, Sequence

import torch

from benchmarks.common import exit_with, interleaved_medians, print_table, write_results
from engine.linear import linear

INPUTS, OUTPUTS, LAYERS = 576, 1536, 60  # SmolLM2's widest layer, 212 MB of them
TOKENS = (1, 2, 4, 8, 16)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    weights = [torch.randn(OUTPUTS, INPUTS) for _ in range(LAYERS)]

    def over_all(layer: Callable[..., torch.Tensor], tokens: int) -> Callable[[int], None]:
        x = torch.randn(tokens, INPUTS)

        def run(_: int) -> None:
            for weight in weights:
                layer(x, weight, None)

        return run

    rows = []
    for tokens in TOKENS:
        cases = {
            "torch": over_all(torch.nn.functional.linear, tokens),
            "farspan": over_all(linear, tokens),
        }
        times = interleaved_medians(cases, asked.rounds)
        rows.append(
            {
                "tokens": tokens,
                "torch": times["torch"].json(),
                "farspan": times["farspan"].json(),
                "speedup": round(times["torch"].wall / times["farspan"].wall, 3),
            }
        )
    settings = {"inputs": INPUTS, "outputs": OUTPUTS, "layers": LAYERS, "threads": asked.threads}
    path = write_results("linear", {"settings": settings, "rows": rows})
    print_table(
        "Linear layers over a few tokens, float32",
        ("tokens", "torch ms", "farspan ms", "speed-up"),
        [
            (row["tokens"], row["torch"]["wall_s"] * 1e3, row["farspan"]["wall_s"] * 1e3, row["speedup"])
            for row in rows
        ],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
