"""What prefill methods cost in the last chunk of a long prompt, to choose and to read, and what they miss.

    python -m benchmarks.method_speed --text emma.txt --lengths 8192 32768
    python -m benchmarks.method_speed --method xattention hip:prefill.window=1024 --device cuda

Real text runs through the model. In a few layers, spread over its depth, every method chooses for the queries
of the last chunk, and the attention that serves reads what it chose; our dense attention and torch's take
turns with them. Prompts beyond the model's context stretch its RoPE (yarn). On a CPU, prompts beyond EXACT
tokens reach the timed layers through a window in the layers before; what is timed sees all keys.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.asking import add_device, add_dtype, add_model, command_line, parsed
from benchmarks.common import exit_with, interleaved_medians, print_table, results_folder, write_results
from benchmarks.prompts import SHIPPED_TEXT, Text, load_text, load_tokenizer, model_folder
from benchmarks.scoring import Scorer
from benchmarks.variants import load_method, method_plans
from configs.errors import ConfigError
from configs.features import NO_FEATURES
from configs.model import ModelInfo
from configs.plan import PlanFile
from configs.schema import EngineConfig
from engine.attention_timing import layers_to_time
from engine.models import model_info
from engine.plans import ResolvedPlan, resolve_plan
from sparse.attention import Attend
from sparse.base import Chunk, KeyView, PrefillMethod, StateRegistry
from sparse.delta import with_delta
from sparse.recall import causal_cells, read_cells_by_head, recall
from sparse.selection import Selection, dense

EXACT = 8192  # tokens: up to here a CPU computes hidden states by dense attention
# Beyond: the first tokens and the nearest, in minutes, where dense attention takes an hour.
WINDOW = {"method": "minference", "pattern": "a_shape", "init": 128, "local": 4096}
DENSE, TORCH = "dense", "torch SDPA"
READER = "reader"  # the plan that the prompt is read by


@dataclass
class Layer:
    """What one method, or dense attention, took and left in one layer."""

    attend: float  # seconds
    select: float = 0.0
    density: float = 1.0  # cells computed over causal cells
    recalls: list[float] = field(default_factory=lambda: [1.0])  # of the sampled rows


@dataclass(frozen=True)
class Row:
    """One candidate at one length: means over the timed layers, times by the clock on the wall."""

    length: int
    candidate: str
    density: float
    recall: float
    recall_p5: float  # of (layer, head, row)
    select_ms: float  # of one layer
    attend_ms: float
    select_share: float  # of both together
    over_dense: float  # time of our dense attention over both together
    over_torch: float


class Probe:
    """A prefill method that reads the prompt as another does, and times candidates in its last chunk."""

    grid = True  # chunks are as long as plans say, whatever time they take
    last_rows = 0

    def __init__(
        self,
        readers: tuple[PrefillMethod, ...],  # by layer of the model
        candidates: dict[str, ResolvedPlan],
        layers: Sequence[int],
        attend: Attend,
        rounds: int,
    ) -> None:
        self.readers, self.candidates, self.layers = readers, candidates, layers
        self._attend, self._rounds = attend, rounds
        self.found: dict[str, list[Layer]] = {name: [] for name in (TORCH, DENSE, *candidates)}

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        if chunk.is_last and layer in self.layers:
            for name, one in self.compare(layer, q, keys, chunk, scale).items():
                self.found[name].append(one)
        return self.readers[layer].select(layer, q, keys, chunk, scale=scale)

    def compare(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, scale: float) -> dict[str, Layer]:
        """Every candidate in one layer, interleaved. q [Hq, Tq, D] after RoPE."""

        def attend(selection: Selection, delta: int | None = None) -> Tensor:
            rows = self._attend(q, keys, chunk, selection, scale=scale).out
            if delta is None:
                return rows
            return with_delta(rows, q, keys, chunk, selection, delta, scale=scale, features=NO_FEATURES)

        everything, torchs = dense(q.device), torch_attention(q, keys, chunk, scale)
        error = float((attend(everything) - torchs()).float().norm() / torchs().float().norm())
        assert error < (1e-4 if q.dtype == torch.float32 else 2e-2), f"dense differs from SDPA by {error}"
        selects = {
            name: partial(plan.methods[layer].select, layer, q, keys, chunk, scale=scale)
            for name, plan in self.candidates.items()
        }
        selections = {name: select() for name, select in selects.items()}
        deltas = {name: self.candidates[name].delta for name, of in selections.items() if not of.is_dense}
        cases: dict[str, Callable[[], object]] = {TORCH: torchs, DENSE: partial(attend, everything)}
        cases |= {f"{name} selects": select for name, select in selects.items()}
        cases |= {name: partial(attend, of, deltas.get(name)) for name, of in selections.items()}
        timings = interleaved_medians(
            {name: _waited(run, q.device) for name, run in cases.items()}, self._rounds
        )
        found = {name: Layer(timings[name].wall) for name in (TORCH, DENSE)}
        cells = causal_cells(chunk, q.shape[0])
        for name, selection in selections.items():
            found[name] = Layer(
                timings[name].wall,
                timings[f"{name} selects"].wall,
                float(read_cells_by_head(selection, chunk, q.shape[0], delta=deltas.get(name)).sum()) / cells,
                recall(q, keys, chunk, selection, scale=scale).flatten().tolist(),
            )
        return found


def _waited(run: Callable[[], object], device: torch.device) -> Callable[[int], None]:
    """The same, until the device has done it."""

    def timed(_: int) -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return timed


def torch_attention(q: Tensor, keys: KeyView, chunk: Chunk, scale: float) -> Callable[[], Tensor]:
    """SDPA over the same keys in one piece, repeated for every query head: what it likes best, not timed.

    A CPU has no form for a chunk behind others, so there it gets a mask and computes what that hides, too.
    """
    num_tokens = chunk.start + chunk.length
    k, v = (
        x[:, :num_tokens].to(q.dtype).repeat_interleave(q.shape[0] // x.shape[0], 0)[None]
        for x in keys.contiguous()
    )
    mask: Any = causal_lower_right(chunk.length, num_tokens)
    if q.device.type == "cpu":
        hidden = torch.ones(chunk.length, num_tokens, dtype=torch.bool).triu(chunk.start + 1)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    queries = q[None].contiguous()
    return lambda: F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)[0]


def rows_of(length: int, found: dict[str, list[Layer]]) -> Iterator[Row]:
    """Means over layers, first torch and dense attention."""

    def together(name: str) -> float:
        return sum(one.select + one.attend for one in found[name])

    for name, layers in found.items():
        recalls = sorted(share for one in layers for share in one.recalls)
        select = sum(one.select for one in layers)
        yield Row(
            length=length,
            candidate=name,
            density=round(statistics.fmean(one.density for one in layers), 4),
            recall=round(statistics.fmean(recalls), 4),
            recall_p5=round(recalls[len(recalls) // 20], 4),
            select_ms=round(1e3 * select / len(layers), 3),
            attend_ms=round(1e3 * (together(name) - select) / len(layers), 3),
            select_share=round(select / together(name), 4),
            over_dense=round(together(DENSE) / together(name), 4),
            over_torch=round(together(TORCH) / together(name), 4),
        )


def measure(
    asked: argparse.Namespace, folder: Path, text: Text, length: int
) -> tuple[list[Row], dict[str, Any]]:
    """One prompt through one model, and how it was read."""
    config = EngineConfig(model=asked.model)
    context = model_info(folder, config).max_length
    if length > context:
        config = config.model_copy(update={"rope_scaling": f"yarn:{-(-length // context)}"})
    info = model_info(folder, config)
    plans = [load_method(spec) for spec in asked.method] if asked.method else fitting(info)
    windowed = length > EXACT and asked.device == "cpu"
    prefill = {"chunk": asked.chunk, **(WINDOW if windowed else {})}
    reader = PlanFile.model_validate({"name": READER, "source": Path("reader.yaml"), "prefill": prefill})
    scorer = Scorer(
        folder, config, [reader, *plans], dtype=asked.dtype, device=asked.device, longest=length + 1
    )
    candidates = {plan.name: scorer.plans[plan.name] for plan in plans}
    layers = layers_to_time(scorer.plans[plans[0].name])
    reading = scorer.plans[READER]
    probe = Probe(reading.methods, candidates, layers, scorer.kernels.attend, asked.rounds)
    scorer.plans[READER] = replace(reading, methods=(probe,) * info.num_layers)
    scorer.score(READER, text.ring(0, length), length, [length - 1])
    how = {
        "length": length,
        "rope_scaling": config.rope_scaling,
        "layers": layers,
        "hidden_states": "first {init} and nearest {local} tokens".format(**WINDOW) if windowed else "dense",
        "text_repeats": round(max(1.0, length / len(text.tokens)), 2),
    }
    return list(rows_of(length, probe.found)), how


def fitting(info: ModelInfo) -> list[PlanFile]:
    """The shipped plan of every method, those that do not fit this model left out in words."""
    plans = []
    for plan in map(load_method, method_plans()):
        try:
            resolve_plan(plan, info)
        except ConfigError as error:
            print(f"left out: {error}")
            continue
        plans.append(plan)
    return plans


def show(rows: Sequence[Row]) -> None:
    headings = (
        "tokens", "candidate", "density", "recall", "5th percentile", "choosing ms", "attention ms",
        "share of choosing", "x own dense", "x torch",
    )  # fmt: skip
    print_table(
        "The last chunk of a prompt, one layer", headings, [tuple(asdict(row).values()) for row in rows]
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add_model(parser)
    parser.add_argument(
        "--method", nargs="+", metavar="NAME", help="methods, or plans; default: every method as shipped"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="prompt tokens")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a chunk, whole pages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=SHIPPED_TEXT, help="begins anew where it is too short")
    add_dtype(parser, "float16")
    add_device(parser)
    parser.add_argument("--name", default="method_speed", help="of the JSON file")
    return parsed(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    device = torch.device(asked.device)
    folder = model_folder(asked.model)
    text = load_text(asked.text, load_tokenizer(folder))
    settings = {name: getattr(asked, name) for name in ("chunk", "rounds", "dtype", "threads")}
    settings |= {"model": folder.name, "text": text.name}
    rows: list[Row] = []
    prompts: list[dict[str, Any]] = []
    for length in asked.lengths:
        found, how = measure(asked, folder, text, length)
        rows += found
        prompts.append(how)
        results = {"settings": settings, "prompts": prompts, "rows": [asdict(row) for row in rows]}
        write_results(asked.name, results, device, asked.out or results_folder(device))
    show(rows)
    print(f"written: {asked.name}.json")


if __name__ == "__main__":
    exit_with(main)
