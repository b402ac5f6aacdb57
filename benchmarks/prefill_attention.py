"""Prefill attention of one layer on CPU: torch SDPA, our dense, and our block-sparse at some densities."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import Timing, device_name, gemm_ceiling, interleaved_medians, write_results
from benchmarks.random_prompts import PagedKeys
from configs.model import PAGE_SIZE
from sparse.base import Chunk
from sparse.kernels import cpu
from sparse.selection import Selection, dense, lists_from_mask

DENSITIES = (0.2, 0.1, 0.05)
INPUT_SETS = 3  # taken in turn: no case finds its inputs in the cache because it has just read them


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def flops(self, length: int) -> float:
        """Of dense causal attention."""
        return 4 * self.head_dim * self.num_heads * length * (length + 1) / 2


@dataclass(frozen=True)
class Inputs:
    """One prompt: queries, paged keys, and the same keys as torch wants them, one per query head."""

    q: Tensor  # [1, Hq, N, D]
    k: Tensor  # [1, Hq, N, D]
    v: Tensor
    keys: PagedKeys
    sparse: dict[float, Selection]


def make_inputs(shape: Shape, length: int, seed: int) -> Inputs:
    """Random values, none of them zero."""
    g = torch.Generator().manual_seed(seed)
    num_pages = length // PAGE_SIZE
    pages = (
        torch.randperm(shape.num_kv_heads * num_pages, generator=g).int().view(shape.num_kv_heads, num_pages)
    )

    def random(*sizes: int) -> Tensor:
        x = torch.randn(*sizes, generator=g)
        return torch.where(x == 0, 1.0, x).to(shape.dtype)

    pools = [random(shape.num_kv_heads * num_pages, PAGE_SIZE, shape.head_dim) for _ in range(2)]
    keys = PagedKeys(length, pools[0], pools[1], pages)
    group = shape.num_heads // shape.num_kv_heads
    k, v = (x.repeat_interleave(group, 0)[None] for x in keys.contiguous())
    q = random(1, shape.num_heads, length, shape.head_dim)
    lists = {d: select(shape.num_kv_heads, num_pages, d, g) for d in DENSITIES}
    return Inputs(q, k, v, keys, lists)


def select(num_lists: int, num_pages: int, density: float, g: torch.Generator) -> Selection:
    """The first page, the diagonal, and others at random until the density is reached."""
    mask = torch.zeros(num_lists, num_pages, num_pages, dtype=torch.bool)
    for head in range(num_lists):
        for block in range(num_pages):
            mask[head, block, [0, block]] = True
            others = round(density * (block + 1)) - 2
            if others > 0:
                mask[head, block, 1 + torch.randperm(block - 1, generator=g)[:others]] = True
    return Selection(PAGE_SIZE, lists_from_mask(mask, PAGE_SIZE))


def computed_density(selection: Selection) -> float:
    """Tiles computed, of the causal tiles."""
    num_lists, num_blocks = selection.pages.counts.shape
    return float(selection.pages.counts.sum()) / (num_lists * num_blocks * (num_blocks + 1) / 2)


def measure(shape: Shape, length: int, rounds: int) -> tuple[dict[str, Timing], dict[str, float]]:
    """Timings and computed densities, by case."""
    inputs = [make_inputs(shape, length, seed) for seed in range(INPUT_SETS)]
    chunk = Chunk(0, length, length, length + 1, slot=0)
    scale = shape.head_dim**-0.5

    def sdpa(index: int) -> Tensor:
        x = inputs[index % INPUT_SETS]
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=scale)

    def ours(selection: Callable[[Inputs], Selection]) -> Callable[[int], Tensor]:
        def run(index: int) -> Tensor:
            x = inputs[index % INPUT_SETS]
            return cpu.attend(x.q[0], x.keys, chunk, selection(x), scale=scale).out

        return run

    def listed(density: float, x: Inputs) -> Selection:
        return x.sparse[density]

    everything = dense(torch.device("cpu"))
    cases: dict[str, Callable[[int], Tensor]] = {"sdpa": sdpa, "dense": ours(lambda _: everything)}
    densities = {"sdpa": 1.0, "dense": 1.0}
    for density in DENSITIES:
        name = f"sparse {density:.0%}"
        cases[name] = ours(partial(listed, density))
        densities[name] = computed_density(inputs[0].sparse[density])
    error = (cases["dense"](0) - sdpa(0)[0]).abs().max().item()
    assert error < (1e-4 if shape.dtype == torch.float32 else 5e-2), f"dense differs from SDPA by {error}"
    return interleaved_medians(cases, rounds), densities


def rows_of(shape: Shape, length: int, rounds: int) -> list[dict[str, object]]:
    """What the table shows of one length; ratios by CPU time, and by wall time beside them."""
    timings, densities = measure(shape, length, rounds)
    rows: list[dict[str, object]] = []
    for name, timing in timings.items():
        density = densities[name]
        over_dense = timings["dense"].cpu / timing.cpu
        rows.append(
            {
                "length": length,
                "case": name,
                "density": density,
                "wall_s": timing.wall,
                "cpu_s_per_thread": timing.cpu,
                "gflops": shape.flops(length) * density / timing.cpu / 1e9,
                "over_sdpa": timings["sdpa"].cpu / timing.cpu,
                "over_sdpa_wall": timings["sdpa"].wall / timing.wall,
                "over_own_dense": over_dense,
                "share_of_one_over_density": over_dense * density,
            }
        )
    return rows


def show(rows: list[dict[str, object]], title: str) -> None:
    table = Table(title=title)
    for column in (
        *("tokens", "case", "density", "wall ms", "CPU ms", "GFLOP/s"),
        *("x SDPA", "x SDPA (wall)", "x own dense", "share of 1/density"),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['length']}",
            f"{row['case']}",
            f"{row['density']:.3f}",
            f"{1e3 * float(str(row['wall_s'])):.1f}",
            f"{1e3 * float(str(row['cpu_s_per_thread'])):.1f}",
            f"{row['gflops']:.0f}",
            f"{row['over_sdpa']:.2f}",
            f"{row['over_sdpa_wall']:.2f}",
            f"{row['over_own_dense']:.2f}",
            f"{row['share_of_one_over_density']:.2f}",
            end_section=row["case"] == f"sparse {DENSITIES[-1]:.0%}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="whole pages")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    if any(length % PAGE_SIZE or length <= 0 for length in options.lengths):
        parser.error(f"--lengths must be multiples of {PAGE_SIZE}")
    if not cpu.is_available():
        parser.exit(1, "the CPU kernel cannot be compiled here\n")
    num_heads, num_kv_heads = options.heads
    shape = Shape(num_heads, num_kv_heads, options.head_dim, getattr(torch, options.dtype))
    ceilings = {str(dtype): gemm_ceiling(dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = [row for length in options.lengths for row in rows_of(shape, length, options.rounds)]
    gemms = ", ".join(f"{name.removeprefix('torch.')} {gflops:.0f}" for name, gflops in ceilings.items())
    heads = f"{shape.num_heads}/{shape.num_kv_heads} heads, D {shape.head_dim}, {options.dtype}"
    show(rows, f"{device_name()}\n{heads}\nGEMM GFLOP/s: {gemms}")
    results = {"shape": heads, "rounds": options.rounds, "gemm_gflops": ceilings, "rows": rows}
    print(write_results("prefill_attention", results))


if __name__ == "__main__":
    main()
