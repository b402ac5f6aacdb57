"""Decode on a GPU: attention over rows and whole steps against the bandwidth of a copy, and compaction.

    python -m benchmarks.gpu_decode --rows 1x131072 1x2048 16x8192 16x2048 --layers 8 --heads 32 8

A row set BxN is B sequences whose rows hold N tokens each: 1x131072 against 1x2048 is full KV against 2,048
kept. A step is, per layer, the linear layers of a model of this shape, the store of a token, and attention.
All layers have weights and pages of their own, more than caches hold; they run in one CUDA graph and, to show
what starting kernels costs, one by one. Under TRITON_INTERPRET=1 it runs on a CPU, to be tested: its times
mean nothing there.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

import kvcache.decode
from benchmarks.common import CannotRun, exit_with, print_table, write_results
from benchmarks.gpu_attention import ceilings, medians
from configs.model import PAGE_SIZE, ModelInfo
from configs.quantised import FP8, INT8, is_quantised, token_bytes
from kvcache.cache import CacheSize, KVCache
from kvcache.moves import TORCH_MOVES, Moves, store
from kvcache.pool import PagePool, pages_for
from kvcache.state import StateRegistry

MLP_WIDTH = 3.5  # of the hidden size, as in Llama 3
COMPACTED_LAYERS = 32
KEPT = 2048  # tokens per KV head, of a compaction


@dataclass(frozen=True)
class Shape:
    """What is drawn, and where."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    page_dtype: torch.dtype | None = None  # of quantised pages

    @property
    def hidden(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class Row:
    """One case."""

    case: str
    batch: int
    tokens: int  # held by each row
    milliseconds: float  # of all layers, in a graph
    one_by_one: float  # the same without a graph
    gb: float  # that must be read
    gb_per_second: float
    share: float  # of the bandwidth of a copy


@dataclass(frozen=True)
class Compacted:
    """The compaction of one prompt in all its layers."""

    moves: str
    tokens: int
    kept: float  # per row, mean
    milliseconds: float


class Bench:
    """Pages and weights of some layers, and what a decode step does with them."""

    def __init__(self, shape: Shape, row_sets: Sequence[tuple[int, int]]) -> None:
        from kvcache.kernels import triton_decode, triton_store  # here: they need Triton

        self.attend_rows, self.store = triton_decode.attend_rows, triton_store.store
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.layer_pages = max(batch * shape.num_kv_heads * pages_for(tokens) for batch, tokens in row_sets)
        self.pool = random_pool(shape, shape.num_layers * self.layer_pages)
        width = int(MLP_WIDTH * shape.hidden)
        sizes = (
            (shape.hidden, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim),
            (shape.hidden, shape.hidden),
            (shape.hidden, 2 * width),
            (width, shape.hidden),
        )
        self.weights = [
            [self._random(*size) * size[0] ** -0.5 for size in sizes] for _ in range(shape.num_layers)
        ]

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.shape.device, dtype=self.shape.dtype)

    def tables(self, batch: int, tokens: int) -> Tensor:
        """Page ids of every row in shuffled order, int32 [L, B, Hkv, P]."""
        rows = (batch, self.shape.num_kv_heads, pages_for(tokens))
        count = batch * self.shape.num_kv_heads * rows[2]
        device = self.shape.device
        layers = [
            torch.randperm(self.layer_pages, device=device)[:count].view(rows) + layer * self.layer_pages
            for layer in range(self.shape.num_layers)
        ]
        return torch.stack(layers).int()

    def attention(self, batch: int, tokens: int) -> Callable[[], Tensor]:
        """Attention of every layer; the first is compared with torch."""
        shape, tables = self.shape, self.tables(batch, tokens)
        q = self._random(shape.num_layers, batch, shape.num_heads, shape.head_dim)
        held = torch.full((batch, shape.num_kv_heads), tokens, dtype=torch.int32, device=shape.device)

        def layer(attend: Callable[..., Tensor], i: int) -> Tensor:
            return self._attend(attend, q[i], tables[i], held, tokens)

        ours, torchs = layer(self.attend_rows, 0), layer(kvcache.decode.attend_rows, 0)
        error = float((ours.float() - torchs.float()).norm() / torchs.float().norm())
        assert error < (1e-4 if shape.dtype == torch.float32 else 2e-2), (
            f"decode differs from torch by {error}"
        )
        return lambda: torch.stack([layer(self.attend_rows, i) for i in range(shape.num_layers)])

    def _attend(
        self, attend: Callable[..., Tensor], q: Tensor, pages: Tensor, held: Tensor, tokens: int
    ) -> Tensor:
        pool = self.pool
        return attend(
            *(q, pool.k, pool.v, pages, held),
            scale=self.scale,
            max_held=tokens,
            k_scales=pool.k_scales,
            v_scales=pool.v_scales,
        )

    def step(self, batch: int, tokens: int) -> Callable[[], Tensor]:
        """Linear layers, store and attention of every layer, each on what the last one gave."""
        shape, tables = self.shape, self.tables(batch, tokens)
        held = torch.full((batch, shape.num_kv_heads), tokens, dtype=torch.int32, device=shape.device)
        last = tables[..., (tokens - 1) // PAGE_SIZE].long() * PAGE_SIZE + (tokens - 1) % PAGE_SIZE
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        start = self._random(batch, shape.hidden)

        def run() -> Tensor:
            x = start
            for i, (qkv, out, gate_up, down) in enumerate(self.weights):
                mixed = torch.nn.functional.rms_norm(x, (shape.hidden,)) @ qkv
                q, k, v = mixed.view(batch, -1, shape.head_dim).split(heads, dim=1)
                self.store(self.pool, k, v, last[i])
                attended = self._attend(self.attend_rows, q, tables[i], held, tokens)
                x = x + attended.reshape(batch, -1) @ out
                gate, up = (torch.nn.functional.rms_norm(x, (shape.hidden,)) @ gate_up).chunk(2, dim=1)
                x = x + (torch.nn.functional.silu(gate) * up) @ down
            return x

        return run

    def kv_bytes(self, batch: int, tokens: int) -> int:
        """Keys and values that attention of all layers reads."""
        shape = self.shape
        token = 2 * token_bytes(shape.head_dim, shape.page_dtype or shape.dtype)
        return shape.num_layers * batch * shape.num_kv_heads * tokens * token

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for layer in self.weights for weight in layer)


