"""Decode steps of a whole model in an engine on a GPU: of plain calls, from graphs, and in its kernels alone.

    python -m benchmarks.gpu_steps --rows 1x2048 16x8192

The model has the sizes of Llama 3.1 8B and random weights; prompts are random tokens under a dense plan. A
step is what a client waits for: scheduling, tables, the forward, sampling. "in kernels" is the same graph
replayed alone, by CUDA events. Under TRITON_INTERPRET=1 it runs on a CPU without graphs, to be tested: its
times mean nothing there.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CannotRun, exit_with, print_table, write_results
from benchmarks.gpu_attention import ceilings, medians
from benchmarks.gpu_decode import row_set
from configs.loading import load_plan
from configs.schema import SchedulerConfig
from engine import attention
from engine.cuda_graph import CudaRecorder
from engine.engine import Engine
from engine.graph_recording import recorded
from engine.graphs import DecodeGraphs, DecodeStep
from engine.kernels import triton_kernels
from engine.messages import Sampling, Submit
from engine.models import info_of
from engine.plans import resolve_plans
from engine.rope import Rope
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from kvcache.cache import CacheSize, KVCache
from kvcache.pool import pages_for
from kvcache.state import StateRegistry

FIRST = 3  # tokens of each answer before the first step that is timed
GRAPH_MEMORY = 4 << 30


@dataclass(frozen=True)
class Row:
    """One batch. Milliseconds of a step, medians; None where nothing was recorded."""

    batch: int
    tokens: int  # of each prompt
    plain: float
    graphs: float | None
    kernels: float | None
    outside: float | None  # of a step from a graph, beside its kernels
    steps_per_second: float
    gb: float  # weights, keys and values
    share: float  # of the bandwidth of a copy, the best step


class Bench:
    """A random model, and engines around it that share a cache."""

    def __init__(self, asked: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        attention.register()
        longest = max(tokens for _, tokens in asked.rows) + FIRST + asked.steps + 1
        sizes = transformers.LlamaConfig(
            vocab_size=asked.vocab,
            hidden_size=asked.heads[0] * asked.head_dim,
            intermediate_size=asked.mlp,
            num_hidden_layers=asked.layers,
            num_attention_heads=asked.heads[0],
            num_key_value_heads=asked.heads[1],
            head_dim=asked.head_dim,
            max_position_embeddings=longest,
        )
        with torch.device(device):
            self.network: Any = transformers.AutoModelForCausalLM.from_config(
                sizes, dtype=dtype, attn_implementation=attention.IMPLEMENTATION
            ).eval()
        self.model = info_of(self.network.config, "random", longest)
        states = StateRegistry()
        self.plans = resolve_plans([load_plan("dense")], self.model, states)
        self.batch = max(batch for batch, _ in asked.rows)
        self.kernels = triton_kernels()
        rows = self.model.num_layers * self.model.num_kv_heads
        most = max(batch * pages_for(tokens + FIRST + asked.steps + 1) for batch, tokens in asked.rows)
        self.cache = KVCache(
            self.model,
            CacheSize(rows * (most + self.batch), self.batch, longest),
            dtype=dtype,
            device=device,
            states=states,
            moves=self.kernels.moves,
        )
        self.device, self.vocab, self.steps = device, asked.vocab, asked.steps
        self.graphs = self._record() if device.type == "cuda" else DecodeGraphs([])

    def _record(self) -> DecodeGraphs:
        make = partial(DecodeStep, self.network, self.cache, self.kernels, Rope.of(self.network))
        methods = [plan.decode for plan in self.plans.values()]
        recorder = CudaRecorder(self.device)
        return recorded(make, methods, self.cache, recorder, largest=self.batch, memory=GRAPH_MEMORY)

    def steps_of(self, batch: int, tokens: int, graphs: DecodeGraphs) -> tuple[list[float], float | None]:
        """Milliseconds of each step of so many sequences, and of the kernels alone, if they are a graph."""
        runner = ModelRunner(self.network, self.cache, self.kernels, self.device, graphs)
        scheduler = Scheduler(SchedulerConfig(max_num_seqs=self.batch), self.cache)
        engine = Engine(self.plans, scheduler, runner, self.cache, ())
        sampling = Sampling(max_tokens=FIRST + self.steps, temperature=0.0, ignore_eos=True)
        generator = torch.Generator().manual_seed(0)
        had = {str(index): 0 for index in range(batch)}
        for name in had:
            prompt = tuple(torch.randint(self.vocab, (tokens,), generator=generator).tolist())
            engine.submit(Submit(name, prompt, tokens, "dense", sampling))
        times: list[float] = []
        alone = None
        while engine.has_work:
            is_timed = len(had) == batch and min(had.values()) >= FIRST
            if is_timed and alone is None and len(graphs):
                alone = self._alone(graphs, batch, tokens)
            began = time.perf_counter()
            outputs = engine.step().outputs  # sampling waits for the device
            if is_timed:
                times.append(1e3 * (time.perf_counter() - began))
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(output.error)
                had[output.request_id] += len(output.tokens)
                if output.finish_reason is not None:
                    del had[output.request_id]
        return times, alone

    def _alone(self, graphs: DecodeGraphs, batch: int, tokens: int) -> float | None:
        """Milliseconds of the last step's graph. What it writes, the next step writes again."""
        graph = graphs.find(self.plans["dense"].decode, batch, tokens + FIRST + self.steps)
        if graph is None:
            return None
        return medians({"graph": lambda _: graph.replay()}, 11, self.device)["graph"]

    def gb(self, batch: int, tokens: int) -> float:
        """That a step reads: weights but the embedding of tokens, keys and values."""
        embedding: int = self.network.get_input_embeddings().weight.nbytes
        weights: int = sum(parameter.nbytes for parameter in self.network.parameters()) - embedding
        pages = batch * self.model.num_layers * self.model.num_kv_heads * pages_for(tokens)
        return (weights + pages * self.cache.pool.page_bytes) / 1e9


