"""Prefill attention of one layer on a GPU: SDPA, flash-attn, our dense, sparse, mixed heads, and chunks.

    python -m benchmarks.gpu_attention --lengths 131072 32768 --heads 32 8 --head-dim 128

Inputs are random and taken in turn from several sets; medians of CUDA events over interleaved rounds. "share
of 1/density" is what sparse attention reaches of the ideal: time of our own dense x density / its time.
Under TRITON_INTERPRET=1 it runs on a CPU, to be tested: its times mean nothing there.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import CannotRun, exit_with, print_table, write_results
from benchmarks.random_prompts import Shape, draw_prompt, draw_selection
from configs.model import ModelInfo
from kvcache.state import StateRegistry
from sparse.attention import Attended
from sparse.base import Chunk
from sparse.kernels.cudnn_dense import DTYPES, CudnnDense, cudnn_attention
from sparse.kernels.flash_dense import FlashDense
from sparse.minference import MInference
from sparse.recall import causal_cells, read_cells
from sparse.selection import Selection, dense

DENSITIES = (0.10, 0.05)
FEW = 0.02  # of the sparse half of the heads, in the mixed case
CHUNK = 8192
INDEXED = 2048  # rows of a chunk that a method selects for
INPUT_SETS = 3
QUERY_BLOCK = 128
# What torch offers for causal attention with grouped heads, by the name in the table.
BACKENDS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Row:
    """One case."""

    length: int
    case: str
    density: float  # cells computed over causal cells
    milliseconds: float
    tflops: float  # of the cells computed
    over_best_other: float | None  # time of the best dense attention of others over this one's
    share: float | None  # own dense time x density / time


@dataclass(frozen=True)
class Index:
    """One part of a sparse chunk."""

    length: int
    case: str
    milliseconds: float


class Bench:
    """One shape on one device: its inputs, and what can be done with them."""

    def __init__(self, shape: Shape) -> None:
        from sparse.kernels.triton_attention import attend  # here: it needs Triton

        self.attend = attend
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.prompts = [draw_prompt(shape, seed) for seed in range(INPUT_SETS)]
        self.whole = self.chunk(0, shape.length)
        self.causal_cells = causal_cells(self.whole, shape.num_heads)
        self.left_out: dict[str, str] = {}  # attention of others, and why

    def chunk(self, start: int, length: int) -> Chunk:
        return Chunk(start, length, self.shape.length, self.shape.length + 1, slot=0)

    def select(self, densities: Sequence[float]) -> Selection:
        return draw_selection(self.shape.length, densities, QUERY_BLOCK, self.shape.device)

    def density(self, selection: Selection) -> float:
        return float(read_cells(selection, self.whole, self.shape.num_heads)) / self.causal_cells

    def flops(self, density: float) -> float:
        return 4 * self.shape.head_dim * self.causal_cells * density

    def ours(self, selection: Selection) -> Callable[[int], Tensor]:
        def run(index: int) -> Tensor:
            x = self.prompts[index % INPUT_SETS]
            return self.attend(x.q, x.keys, self.whole, selection, scale=self.scale).out

        return run

    def in_chunks(self, attend: Callable[..., Attended]) -> Callable[[int], Tensor]:
        """Dense, by chunks of CHUNK tokens, as a long prompt is served. Gives the last chunk."""

        def run(index: int) -> Tensor:
            x = self.prompts[index % INPUT_SETS]
            everything = dense(self.shape.device)
            for start in range(0, self.shape.length, CHUNK):
                end = min(start + CHUNK, self.shape.length)
                chunk = self.chunk(start, end - start)
                out = attend(x.q[:, start:end], x.keys, chunk, everything, scale=self.scale).out
            return out

        return run

    def chunks_by_cudnn(self) -> dict[str, Callable[[int], object]]:
        """The same by cuDNN in parts, if it can and agrees; the gathering of our pages is not timed."""
        name = f"dense, chunks of {CHUNK}, cuDNN"
        run = self.in_chunks(CudnnDense(cudnn_attention, self.attend))
        if self.shape.dtype not in DTYPES or self.shape.length % CHUNK:
            return {}
        try:
            agree(self.in_chunks(self.attend)(0), run(0), self.shape.dtype)
        except (RuntimeError, AssertionError) as error:
            self.left_out[name] = str(error).splitlines()[0]
            print(f"{name}: left out: {self.left_out[name]}")
            return {}
        return {name: run}

    def flash_attn(self, flash: Callable[..., Any]) -> Callable[[int], Tensor]:
        """The flash-attn package, the gathering of our pages included."""
        attend = FlashDense(flash, self.attend)

        def run(index: int) -> Tensor:
            x = self.prompts[index % INPUT_SETS]
            everything = dense(self.shape.device)
            return attend(x.q, x.keys, self.whole, everything, scale=self.scale).out

        return run

    def torchs(self, backend: SDPBackend) -> Callable[[int], Tensor]:
        def run(index: int) -> Tensor:
            x = self.prompts[index % INPUT_SETS]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    x.q[None], x.k[None], x.v[None], is_causal=True, enable_gqa=True
                )
            return out[0]

        return run


def medians(
    cases: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds by case, A-B-A-B. The first round is not counted: it compiles and warms up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(-1, rounds):
        for name, run in cases.items():
            milliseconds = _timed(run, index, device)
            if index >= 0:
                times[name].append(milliseconds)
    return {name: statistics.median(found) for name, found in times.items()}


def _timed(run: Callable[[int], object], index: int, device: torch.device) -> float:
    """Milliseconds on the device; on the host, when interpreted."""
    if device.type != "cuda":
        began = time.perf_counter()
        run(index)
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run(index)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def baselines(bench: Bench) -> dict[str, Callable[[int], object]]:
    """Dense attention as others have it for this shape on this machine, where it agrees with ours."""
    cases: dict[str, Callable[[int], object]] = {}
    ours = bench.ours(dense(bench.shape.device))(0)
    runs = {name: bench.torchs(backend) for name, backend in BACKENDS.items()}
    with contextlib.suppress(ImportError):
        runs["flash-attn"] = bench.flash_attn(import_module("flash_attn").flash_attn_func)
    for name, run in runs.items():
        try:
            theirs = run(0)
            agree(ours, theirs, bench.shape.dtype)
            cases[name] = run
        except (RuntimeError, AssertionError) as error:  # "no available kernel", or one of the two is wrong
            bench.left_out[name] = str(error).splitlines()[0]
            print(f"{name}: left out: {bench.left_out[name]}")
    return cases


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Relative error in the norm; two ways to sum in bf16 differ by some 1e-3, wrong answers by 1."""
    rows = slice(-4096, None)  # the last rows read every key; float32 copies of all would not fit beside
    a, b = ours[:, rows].float(), theirs[:, rows].float()
    error = float((a - b).norm() / b.norm())
    assert error < (1e-4 if dtype == torch.float32 else 1e-2), f"dense differs from SDPA by {error}"


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches at its simplest: a matrix product, and a copy (bytes read and written)."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(16 * size * size // 4, device=device)
    target = torch.empty_like(source)
    found = medians({"gemm": lambda _: a @ b, "copy": lambda _: target.copy_(source)}, 5, device)
    return {
        "gemm_tflops": 2 * size**3 / found["gemm"] / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / found["copy"] / 1e6,
    }