def random_pool(shape: Shape, num_pages: int) -> PagePool:
    """Pages full of random tokens: zeros would hide what is not read."""
    dtype = shape.page_dtype or shape.dtype
    pool = PagePool(num_pages, shape.head_dim, dtype=dtype, device=shape.device, states=StateRegistry())
    if not is_quantised(dtype):
        for tensor in (pool.k, pool.v):
            tensor.normal_()
        return pool
    destinations = torch.arange(num_pages * PAGE_SIZE, device=shape.device)
    for part in destinations.split(1 << 20):
        k, v = torch.randn(2, 1, len(part), shape.head_dim, device=shape.device, dtype=shape.dtype)
        store(pool, k, v, part[None])
    return pool


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[int], object]:
    """One graph of all that `run` starts; where there are no graphs, `run` itself."""
    if device.type != "cuda":
        return lambda _: run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile and libraries start outside of the graph
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda _: graph.replay()


def measure(
    shape: Shape, row_sets: Sequence[tuple[int, int]], rounds: int, copy_gb_per_s: float
) -> list[Row]:
    """Attention and steps over every row set, interleaved."""
    bench = Bench(shape, row_sets)
    runs = {
        (case, *rows): make(*rows)
        for case, make in (("attention", bench.attention), ("step", bench.step))
        for rows in row_sets
    }
    cases: dict[str, Callable[[int], object]] = {}
    for key, run in runs.items():
        cases[f"{key} graph"] = captured(run, shape.device)
        cases[f"{key} eager"] = lambda _, run=run: run()
    times = medians(cases, rounds, shape.device)
    rows = []
    for case, batch, tokens in runs:
        milliseconds = times[f"{(case, batch, tokens)} graph"]
        read = bench.kv_bytes(batch, tokens) + (bench.weight_bytes if case == "step" else 0)
        rate = read / milliseconds / 1e6
        eager = times[f"{(case, batch, tokens)} eager"]
        rows.append(Row(case, batch, tokens, milliseconds, eager, read / 1e9, rate, rate / copy_gb_per_s))
    return rows