def measure(bench: Bench, batch: int, tokens: int, copy_gb_per_s: float) -> Row:
    """Plain and recorded steps, taking turns, once the prompts are in the prefix cache."""
    bench.steps_of(batch, tokens, DecodeGraphs([]))
    plain: list[float] = []
    recorded_steps: list[float] = []
    kernels: float | None = None
    for _ in range(2):
        plain += bench.steps_of(batch, tokens, DecodeGraphs([]))[0]
        if len(bench.graphs):
            times, kernels = bench.steps_of(batch, tokens, bench.graphs)
            recorded_steps += times
    eager = statistics.median(plain)
    graphs = statistics.median(recorded_steps) if recorded_steps else None
    outside = None if graphs is None or kernels is None else graphs - kernels
    best, gb = graphs or eager, bench.gb(batch, tokens)
    share = gb / best * 1e3 / copy_gb_per_s
    return Row(batch, tokens, eager, graphs, kernels, outside, 1e3 / best, gb, share)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = [(1, 2048), (16, 2048), (16, 8192)]
    parser.add_argument("--rows", type=row_set, nargs="+", default=defaults, metavar="BxN")
    parser.add_argument("--steps", type=int, default=40, help="that are timed, each way, twice")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    asked = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise CannotRun("no CUDA device")
    device, dtype = torch.device("cpu" if interpreted else "cuda"), getattr(torch, asked.dtype)
    torch.manual_seed(0)
    reached = ceilings(device, dtype)
    bench = Bench(asked, dtype, device)
    settings = {
        name: getattr(asked, name)
        for name in ("layers", "heads", "head_dim", "mlp", "vocab", "dtype", "steps")
    }
    rows: list[Row] = []
    for batch, tokens in asked.rows:
        rows.append(measure(bench, batch, tokens, reached["copy_gb_per_s"]))
        results = {"settings": settings, "ceilings": reached, "graphs": len(bench.graphs)}
        results["rows"] = [asdict(row) for row in rows]
        write_results("gpu_steps", results, device, asked.out)
        headings = ("batch", "tokens", "plain ms", "graph ms", "in kernels", "outside", "steps/s", "GB")
        print_table(
            f"Decode steps, {asked.layers} layers",
            (*headings, "share of copy"),
            [astuple(row) for row in rows],
        )


if __name__ == "__main__":
    exit_with(main)