def measure(bench: Bench, rounds: int) -> list[Row]:
    """All cases of one length, interleaved."""
    kv, few = bench.shape.num_kv_heads, bench.shape.num_kv_heads // 2
    selections = {f"sparse {density:.0%}": bench.select([density] * kv) for density in DENSITIES}
    # A list per query head: no two heads share what they load.
    selections["sparse 10%, per query head"] = bench.select([DENSITIES[0]] * bench.shape.num_heads)
    selections[f"half dense, half {FEW:.0%}"] = bench.select([1.0] * (kv - few) + [FEW] * few)
    torchs = baselines(bench)
    cases: dict[str, Callable[[int], object]] = {**torchs, "dense": bench.ours(dense(bench.shape.device))}
    cases[f"dense, chunks of {CHUNK}"] = bench.in_chunks(bench.attend)
    cases |= bench.chunks_by_cudnn()
    cases |= {name: bench.ours(selection) for name, selection in selections.items()}
    times = medians(cases, rounds, bench.shape.device)
    best = min((times[name] for name in torchs), default=None)
    rows = []
    for name, milliseconds in times.items():
        density = bench.density(selections[name]) if name in selections else 1.0
        rows.append(
            Row(
                bench.shape.length,
                name,
                density,
                milliseconds,
                bench.flops(density) / milliseconds / 1e9,
                None if best is None else best / milliseconds,
                None if name in torchs else times["dense"] * density / milliseconds,
            )
        )
    return rows