def compaction(shape: Shape, length: int, kept: int, rounds: int) -> list[Compacted]:
    """A prompt of every layer, compacted by Triton and by torch: wall time, until the device is done."""
    from kvcache.kernels import triton_compact

    by = {"triton": Moves(move_kept=triton_compact.move_kept), "torch": TORCH_MOVES}
    times: dict[str, list[float]] = {name: [] for name in by}
    model = ModelInfo(
        "random", shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, 2, length
    )
    num_pages = shape.num_layers * shape.num_kv_heads * pages_for(length)
    cache = KVCache(
        model,
        CacheSize(num_pages, 1, length),
        dtype=shape.dtype,
        device=shape.device,
        states=StateRegistry(),
        page_dtype=shape.page_dtype,
    )
    for tensor in cache.pool.by_token:
        tensor.random_(0, 100)
    shares = torch.rand(shape.num_layers, shape.num_kv_heads, length, device=shape.device)
    keep = shares < kept / length
    for index in range(-1, rounds):  # the first round is not counted: it compiles and warms up
        for name, moves in by.items():
            cache.moves = moves
            slot = cache.admit(num_pages)
            cache.reserve(slot, length)
            cache.sync()
            cache.advance(slot, length)
            _wait(shape.device)
            began = time.perf_counter()
            cache.compact(slot, keep)
            _wait(shape.device)
            if index >= 0:
                times[name].append(1e3 * (time.perf_counter() - began))
            cache.release(slot)
    mean = float(keep.sum(-1, dtype=torch.float32).mean())
    return [Compacted(name, length, mean, statistics.median(found)) for name, found in times.items()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def row_set(text: str) -> tuple[int, int]:
    batch, _, tokens = text.partition("x")
    if not (batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxTOKENS, as in 16x8192")
    return int(batch), int(tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = [(1, 131072), (1, KEPT), (16, 8192), (16, KEPT)]
    parser.add_argument("--rows", type=row_set, nargs="+", default=defaults, metavar="BxN")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--compact", type=int, default=131072, metavar="TOKENS", help="of a prompt; 0 = none")
    parser.add_argument("--compact-layers", type=int, default=COMPACTED_LAYERS)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--page-dtype", choices=["int8", "fp8"], help="of pages; default: as --dtype")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    asked = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise CannotRun("no CUDA device")
    device = torch.device("cpu" if interpreted else "cuda")
    page_dtype = {None: None, "int8": INT8, "fp8": FP8}[asked.page_dtype]
    shape = Shape(asked.layers, *asked.heads, asked.head_dim, getattr(torch, asked.dtype), device, page_dtype)
    torch.manual_seed(0)
    reached = ceilings(device, shape.dtype)
    settings = {
        "layers": asked.layers,
        "heads": asked.heads,
        "head_dim": asked.head_dim,
        "dtype": asked.dtype,
        "page_dtype": asked.page_dtype,
    }
    rows = measure(shape, asked.rows, asked.rounds, reached["copy_gb_per_s"])
    results = {"settings": settings, "ceilings": reached, "rows": [asdict(row) for row in rows]}
    write_results("gpu_decode", results, device, asked.out)
    headings = ("case", "batch", "tokens", "ms", "ms one by one", "GB", "GB/s", "share of copy")
    print_table(f"Decode, {asked.layers} layers", headings, [astuple(row) for row in rows])
    if asked.compact:
        compact_shape = Shape(
            asked.compact_layers, *asked.heads, asked.head_dim, shape.dtype, device, page_dtype
        )
        done = compaction(compact_shape, asked.compact, min(KEPT, asked.compact // 4), min(3, asked.rounds))
        write_results("gpu_decode", results | {"compaction": [asdict(x) for x in done]}, device, asked.out)
        title = f"Compaction of a prompt, {asked.compact_layers} layers"
        print_table(title, ("moves", "tokens", "kept", "ms"), [astuple(each) for each in done])
    print(f"copy: {reached['copy_gb_per_s']:.0f} GB/s")


if __name__ == "__main__":
    exit_with(main)
