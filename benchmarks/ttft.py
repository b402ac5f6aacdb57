"""Time to first token: Farspan's engine, in this process or over HTTP, beside transformers and other engines.

    python -m benchmarks.ttft --lengths 2048 7936 --plans dense minference --repeats 5

The same tokens, dtype and threads for all. HuggingFace's `generate` is taken at its best of dynamic
and static cache. Other engines (benchmarks/peers.py) run in processes of their own, where they are
installed, and read the model's GGUF file.
"""

import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.asking import add_subject, command_line, parsed, subject_of
from benchmarks.common import CannotRun, Elapsed, exit_with, interleaved_medians, print_table, write_results
from benchmarks.peer_process import PeerProcess
from benchmarks.peers import PEERS, Setting
from benchmarks.prompts import Text, gguf_file
from benchmarks.serving import Server
from configs.loading import load_config
from engine.engine import Engine
from engine.messages import Cost, Sampling, Submit
from engine.startup import load, resolve

HF_CACHES = ("dynamic", "static")
STRIDE = 61  # tokens between the starts of two prompts


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length, one for each round, that all start differently."""

    text: Text
    length: int

    def at(self, index: int) -> tuple[int, ...]:
        return self.text.ring(index * STRIDE, self.length)


@dataclass(frozen=True)
class Answer:
    """What one candidate said to one prompt."""

    token: int
    cost: dict[str, Any] | None = None  # ours only
    elapsed: Elapsed | None = None  # where another process measured it


class HuggingFace:
    """The model with transformers' own attention and caches."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import transformers

        transformers.logging.disable_progress_bar()
        self.dtype = dtype
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def first_token(self, prompt: tuple[int, ...], cache: str) -> Answer:
        tokens = torch.tensor([prompt])
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=1,
            do_sample=False,
            cache_implementation=cache,
            pad_token_id=0,
        )
        return Answer(int(out[0, -1]))


class InProcess:
    """Our engine, without server: what it costs beside HuggingFace is what the plans cost."""

    def __init__(
        self, model: str, plans: Sequence[str], dtype: str, threads: int, *, weights_dtype: str = "auto"
    ) -> None:
        flags = {"engine.model": model, "engine.dtype": dtype, "engine.threads": threads, "plans": plans}
        flags |= {"engine.weights_dtype": weights_dtype}
        # Two sequences of cache are enough for one at a time, whatever its plan promises.
        # All candidates get the same prompts: no cached prefix may answer for the kernels.
        alone = {"scheduler.max_num_seqs": 2, "cache.enable_prefix_caching": False}
        config = load_config(None, {**flags, **alone, "engine.device": "cpu"})
        self.engine: Engine
        self.engine, card = load(resolve(config))
        self.dtype = card.dtype
        after = "" if weights_dtype == "auto" else f", {weights_dtype} weights"
        self.plans = {plan.name + after: plan.name for plan in card.plans}

    def first_token(self, prompt: tuple[int, ...], plan: str) -> Answer:
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        self.engine.submit(Submit("ttft", prompt, len(prompt), plan, sampling))
        while self.engine.has_work:
            for output in self.engine.step().outputs:
                assert output.error is None, output.error
                if output.tokens:
                    assert output.cost is not None
                    return Answer(output.tokens[0], _cost(output.cost))
        raise AssertionError("the engine ended without a token")


class OverHttp:
    """A running server: adds HTTP, text and the way between processes. Its CPU time is not ours to see."""

    def __init__(self, url: str, plans: Sequence[str]) -> None:
        self.server = Server.at(url)
        self.plans = {Path(plan).stem: Path(plan).stem for plan in plans}

    def first_token(self, prompt: tuple[int, ...], plan: str) -> Answer:
        # One token, not streamed: the reply leaves when the first token is there. The salt is new each time,
        # so that no cached prefix answers for the kernels.
        options = {"cache_salt": uuid.uuid4().hex, "return_token_ids": True}
        reply = self.server.complete(prompt, plan, max_tokens=1, **options)
        return Answer(reply["choices"][0]["token_ids"][0], reply["farspan"])


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "prefill_read_fraction": cost.prefill_read_fraction,
        "attention_recall": cost.attention_recall,
        "kv_tokens_kept": cost.kv_tokens_kept,
    }


@dataclass(frozen=True)
class Row:
    """One candidate at one length."""

    length: int
    candidate: str
    timing: dict[str, Any]
    ratio_to_hf: float  # its time over HuggingFace's best
    first_token_as_hf: float  # share of the prompts with the first token that HuggingFace found
    prefill_read_fraction: float | None = None
    attention_recall: float | None = None
    versions: dict[str, str] | None = None  # of another engine


