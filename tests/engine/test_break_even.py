"""`dense_below: auto`: where sparse begins to pay is found from timings, kept in a file, and lived by.

No test looks at a real clock: timings are given, or counted by what the kernel is asked to do.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.model import ModelInfo
from engine.attention_timing import AttentionTimer, Times, layers_to_time, planted
from engine.break_even import SHORTEST, facts_of, find, kept_or, measured
from engine.kernels import Kernels
from engine.plans import resolve_plan
from engine.rope import Rope
from kvcache.cache import KVCache
from sparse.attention import Attended, attend
from sparse.kernels.cudnn_dense import CudnnDense, cudnn_attention
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine

MODEL = ModelInfo("tiny", 8, 6, 2, 16, 256, 8192)
CHUNK, WINDOW = 2048, 64
SPARSE = {"method": "minference", "dense_below": "auto", "chunk": 128, "vertical": 40, "slash": 10}


def in_time() -> bool:
    return False


def linear(overhead: float, density: float) -> Callable[[int, int], Times]:
    """Attention that costs what it reads, and sparse attention that chooses for so much more per chunk."""

    def compare(start: int, length: int) -> Times:
        cells = length * start + length * length / 2
        return Times(cells, overhead + density * cells)

    return compare


def by_length(ratios: dict[int, float]) -> Callable[[int, int], Times]:
    """Prompts of one chunk whose ratios are known where they are asked for, and 1 elsewhere."""
    return lambda start, length: Times(1.0, ratios.get(start + length, 1.0))


def prompt_seconds(
    compare: Callable[[int, int], Times], length: int, chunk: int = CHUNK, window: int = WINDOW
) -> Times:
    """Chunk by chunk, nothing interpolated."""
    starts = range(0, max(1, length - window + 1), chunk)
    ends = [*starts[1:], length]
    times = [compare(start, end - start) for start, end in zip(starts, ends, strict=True)]
    return Times(sum(one.dense for one in times), sum(one.sparse for one in times))


def test_where_sparse_is_always_faster_the_shortest_length_that_was_tried_is_the_answer() -> None:
    assert find(linear(0, 0.5), CHUNK, WINDOW, 8192, in_time) == SHORTEST
    assert find(linear(0, 0.5), 128, WINDOW, 8192, in_time) == 128


def test_where_sparse_is_never_faster_there_is_no_answer() -> None:
    assert find(linear(1, 1.0), CHUNK, WINDOW, 8192, in_time) is None


@pytest.mark.parametrize("overhead", [3e5, 2e6, 6e6, 2e7])
def test_no_prompt_is_a_tenth_slower_than_it_would_be_the_other_way(overhead: float) -> None:
    """At every page, chunk by chunk: while a last chunk is short, the better way may change again."""
    compare = linear(overhead, 0.4)
    found = find(compare, CHUNK, WINDOW, 131072, in_time)
    assert found is not None and found % 64 == 0
    for length in range(SHORTEST, 65536, 64):
        times = prompt_seconds(compare, length)
        chosen, other = (times.sparse, times.dense) if length >= found else (times.dense, times.sparse)
        assert chosen < 1.1 * other, length


def test_a_win_before_a_loss_does_not_count() -> None:
    ratios = {512: 0.9, 1024: 1.2, 1536: 1.1, 1792: 1.05, 2048: 0.8, 4096: 0.7}
    found = find(by_length(ratios), 8192, WINDOW, 8192, in_time)
    assert found == 1856  # from 1792 on a line to 2048: a fifth of the way, rounded up


def test_a_last_length_that_loses_means_never() -> None:
    ratios = {512: 0.9, 1024: 1.2, 2048: 0.8, 4096: 1.1}
    assert find(by_length(ratios), 4096, WINDOW, 4096, in_time) is None


def test_no_more_is_timed_than_the_ends_of_lengths_that_double() -> None:
    asked: list[tuple[int, int]] = []

    def compare(start: int, length: int) -> Times:
        asked.append((start, length))
        return Times(1.0, 2.0)

    assert find(compare, CHUNK, WINDOW, 20000, in_time) is None
    whole = [(0, 2048), (2048, 2048), (6144, 2048), (14336, 2048), (16384, 2048)]
    assert asked == [(0, 512), (0, 1024), *whole]


def test_chunks_are_known_to_the_end_where_the_last_one_is_always_longer() -> None:
    """A policy's window of 200 tokens leaves no last chunk of 64."""
    compare = linear(3e4, 0.4)
    found = find(compare, 64, 200, 8192, in_time)
    assert found is not None and 1024 < found < 2048
    for length in range(512, 8192, 64):
        times = prompt_seconds(compare, length, 64, 200)
        chosen, other = (times.sparse, times.dense) if length >= found else (times.dense, times.sparse)
        assert chosen < 1.1 * other, length


