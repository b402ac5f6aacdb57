"""Prefill attention of one layer on CPU: torch SDPA, our dense, and our block-sparse at some densities.

    python -m benchmarks.prefill_attention --lengths 8192 --heads 32 8 --head-dim 128

Keys and choices are random: `method_speed.py` times methods on real ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.asking import add_dtype, command_line, parsed
from benchmarks.common import (
    CannotRun,
    exit_with,
    gemm_ceiling,
    interleaved_medians,
    print_table,
    write_results,
)
from benchmarks.random_prompts import RandomPrompt, Shape, draw_prompt, draw_selection
from configs.model import PAGE_SIZE
from sparse.base import Chunk
from sparse.kernels import cpu
from sparse.recall import causal_cells, read_cells
from sparse.selection import Selection, dense

DENSITIES = (0.2, 0.1, 0.05)
INPUT_SETS = 3  # taken in turn: no case finds its inputs in the cache because it has just read them
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One case at one length; ratios by CPU time, and by the clock on the wall beside them."""

    length: int
    case: str
    density: float  # cells computed over causal cells
    wall_s: float
    cpu_s_per_thread: float
    gflops: float  # of the cells computed
    over_sdpa: float
    over_sdpa_wall: float
    over_own_dense: float
    share_of_one_over_density: float


def for_torch(shape: Shape, prompt: RandomPrompt) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as torch wants them, one per query head: [1, Hq, N, D] each."""
    group = shape.num_heads // shape.num_kv_heads
    k, v = (x.repeat_interleave(group, 0)[None] for x in (prompt.k, prompt.v))
    return prompt.q[None], k, v


def measure(shape: Shape, rounds: int) -> list[Row]:
    """All cases of one length, interleaved."""
    prompts = [draw_prompt(shape, seed) for seed in range(INPUT_SETS)]
    torchs = [for_torch(shape, prompt) for prompt in prompts]
    chunk = Chunk(0, shape.length, shape.length, shape.length + 1, slot=0)
    scale = shape.head_dim**-0.5
    selections = {"dense": dense(CPU)} | {
        f"sparse {density:.0%}": draw_selection(shape.length, [density] * shape.num_kv_heads, PAGE_SIZE, CPU)
        for density in DENSITIES
    }

    def sdpa(index: int) -> Tensor:
        return F.scaled_dot_product_attention(*torchs[index % INPUT_SETS], is_causal=True, scale=scale)

    def ours(selection: Selection, index: int) -> Tensor:
        prompt = prompts[index % INPUT_SETS]
        return cpu.attend(prompt.q, prompt.keys, chunk, selection, scale=scale).out

    cases: dict[str, Callable[[int], Tensor]] = {"sdpa": sdpa}
    cases |= {name: partial(ours, selection) for name, selection in selections.items()}
    error = (cases["dense"](0) - sdpa(0)[0]).abs().max().item()
    assert error < (1e-4 if shape.dtype == torch.float32 else 5e-2), f"dense differs from SDPA by {error}"
    timings = interleaved_medians(cases, rounds)
    cells = causal_cells(chunk, shape.num_heads)
    rows = []
    for name, timing in timings.items():
        density = 1.0
        if name in selections:
            density = float(read_cells(selections[name], chunk, shape.num_heads)) / cells
        over_dense = timings["dense"].cpu / timing.cpu
        rows.append(
            Row(
                length=shape.length,
                case=name,
                density=density,
                wall_s=timing.wall,
                cpu_s_per_thread=timing.cpu,
                gflops=4 * shape.head_dim * cells * density / timing.cpu / 1e9,
                over_sdpa=timings["sdpa"].cpu / timing.cpu,
                over_sdpa_wall=timings["sdpa"].wall / timing.wall,
                over_own_dense=over_dense,
                share_of_one_over_density=over_dense * density,
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="whole pages")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=64)
    add_dtype(parser)
    asked = parsed(parser, arguments)
    if any(length % PAGE_SIZE or length <= 0 for length in asked.lengths):
        parser.error(f"--lengths must be multiples of {PAGE_SIZE}")
    if not cpu.is_available():
        raise CannotRun("the CPU kernel cannot be compiled here")
    num_heads, num_kv_heads = asked.heads
    ceilings = {str(dtype): gemm_ceiling(dtype) for dtype in (torch.float32, torch.bfloat16)}
    heads = f"{num_heads}/{num_kv_heads} heads, D {asked.head_dim}, {asked.dtype}"
    rows: list[Row] = []
    for length in asked.lengths:
        dtype = getattr(torch, asked.dtype)
        rows += measure(Shape(num_heads, num_kv_heads, asked.head_dim, length, dtype, CPU), asked.rounds)
        results = {"shape": heads, "rounds": asked.rounds, "gemm_gflops": ceilings}
        results["rows"] = [asdict(row) for row in rows]
        path = write_results("prefill_attention", results, folder=asked.out)
    gemms = ", ".join(f"{name.removeprefix('torch.')} {gflops:.0f}" for name, gflops in ceilings.items())
    headings = (
        "tokens", "case", "density", "wall s", "CPU s", "GFLOP/s",
        "x SDPA", "x SDPA (wall)", "x own dense", "share of 1/density",
    )  # fmt: skip
    print_table(f"{heads}; GEMM GFLOP/s: {gemms}", headings, [astuple(row) for row in rows])
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
