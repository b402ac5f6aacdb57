"""Linear layers of decode steps and of chunks on CPU: engine/linear.cpp beside torch, over uncached weights.

python -m benchmarks.linear --rounds 9
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.asking import command_line, parsed
from benchmarks.common import exit_with, interleaved_medians, print_table, write_results
from configs.bf16_products import bf16_products
from engine.linear import MOST_TOKENS, linear, linear_many

INPUTS, OUTPUTS, LAYERS = 576, 1536, 60  # SmolLM2's widest layer, 212 MB of them
TOKENS = (1, 2, 4, 8, 16, 32, 128, 2048)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parsed(parser, arguments)
    whole = [torch.randn(OUTPUTS, INPUTS) for _ in range(LAYERS)]
    half = [weight.bfloat16() for weight in whole]

    def over_all(
        layer: Callable[..., torch.Tensor],
        weights: list[torch.Tensor],
        tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> Callable[[int], None]:
        x = torch.randn(tokens, INPUTS, dtype=dtype)

        def run(_: int) -> None:
            for weight in weights:
                layer(x, weight, None)

        return run

    rows: list[dict[str, Any]] = []
    for tokens in TOKENS:
        ours, theirs = linear if tokens <= MOST_TOKENS else linear_many, torch.nn.functional.linear
        cases = {
            "torch": over_all(theirs, whole, tokens),
            "farspan": over_all(ours, whole, tokens),
            "farspan_bf16": over_all(ours, half, tokens),
        }
        if bf16_products():
            in_bf16 = partial(ours, in_bf16=True)
            cases["torch_in_bf16"] = over_all(theirs, half, tokens, torch.bfloat16)
            cases["farspan_in_bf16"] = over_all(in_bf16, half, tokens)
        times = interleaved_medians(cases, asked.rounds)
        row = {
            "tokens": tokens,
            **{name: times[name].json() for name in cases},
            "speedup": round(times["torch"].wall / times["farspan"].wall, 3),
            "speedup_bf16": round(times["torch"].wall / times["farspan_bf16"].wall, 3),
        }
        if "torch_in_bf16" in times:  # x comes and goes as float32 in ours, as bf16 in torch's
            row["speedup_in_bf16"] = round(times["torch_in_bf16"].wall / times["farspan_in_bf16"].wall, 3)
        rows.append(row)
    settings = {"inputs": INPUTS, "outputs": OUTPUTS, "layers": LAYERS, "threads": asked.threads}
    path = write_results("linear", {"settings": settings, "rows": rows}, folder=asked.out)
    print_table(
        "Linear layers, float32",
        ("tokens", "torch ms", "farspan ms", "speed-up", "of bf16 weights", "bf16 over bf16"),
        [
            (
                row["tokens"],
                row["torch"]["wall_s"] * 1e3,
                row["farspan"]["wall_s"] * 1e3,
                row["speedup"],
                row["speedup_bf16"],
                row.get("speedup_in_bf16", "-"),
            )
            for row in rows
        ],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