def test_what_takes_too_long_ends_with_what_is_known() -> None:
    looks = iter([False, False, True, True, True])
    assert find(linear(1e9, 0.1), CHUNK, WINDOW, 1 << 20, lambda: next(looks)) is None


@pytest.fixture
def asked(tmp_path: Path) -> Iterator["Asked"]:
    yield Asked(tmp_path / "break_even")


class Asked:
    """A folder, and how often something was measured for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times = folder, 0

    def __call__(self, answer: int | None, facts: dict[str, Any], longest: int = 8192) -> int | None:
        def measure() -> int | None:
            self.times += 1
            return answer

        return kept_or(measure, facts, longest, self.folder)


def test_what_was_measured_is_not_measured_again(asked: Asked) -> None:
    assert [asked(3008, {"device": "a"}), asked(64, {"device": "a"})] == [3008, 3008]
    assert asked.times == 1
    assert [file.suffix for file in asked.folder.iterdir()] == [".json"]  # and no remains of writing


def test_other_facts_are_measured_anew_and_both_are_kept(asked: Asked) -> None:
    for _ in range(2):
        assert [asked(3008, {"device": "a"}), asked(512, {"device": "b"})] == [3008, 512]
    assert asked.times == 2


def test_never_holds_only_up_to_the_length_that_was_asked_about(asked: Asked) -> None:
    assert asked(None, {}, longest=8192) is None
    assert asked(64, {}, longest=4096) is None
    assert asked(12032, {}, longest=32768) == 12032
    assert asked(64, {}, longest=65536) == 12032
    assert asked.times == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2",
        b"[]",
        b'{"dense_below": "many", "longest": 1, "facts": {}}',
        b'{"dense_below": 64, "longest": 8192, "facts": {"device": "another"}}',
    ],
)
def test_a_file_that_says_nothing_is_written_again(asked: Asked, content: bytes) -> None:
    asked(3008, {})
    (file,) = asked.folder.iterdir()
    file.write_bytes(content)
    assert asked(1024, {}) == 1024
    assert json.loads(file.read_text())["dense_below"] == 1024


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert kept_or(lambda: 640, {}, 8192, tmp_path / "file" / "below") == 640
    assert "measured again at the next start" in caplog.text


def facts(
    model: ModelInfo = MODEL,
    kernels: Kernels | None = None,
    policy: str = "keep_all",
    dtype: torch.dtype = torch.float32,
    pages: torch.dtype = torch.float32,
    **prefill: Any,
) -> str:
    resolved = resolve_plan(plan("p", prefill={**SPARSE, **prefill}, kv={"policy": policy}), model)
    return json.dumps(facts_of(resolved, model, kernels or Kernels(), torch.empty(1, dtype=pages), dtype))


def test_what_changes_speed_is_measured_again_and_what_does_not_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(*arguments: Any, **options: Any) -> Attended:
        return attend(*arguments, **options)

    changed = [
        facts(),
        facts(vertical=41),
        facts(dtype=torch.bfloat16),
        facts(pages=torch.int8),
        facts(chunk=256),
        facts(layers={"0": "dense"}),
        facts(replace(MODEL, num_query_heads=8)),
        facts(replace(MODEL, windows=(None,) * 7 + (64,))),
        facts(kernels=Kernels().with_kernel("attend", other)),
        facts(kernels=Kernels().with_kernel("attend", CudnnDense(cudnn_attention, attend))),
        facts(kernels=Kernels().with_kernel("index.line_lists", other)),
        facts(kernels=Kernels().with_kernel("moves.store", other)),
        facts(policy="streaming"),
    ]
    assert facts() == facts(replace(MODEL, name="renamed", max_length=4096)) == facts(policy="snapkv")
    assert facts() == facts(dense_below=128)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    changed.append(facts())
    assert len(set(changed)) == len(changed)


class Clock:
    """Seconds that pass only while a kernel attends: 1 over all of the past, 0.25 over a part."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def attend(self, *arguments: Any, **options: Any) -> Attended:
        self.now += 1.0 if arguments[3].is_dense else 0.25
        return attend(*arguments, **options)


def tiny_timer(tiny: TinyEngine, clock: Clock, name: str) -> AttentionTimer:
    kernels = replace(Kernels(), attend=clock.attend)
    model = ModelInfo("tiny", 3, 6, 2, 16, 256, 2048)
    return AttentionTimer(tiny.plans[name], model, tiny.cache, kernels, Rope.of(tiny.network), clock)