def measure(
    ours: Sequence[InProcess | OverHttp],
    huggingface: HuggingFace,
    peers: Sequence[PeerProcess],
    prompts: Prompts,
    repeats: int,
) -> list[Row]:
    """All candidates at one length, interleaved."""
    answers: dict[str, list[Answer]] = {}

    def case(name: str, ask: Callable[[tuple[int, ...]], Answer]) -> Callable[[int], object]:
        answers[name] = []

        def run(index: int) -> Elapsed | None:
            answers[name].append(ask(prompts.at(index)))
            return answers[name][-1].elapsed

        return run

    candidates: dict[str, Callable[[tuple[int, ...]], Answer]] = {
        **{f"hf {cache}": partial(huggingface.first_token, cache=cache) for cache in HF_CACHES},
        **{peer.name: partial(_ask, peer) for peer in peers},
        **{name: partial(one.first_token, plan=plan) for one in ours for name, plan in one.plans.items()},
    }
    timings = interleaved_medians({name: case(name, ask) for name, ask in candidates.items()}, repeats)
    best = min(timings[f"hf {cache}"].wall for cache in HF_CACHES)
    expected = [answer.token for answer in answers[f"hf {HF_CACHES[0]}"]]
    versions = {peer.name: peer.versions for peer in peers}
    rows = []
    for name, timing in timings.items():
        cost = answers[name][-1].cost
        shown = timing.json()
        if cost is not None and isinstance(ours[0], OverHttp):
            shown["cpu_s_per_thread"] = None  # the work was another process's
        same = [answer.token == token for answer, token in zip(answers[name], expected, strict=True)]
        rows.append(
            Row(
                prompts.length,
                name,
                shown,
                round(timing.wall / best, 4),
                sum(same) / len(same),
                (cost or {}).get("prefill_read_fraction"),
                (cost or {}).get("attention_recall"),
                versions.get(name),
            )
        )
    return rows


def _ask(peer: PeerProcess, prompt: tuple[int, ...]) -> Answer:
    token, elapsed = peer.first_token(prompt)
    return Answer(token, elapsed=elapsed)


def start_peers(names: Sequence[str], setting: Setting, python: str, stack: ExitStack) -> list[PeerProcess]:
    """Those that can run here, until the stack ends; the others are left out, in words."""
    peers = []
    for name in names:
        try:
            peers.append(PeerProcess(name, setting, python))
        except CannotRun as error:
            print(f"left out: {error}")
            continue
        stack.callback(peers[-1].close)
    return peers


def show(rows: Sequence[Row]) -> None:
    headings = (
        "tokens", "candidate", "TTFT s", "CPU s/thread", "of best HF", "token as HF", "keys read", "recall",
    )  # fmt: skip
    print_table(
        "Time to first token (medians)",
        headings,
        [
            (
                row.length,
                row.candidate,
                row.timing["wall_s"],
                row.timing["cpu_s_per_thread"],
                row.ratio_to_hf,
                row.first_token_as_hf,
                row.prefill_read_fraction,
                row.attention_recall,
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 7936], help="prompt tokens")
    parser.add_argument("--plans", nargs="+", default=["dense", "minference", "minference-snapkv"])
    parser.add_argument(
        "--weights-dtype",
        default="auto",
        choices=["auto", "bfloat16", "int8"],
        help="of ours, in process, beside the model's own",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server", metavar="URL", help="time a running server instead of the engine")
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), choices=PEERS, metavar="NAME",
        help=f"other engines, where installed: {', '.join(PEERS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has their packages"
    )
    asked = parsed(parser, arguments)
    if asked.server and asked.weights_dtype != "auto":
        parser.error("--weights-dtype: a running server has its own, leave it out with --server")
    subject = subject_of(asked)
    huggingface = HuggingFace(subject.folder, asked.dtype)
    settings = {**subject.settings, "ours": "over HTTP" if asked.server else "in process"}
    name = "ttft"
    if asked.weights_dtype != "auto":
        settings["weights_dtype"] = asked.weights_dtype
        name += f"-{asked.weights_dtype}-weights"
    rows: list[Row] = []
    with ExitStack() as stack:
        peers: list[PeerProcess] = []
        file = gguf_file(asked.model)
        if file is None:
            print(f"left out: other engines, which read a GGUF file; {subject.folder.name} is none")
        else:
            setting = Setting(str(file), asked.dtype, asked.threads, max(asked.lengths))
            peers = start_peers(asked.peers, setting, asked.peer_python, stack)
        ours: list[InProcess | OverHttp]
        # After the peers: what memory is left decides how large its cache is.
        if asked.server:
            ours = [OverHttp(asked.server, asked.plans)]
        else:
            ours = [
                InProcess(asked.model, asked.plans, asked.dtype, asked.threads, weights_dtype=weights_dtype)
                for weights_dtype in dict.fromkeys(["auto", asked.weights_dtype])
            ]
        for length in asked.lengths:
            rows += measure(ours, huggingface, peers, Prompts(subject.text, length), asked.repeats)
            results = {"settings": settings, "rows": [asdict(row) for row in rows]}
            path = write_results(name, results, folder=asked.out)
    show(rows)
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