def measure_index(bench: Bench, rounds: int) -> list[Index]:
    """What choosing costs beside reading, in the last chunk of a prompt: MInference on random keys."""
    from engine.kernels import triton_kernels  # here: it needs Triton

    shape, length = bench.shape, min(INDEXED, bench.shape.length // 2)
    start, num_rows = shape.length - length, min(64, length // 2)
    method = MInference(last_q=num_rows)
    model = ModelInfo("random", 1, shape.num_heads, shape.num_kv_heads, shape.head_dim, 2, shape.length)
    method.attach(model, Path(), StateRegistry())
    kernels = triton_kernels()
    chunk = replace(bench.chunk(start, length), index=kernels.index)

    def look(index: int) -> object:
        x = bench.prompts[index % INPUT_SETS]
        return kernels.index.estimate(x.q[:, -num_rows:], shape.length - num_rows, x.keys, scale=bench.scale)

    def select(index: int) -> Selection:
        x = bench.prompts[index % INPUT_SETS]
        return method.select(0, x.q[:, start:], x.keys, chunk, scale=bench.scale)

    selection = select(0)

    def read(index: int) -> object:
        x = bench.prompts[index % INPUT_SETS]
        return bench.attend(x.q[:, start:], x.keys, chunk, selection, scale=bench.scale)

    cases: dict[str, Callable[[int], object]] = {
        f"estimator, {num_rows} rows": look,
        f"select for {length} rows, estimator included": select,
        "attention over what was selected": read,
    }
    times = medians(cases, rounds, shape.device)
    return [Index(shape.length, name, milliseconds) for name, milliseconds in times.items()]


def show(rows: Sequence[Row]) -> None:
    headings = ("tokens", "case", "density", "ms", "TFLOP/s", "x best other", "share of 1/density")
    print_table("Prefill attention, one layer", headings, [astuple(row) for row in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    asked = parser.parse_args(arguments)
    if any(length % QUERY_BLOCK or length <= 0 for length in asked.lengths):
        parser.error(f"--lengths must be multiples of {QUERY_BLOCK}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise CannotRun("no CUDA device")
    device, dtype = torch.device("cpu" if interpreted else "cuda"), getattr(torch, asked.dtype)
    num_heads, num_kv_heads = asked.heads
    settings = {"heads": asked.heads, "head_dim": asked.head_dim, "dtype": asked.dtype}
    reached = ceilings(device, dtype)
    rows: list[Row] = []
    index: list[Index] = []
    left_out: dict[str, dict[str, str]] = {}
    for length in asked.lengths:
        bench = Bench(Shape(num_heads, num_kv_heads, asked.head_dim, length, dtype, device))
        rows += measure(bench, asked.rounds)
        index += measure_index(bench, asked.rounds)
        left_out[str(length)] = bench.left_out
        results = {"settings": settings, "ceilings": reached, "rows": [asdict(row) for row in rows]}
        results["index"] = [asdict(row) for row in index]
        results["left_out"] = left_out
        write_results("gpu_attention", results, device, asked.out)
        show(rows)
        parts = [astuple(row) for row in index]
        print_table("MInference, the last chunk of one layer", ("tokens", "case", "ms"), parts)
    print(
        f"ceilings: {reached['gemm_tflops']:.0f} TFLOP/s {asked.dtype}, {reached['copy_gb_per_s']:.0f} GB/s"
    )


if __name__ == "__main__":
    exit_with(main)
