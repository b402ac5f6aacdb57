"""Decode on CPU, side by side: other engines, batches, layers, a compressed cache, a part of what is held.

    python -m benchmarks.decode --rounds 5
    python -m benchmarks.decode --comparisons batch quest --model my-model
    python -m benchmarks.decode --comparisons llama.cpp --peer-python PATH

Only decode steps are timed: prompts are computed before, and then the prefix cache has them.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.asking import add_subject, command_line, parsed, subject_of
from benchmarks.common import (
    CannotRun,
    Elapsed,
    Timing,
    exit_with,
    interleaved_medians,
    print_table,
    write_results,
)
from benchmarks.peer_process import PeerProcess
from benchmarks.peers import Setting
from benchmarks.prompts import Text, gguf_file
from benchmarks.variants import save_variant
from configs.loading import load_config
from engine.engine import Engine
from engine.messages import Sampling, Submit
from engine.startup import load, resolve

HUGGINGFACE = "hf generate"
LLAMA_CPP = ("llama.cpp", "llama.cpp-flash")  # in bf16, weights as well as keys and values
STRIDE = 61  # tokens between the starts of two prompts: none is another's prefix
WHILE_OTHERS_BEGIN = 512  # tokens that the first of a batch may generate until the last has begun


@dataclass(frozen=True)
class Case:
    """One candidate of a comparison."""

    name: str
    plan: str | None  # None = another engine, the name says which
    batch: int = 1
    flags: tuple[tuple[str, str], ...] = ()  # settings of its engine, in place of the others'
    apart: bool = False  # layers run part by part, as HuggingFace's modules have them


@dataclass(frozen=True)
class Comparison:
    """Candidates at one prompt length. The first is what the others are compared with."""

    name: str
    length: int
    cases: tuple[Case, ...]
    rope_scaling: str | None = None


def comparisons(scale: int, dtype: str = "float32") -> list[Comparison]:
    """Prompts of the documented lengths over `scale`: 1 to report, more to try out."""
    half, byte = ("engine.weights_dtype", "bfloat16"), ("cache.dtype", "int8")
    small = [
        Case("dense, bf16 weights", "dense", flags=(half,)),
        Case("dense, bf16 weights, int8 pages", "dense", flags=(half, byte)),
    ]
    smallest = small[-1].flags if dtype == "float32" else (byte,)
    if dtype == "bfloat16":  # weights are that small without
        small = [Case("dense, int8 pages", "dense", flags=(byte,))]
    peers = [Case(name, None) for name in LLAMA_CPP]
    apart = Case("layers part by part", "dense", flags=smallest, apart=True)
    whole = Case("layers in two calls", "dense", flags=smallest)
    kept, read = f"snapkv:kv.budget={2048 // scale}", f"quest:decode.read={max(128, 1024 // scale)}"
    found = [
        Comparison("huggingface", 4096 // scale, (Case(HUGGINGFACE, None), Case("dense", "dense"), *small)),
        Comparison("llama.cpp", 4096 // scale, (*peers, Case("dense", "dense"), *small)),
        Comparison("batch", 2048 // scale, (Case("1 at once", "dense"), Case("8 at once", "dense", 8))),
        Comparison(
            "batch of int8 pages",
            2048 // scale,
            (Case("1 at once", "dense", flags=(byte,)), Case("8 at once", "dense", 8, flags=(byte,))),
        ),
        Comparison("layers", 4096 // scale, (apart, whole)),
        Comparison("quest", 7936 // scale, (Case("full", "dense"), Case(read, read))),
        Comparison("kept", 16128 // scale, (Case("all kept", "dense"), Case(kept, kept)), "yarn:2"),
    ]
    if dtype == "float32":
        cases = (Case("all kept", "dense", flags=(half,)), Case(kept, kept, flags=(half,)))
        found.append(Comparison("kept with bf16 weights", 16128 // scale, cases, "yarn:2"))
    return found


class Ours:
    """Our engine, without server."""

    def __init__(
        self,
        asked: argparse.Namespace,
        plans: Sequence[str],
        most: int,
        *,
        apart: bool = False,
        **changes: str | None,
    ) -> None:
        flags = {"engine.model": asked.model, "engine.dtype": asked.dtype, "engine.threads": asked.threads}
        # A pool for twice as many: prompts wait in the prefix cache while a copy of them is compressed.
        flags |= {"engine.device": "cpu", "scheduler.max_num_seqs": 2 * most, **changes}
        with TemporaryDirectory() as folder:
            files = [save_variant(plan, Path(folder)) for plan in plans]
            resolved = resolve(load_config(None, {**flags, "plans": files}))
        self._engine: Engine
        fused: AbstractContextManager[Any] = patch("engine.startup.fuse_decode") if apart else nullcontext()
        with fused:
            self._engine, _ = load(resolved)

    def decode(self, plan: str, prompts: Sequence[tuple[int, ...]], steps: int) -> Elapsed:
        """So many decode steps of all prompts together, once each has its first token."""
        engine, extra = self._engine, 2 if len(prompts) == 1 else WHILE_OTHERS_BEGIN
        sampling = Sampling(max_tokens=steps + extra, temperature=0.0, ignore_eos=True)
        names = {str(number) for number in range(len(prompts))}
        for name, prompt in zip(sorted(names, key=int), prompts, strict=True):
            engine.submit(Submit(name, prompt, len(prompt), plan, sampling))
        begun: set[str] = set()
        while begun != names:
            begun |= self._step()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            assert self._step() == names, "a sequence ended while it was timed"
        took = Elapsed(time.perf_counter() - wall, time.process_time() - cpu)
        for name in names:
            engine.abort(name)
        while engine.has_work:
            engine.step()
        return took

    def _step(self) -> set[str]:
        """Who got a token."""
        outputs = self._engine.step().outputs
        assert not any(output.error for output in outputs), outputs
        return {output.request_id for output in outputs if output.tokens}


class Peer:
    """An engine in a process of its own, behind a prompt that is computed once."""

    def __init__(self, process: PeerProcess, prompt: tuple[int, ...]) -> None:
        self.versions: dict[str, str] | None = process.versions
        self._process = process
        process.first_token(prompt)

    def decode(self, steps: int) -> Elapsed:
        """So many decode steps behind the first token."""
        return self._process.decode(steps)[1]


class HuggingFace:
    """transformers' generate with its dynamic cache, behind a prompt that is computed once."""

    versions = None  # those of this process

    def __init__(self, folder: Path, dtype: str, prompt: tuple[int, ...]) -> None:
        import transformers

        transformers.logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._tokens = torch.tensor([prompt])
        self._cache = transformers.DynamicCache(config=self._model.config)
        with torch.inference_mode():
            self._model(self._tokens[:, :-1], past_key_values=self._cache, logits_to_keep=1)

    def decode(self, steps: int) -> Elapsed:
        """So many decode steps behind the first token."""
        clocks: list[tuple[float, float]] = []

        def note(tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            clocks.append((time.perf_counter(), time.process_time()))
            return torch.zeros(tokens.shape[0], dtype=torch.bool)

        if generated := self._cache.get_seq_length() - self._tokens.shape[1] + 1:
            self._cache.crop(-generated)
        self._model.generate(
            self._tokens,
            attention_mask=torch.ones_like(self._tokens),
            past_key_values=self._cache,
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[note],
        )
        assert len(clocks) == steps + 1, f"{len(clocks)} tokens of {steps + 1}"
        return Elapsed(clocks[-1][0] - clocks[0][0], clocks[-1][1] - clocks[0][1])


def measure(asked: argparse.Namespace, folder: Path, text: Text, one: Comparison) -> list[dict[str, Any]]:
    """All candidates of a comparison that can run here, interleaved."""
    prompts = [text.ring(number * STRIDE, one.length) for number in range(max(c.batch for c in one.cases))]
    with ExitStack() as stack:
        runs: dict[str, Callable[[int], object]] = {}
        versions: dict[str, dict[str, str] | None] = {}
        for case in one.cases:
            if case.plan is None:
                other = _other(case.name, asked, folder, prompts[0], stack)
                if other is not None:
                    runs[case.name] = lambda _, other=other: other.decode(asked.steps)  # type: ignore[misc]
                    versions[case.name] = other.versions
        if one.cases[0].plan is None and not runs:
            return []
        engines = {}
        for kind in dict.fromkeys((case.flags, case.apart) for case in one.cases if case.plan is not None):
            flags, apart = kind
            plans = dict.fromkeys(
                case.plan for case in one.cases if case.plan and (case.flags, case.apart) == kind
            )
            changes = {"engine.rope_scaling": one.rope_scaling, **dict(flags)}
            engines[kind] = Ours(asked, list(plans), len(prompts), apart=apart, **changes)
        for case in one.cases:
            if case.plan is not None:
                ours = engines[case.flags, case.apart]
                run = partial(ours.decode, case.plan, prompts[: case.batch], asked.steps)
                runs[case.name] = lambda _, run=run: run()  # type: ignore[misc]
        timings = interleaved_medians(runs, asked.rounds)
    cases = [case for case in one.cases if case.name in runs]
    return [row(one, case, cases, timings, asked.steps, versions.get(case.name)) for case in cases]


def _other(
    name: str, asked: argparse.Namespace, folder: Path, prompt: tuple[int, ...], stack: ExitStack
) -> "HuggingFace | Peer | None":
    """Another engine, the prompt computed; None, in words, where it cannot run."""
    if name == HUGGINGFACE:
        return HuggingFace(folder, asked.dtype, prompt)
    file = gguf_file(asked.model)
    if file is None:
        print(f"left out: {name}, which reads a GGUF file; {folder.name} is none")
        return None
    longest = len(prompt) + asked.steps
    try:
        peer = PeerProcess(name, Setting(str(file), "bfloat16", asked.threads, longest), asked.peer_python)
    except CannotRun as error:
        print(f"left out: {error}")
        return None
    stack.callback(peer.close)
    return Peer(peer, prompt)


def row(
    one: Comparison,
    case: Case,
    cases: Sequence[Case],
    timings: dict[str, Timing],
    steps: int,
    versions: dict[str, str] | None,
) -> dict[str, Any]:
    speed = {other.name: other.batch * steps / timings[other.name].wall for other in cases}
    return {
        "comparison": one.name,
        "length": one.length,
        "rope_scaling": one.rope_scaling,
        "candidate": case.name,
        "batch": case.batch,
        "tokens_per_second": round(speed[case.name], 3),
        "ratio": round(speed[case.name] / speed[cases[0].name], 4),  # of tokens/s, to the first candidate's
        "timing": timings[case.name].json(),
        "versions": versions,  # of another engine
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    names = [one.name for one in comparisons(1)]
    parser.add_argument("--comparisons", nargs="+", choices=names, default=names)
    parser.add_argument("--scale", type=int, default=1, help="prompts so many times shorter, to try out")
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has llama-cpp-python"
    )
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    settings = {name: getattr(asked, name) for name in ("steps", "rounds", "scale")} | subject.settings
    rows: list[dict[str, Any]] = []
    for one in comparisons(asked.scale, asked.dtype):
        if one.name in asked.comparisons:
            rows += measure(asked, subject.folder, subject.text, one)
            path = write_results("decode", {"settings": settings, "rows": rows}, folder=asked.out)
    columns = ("comparison", "length", "candidate", "tokens_per_second", "ratio")
    print_table("Decode", columns, [[row[name] for name in columns] for row in rows])
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
