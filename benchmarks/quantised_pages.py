"""Decode on a CPU over pages of each dtype: a new token is stored and what rows hold is read.

    python -m benchmarks.quantised_pages --tokens 2048 8192 --layers 8 --heads 9 3

Attention of some layers, each with pages of its own, more than caches hold. Outputs are compared with those
over float32: `error` is the norm of the difference.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass

import torch
from torch import Tensor

from benchmarks.asking import command_line, parsed
from benchmarks.common import exit_with, interleaved_medians, print_table, write_results
from configs.model import PAGE_SIZE
from configs.quantised import FP8, INT8, is_quantised
from engine.kernels import kernels_for
from kvcache.pool import PagePool, pages_for
from kvcache.state import StateRegistry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": INT8, "fp8": FP8}  # of pages
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One dtype at one length."""

    pages: str
    tokens: int  # held by each row
    bytes_per_token: int  # of one row: key, value, scales
    milliseconds: float  # a layer, CPU time
    speedup: float  # over float32
    error: float  # of the outputs, relative to float32


class Case:
    """Rows of some layers in pages of one dtype."""

    def __init__(self, dtype: torch.dtype, k: Tensor, v: Tensor, num_heads: int) -> None:
        """k, v [L, B * Hkv, N, D] float32."""
        layers, rows, tokens, head_dim = k.shape
        computed = dtype if dtype == torch.bfloat16 else torch.float32
        self.kernels = kernels_for(CPU, dtype if is_quantised(dtype) else None)
        self.k, self.v = k[0, :, :1].to(computed), v[0, :, :1].to(computed)
        width = pages_for(tokens)
        self.pool = PagePool(layers * rows * width, head_dim, dtype=dtype, device=CPU, states=StateRegistry())
        order = torch.randperm(self.pool.num_pages, generator=torch.Generator().manual_seed(1)).int()
        self.pages = order.view(layers, 1, rows, width)
        self.held = torch.full((1, rows), tokens, dtype=torch.int32)
        place = torch.arange(tokens)
        self.destinations = self.pages[:, 0, :, place // PAGE_SIZE].long() * PAGE_SIZE + place % PAGE_SIZE
        for layer in range(layers):
            self.kernels.moves.store(
                self.pool, k[layer].to(computed), v[layer].to(computed), self.destinations[layer]
            )
        generator = torch.Generator().manual_seed(2)
        self.q = torch.randn(1, num_heads, head_dim, generator=generator).to(computed)

    def run(self) -> Tensor:
        """The newest token of every layer is stored again, and all is read: the outputs of the last."""
        pool, tokens = self.pool, int(self.held[0, 0])
        for pages, destinations in zip(self.pages, self.destinations, strict=True):
            self.kernels.moves.store(pool, self.k, self.v, destinations[:, -1:])
            out = self.kernels.attend_rows(
                *(self.q, pool.k, pool.v, pages, self.held),
                scale=self.q.shape[2] ** -0.5,
                max_held=tokens,
                k_scales=pool.k_scales,
                v_scales=pool.v_scales,
            )
        return out.float()


def measure(asked: argparse.Namespace, tokens: int) -> list[Row]:
    """Every dtype at this length."""
    num_heads, num_kv_heads = asked.heads
    generator = torch.Generator().manual_seed(0)
    shape = (asked.layers, num_kv_heads, tokens, asked.head_dim)
    k, v = torch.randn(2, *shape, generator=generator)
    cases = {name: Case(dtype, k, v, num_heads) for name, dtype in DTYPES.items()}

    def timed(case: Case) -> Callable[[int], Tensor]:
        return lambda round_: case.run()

    times = interleaved_medians({name: timed(case) for name, case in cases.items()}, asked.rounds)
    exact = cases["float32"].run()
    milliseconds = {name: 1e3 * time.cpu / asked.layers for name, time in times.items()}
    return [
        Row(
            pages=name,
            tokens=tokens,
            bytes_per_token=case.pool.page_bytes // PAGE_SIZE,
            milliseconds=milliseconds[name],
            speedup=milliseconds["float32"] / milliseconds[name],
            error=float((case.run() - exact).norm() / exact.norm()),
        )
        for name, case in cases.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="held by each row")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parsed(parser, arguments)
    rows = [row for tokens in asked.tokens for row in measure(asked, tokens)]
    names = ("layers", "heads", "head_dim", "rounds", "threads")
    settings = {name: getattr(asked, name) for name in names}
    results = {"settings": settings, "rows": [asdict(row) for row in rows]}
    path = write_results("quantised_pages", results, folder=asked.out)
    headings = ("pages", "tokens", "bytes per token", "ms per layer", "speed-up", "error")
    print_table("Decode over pages of each dtype", headings, [astuple(row) for row in rows])
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