@pytest.mark.parametrize("policy", ["keep_all", "snapkv", "streaming"])
def test_layers_are_timed_as_they_are_served_and_the_cache_stays_empty(policy: str) -> None:
    tiny = tiny_engine(plan("mixed", prefill={**SPARSE, "layers": {"0": "dense"}}, kv={"policy": policy}))
    timer = tiny_timer(tiny, Clock(), "mixed")
    assert timer.compare(256, 192) == Times(dense=2.0, sparse=0.5)  # of two layers: the third is dense anyway
    tiny.assert_empty()


def test_no_further_round_begins_where_one_took_long() -> None:
    tiny = tiny_engine(plan("late", prefill=SPARSE))
    clock = Clock()
    tiny_timer(tiny, clock, "late").compare(256, 192)
    assert clock.now == 3 * 1.25  # one round of three layers, dense and sparse: more than two seconds
    tiny = tiny_engine(plan("one", prefill={**SPARSE, "layers": {"1-2": "dense"}}))
    clock = Clock()
    tiny_timer(tiny, clock, "one").compare(256, 192)
    assert clock.now == 2 * 1.25


def test_the_layers_that_are_timed_take_all_turns_of_recall_and_spread() -> None:
    model = replace(MODEL, num_layers=30)
    assert layers_to_time(resolve_plan(plan("all", prefill=SPARSE), model)) == [4, 13, 18, 27]
    few = {**SPARSE, "layers": {"0-20": "dense", "22-29": "dense"}}
    assert layers_to_time(resolve_plan(plan("one", prefill=few), model)) == [21]


def test_planted_inputs_look_at_sinks_nearby_and_at_a_few_columns() -> None:
    inputs = planted(replace(MODEL, head_dim=64), 2048, 64, torch.float32, torch.device("cpu"))
    keys = inputs.k.repeat_interleave(3, dim=0)
    scores = inputs.q @ keys.mT / 8
    hidden = torch.arange(2048) > torch.arange(2048 - 64, 2048)[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).mean((0, 1))
    assert (inputs.k != 0).all() and (inputs.v != 0).all()
    assert weights[:4].sum() > 0.2
    assert weights[-128:].sum() > 0.1
    best = weights.sort(descending=True).values
    assert 0.6 < best[:200].sum() < 0.98


def fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, crossing: int) -> list[tuple[int, int]]:
    """Timings that are given: below this many tokens sparse is slower. Returns what was asked."""
    asked: list[tuple[int, int]] = []

    def compare(self: AttentionTimer, start: int, length: int, *, rounds: int = 3) -> Times:
        asked.append((start, length))
        return Times(1.0, 2.0 if start + length < crossing else 0.1)

    monkeypatch.setattr(AttentionTimer, "compare", compare)
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path))
    return asked


def measure(tiny: TinyEngine, cache: KVCache) -> None:
    model = ModelInfo("tiny", 3, 6, 2, 16, 256, 2048)
    tiny.plans.update(measured(tiny.plans, model, cache, Kernels(), Rope.of(tiny.network)))


def test_prompts_below_the_break_even_read_everything_and_those_above_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = fixed(monkeypatch, tmp_path, crossing=300)
    tiny = tiny_engine(plan("late", prefill=SPARSE), plan("dense"))
    measure(tiny, tiny.cache)
    assert asked
    found = tiny.plans["late"].dense_below
    assert found is not None and 128 < found < 1024
    assert tiny.plans["late"].card.dense_below == found and tiny.plans["dense"].dense_below == 0
    given = tiny_engine(plan("late", prefill={**SPARSE, "dense_below": found}), network=tiny.network)
    for length in (found - 1, found):
        (tokens, read), as_given = (answer(one, length) for one in (tiny, given))
        assert (tokens, read) == as_given  # and what was written to measure is seen by nobody
        assert (read == 1.0) is (length < found)


def answer(tiny: TinyEngine, length: int) -> tuple[list[int], float]:
    """Tokens, and the part that the prompt's queries read."""
    tiny.submit("prompt", make_prompt(length), greedy(4))
    outputs = []
    while tiny.engine.has_work:
        outputs += tiny.step()
    (cost,) = [output.cost for output in outputs if output.cost is not None]
    return [token for output in outputs for token in output.tokens], cost.prefill_read_fraction


def test_a_plan_that_never_pays_runs_dense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fixed(monkeypatch, tmp_path, crossing=1 << 30)
    tiny = tiny_engine(plan("never", prefill=SPARSE))
    measure(tiny, tiny.cache)
    assert tiny.plans["never"].is_dense(2047)
    assert "plan never runs dense: up to 2048 tokens" in caplog.text


def test_numbers_that_are_given_are_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = fixed(monkeypatch, tmp_path, crossing=300)
    tiny = tiny_engine(plan("late", prefill={**SPARSE, "dense_below": 100}), plan("dense"))
    before = dict(tiny.plans)
    measure(tiny, tiny.cache)
    assert tiny.plans == before and not asked
