"""Recorded decode steps answer as plain calls do. No GPU: a stand-in runs the recorded function again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.graph_recording import batches, bounds, recorded, sizes
from engine.graphs import DecodeGraphs, DecodeStep, Graph, StepTokens
from engine.messages import Sampling
from kvcache.decode import Full
from kvcache.quest import Quest
from tests.tiny import GRAPH_BATCH, TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

QUEST = {"method": "quest", "read": 128, "sink": 16, "window": 20, "dense_layers": 1}
HIP = {
    "method": "hip",
    "widths": [64, 16],
    "keep": [128, 32],
    "refresh": [4, 2],
    "sink": 16,
    "window": 20,
    "dense_layers": 1,
}


class Again:
    """A recorder whose graphs run the step again, and leave what it gives where the first run left it."""

    def __init__(self, *, needs: int = 1) -> None:
        self.used = 0
        self.needs = needs  # bytes a row
        self.steps: list[DecodeStep] = []
        self.replays = 0

    def warm_up(self, step: DecodeStep) -> int:
        step.run()
        return self.needs * step.batch

    def record(self, step: DecodeStep) -> Graph:
        self.steps.append(step)
        self.used = max(self.used, self.needs * step.batch)
        outputs = step.run()

        def replay() -> None:
            self.replays += 1
            found = step.run()
            outputs.logits.copy_(found.logits)
            if outputs.read is not None and found.read is not None:
                outputs.read.copy_(found.read)

        return Graph(step, outputs, replay)


class Broken(Again):
    """One whose graphs are wrong in some way."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def record(self, step: DecodeStep) -> Graph:
        if self.fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        graph = super().record(step)
        if self.fault == "keeps old inputs":
            nothing = np.empty(0, dtype=np.int64)

            def stale() -> None:
                step.fill(StepTokens(nothing, nothing, nothing))
                graph.replay()

            return replace(graph, replay=stale)
        if self.fault == "not a number":

            def spoilt() -> None:
                graph.replay()
                graph.outputs.logits.fill_(torch.nan)

            return replace(graph, replay=spoilt)
        return replace(graph, replay=lambda: None)  # outputs of another run


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_model()


def submit_all(tiny: TinyEngine, plans: list[str], count: int) -> None:
    for index in range(count):
        name = plans[index % len(plans)]
        sampling = greedy(6 + index) if index % 2 else Sampling(9 + index, temperature=0.8, seed=index)
        tiny.submit(f"{name}{index}", make_prompt(70 + 45 * index, seed=index), sampling, name)


@pytest.mark.parametrize("count", [1, 3, GRAPH_BATCH, GRAPH_BATCH + 2])
def test_answers_are_those_of_plain_calls(count: int, network: Any) -> None:
    """Several sampled and greedy requests of unequal length; above the largest graph they run plainly."""
    plain, recorder = tiny_engine(network=network), Again()
    graphs = tiny_engine(network=network, recorder=recorder)
    tried = recorder.replays
    for tiny in (plain, graphs):
        submit_all(tiny, ["dense"], count)
    assert graphs.run() == plain.run()
    assert recorder.replays - tried >= 5
    graphs.assert_empty()


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_methods_that_choose_read_the_same(cache_dtype: str, network: Any) -> None:
    """Groups of several methods in one step, choices that are used again, and the share they report."""
    plans = [
        plan("full"),
        plan("quest", decode=QUEST),
        plan("reused", decode={**QUEST, "reuse": 4}),
        plan("hip", decode=HIP),
    ]
    found = []
    for recorder in (None, Again()):
        tiny = tiny_engine(*plans, network=network, recorder=recorder, cache_dtype=cache_dtype)
        submit_all(tiny, [one.name for one in plans], 5)
        outputs = []
        while tiny.engine.has_work:
            outputs += [(one.request_id, one.tokens, one.decode_read_fraction) for one in tiny.step()]
        found.append(sorted(outputs, key=str))
        tiny.assert_empty()
    plainly, replayed = found
    assert replayed == plainly
    assert recorder is not None and recorder.replays > 3 * len(recorder.steps)


@pytest.mark.parametrize(
    "kv", [{"policy": "snapkv", "budget": 100}, {"policy": "streaming", "window": 192}, {"policy": "s2"}]
)
def test_forks_and_forgetting_change_nothing(kv: dict[str, Any], network: Any) -> None:
    found = []
    for recorder in (None, Again()):
        tiny = tiny_engine(plan("forgets", kv=kv), network=network, recorder=recorder)
        tiny.submit("several", make_prompt(300), Sampling(24, temperature=0.7, seed=3), choices=3)
        tiny.submit("one", make_prompt(120, seed=1), greedy(12))
        found.append(tiny.run())
        tiny.assert_empty()
    assert found[1] == found[0]


def test_a_window_and_a_softcap_are_kept(network: Any) -> None:
    gemma = tiny_model("gemma2")
    found = []
    for recorder in (None, Again()):
        tiny = tiny_engine(network=gemma, recorder=recorder)
        submit_all(tiny, ["dense"], 3)
        found.append(tiny.run())
    assert found[1] == found[0]


def test_padding_writes_to_the_scratch_page_and_changes_no_state(network: Any) -> None:
    """Two rows in a step of six: beside their own new tokens only the scratch page and slot differ."""
    recorder = Again()
    reused = plan("reused", decode={**QUEST, "reuse": 4})
    tiny = tiny_engine(reused, network=network, recorder=recorder, max_num_seqs=2)
    for index in range(2):
        tiny.submit(str(index), make_prompt(300, seed=index), greedy(20))
    while sum(one.num_generated >= 3 for one in tiny.engine._scheduler.running) < 2:
        tiny.step()
    cache, slots = tiny.cache, np.array([one.slot for one in tiny.engine._scheduler.running])
    cache.reserve_next(slots)
    cache.sync()
    step = max(recorder.steps, key=lambda one: one.batch)
    assert step.batch == 6
    states = [*cache.states._slots.values()]
    for state in states:
        state.zero_()  # so that every row chooses now
    carried = [tensor.clone() for tensor in cache.pool.carried]
    before = [state.clone() for state in states]
    positions = cache.computed[slots]
    with torch.inference_mode():
        step.fill(StepTokens(positions % 7, positions, slots))
        step.run()
    own = (cache.decode_destinations(slots) // 64).flatten().tolist()
    for tensor, was in zip(cache.pool.carried, carried, strict=True):
        changed = (tensor != was).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= {*own, cache.pool.scratch_page}
    assert cache.pool.scratch_page == len(cache.pool.references) == len(cache.pool.k) - 1
    assert any(not torch.equal(state, was) for state, was in zip(states, before, strict=True))
    with torch.inference_mode():
        for state, was in zip(states, before, strict=True):
            state.copy_(was)
        step.fill(StepTokens(*np.empty((3, 0), dtype=np.int64)))
        step.run()
    assert all(torch.equal(state[slots], was[slots]) for state, was in zip(states, before, strict=True))
    tiny.run()
    tiny.assert_empty()


@pytest.mark.parametrize("fault", ["raises", "keeps old inputs", "not a number", "does nothing"])
def test_a_graph_that_is_wrong_does_not_serve(
    fault: str, network: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tiny_engine(network=network, recorder=Broken(fault))
    assert len(tiny.engine._runner._graphs) == 0
    words = "cannot be recorded, nor what follows: RuntimeError: operation not permitted when stream is cap"
    assert (words if fault == "raises" else "it differs from plain calls") in caplog.text
    tiny.cache.check()
    assert tiny.answer(make_prompt(100)) == tiny_engine(network=network).answer(make_prompt(100))
    tiny.assert_empty()


def test_graphs_stay_within_their_memory(network: Any, caplog: pytest.LogCaptureFixture) -> None:
    """100 bytes a row: of steps of 6, 4, 2 and 1 the first two do not fit 300 bytes."""
    tiny = tiny_engine(network=network)
    recorder = Again(needs=100)

    def make(method: Any, batch: int, bound: int) -> DecodeStep:
        runner = tiny.engine._runner
        return DecodeStep(tiny.network, tiny.cache, runner._kernels, runner._rope, method, batch, bound)

    with caplog.at_level("INFO"):
        graphs = recorded(make, [Full()], tiny.cache, recorder, largest=6, memory=300)
    assert [step.batch for step in recorder.steps] == [2, 1] and len(graphs) == 2
    assert recorder.used == 200  # the second is at home in the memory of the first
    assert "2 decode steps of up to 6 sequences" in caplog.text and "; 2 did not fit" in caplog.text
    tiny.assert_empty()


def test_the_smallest_that_fits_is_taken(network: Any) -> None:
    recorder = Again()
    quest = Quest(read=128)
    tiny = tiny_engine(network=network, max_length=20_000, num_pages=4000)
    runner = tiny.engine._runner

    def make(method: Any, batch: int, bound: int) -> DecodeStep:
        return DecodeStep(tiny.network, tiny.cache, runner._kernels, runner._rope, method, batch, bound)

    graphs = DecodeGraphs(
        [Graph(make(*size), None, lambda: None) for size in sizes([quest, Full(), Full()], 20_000, 6)]  # type: ignore
    )
    assert len(graphs) == 4 + 3 * 4 and recorder.used == 0

    def found(method: Any, count: int, longest: int) -> tuple[int, int] | None:
        graph = graphs.find(method, count, longest)
        return None if graph is None else (graph.step.batch, graph.step.bound)

    assert found(Full(), 3, 100) == (4, 20_000)
    assert found(quest, 5, 4096) == (6, 4096)
    assert found(quest, 5, 4097) == (6, 16_384)
    assert found(quest, 1, 20_000) == (1, 20_000)
    assert found(quest, 7, 10) is found(Quest(read=256), 1, 10) is found(Full(), 1, 20_001) is None


def test_sizes_are_powers_of_two_and_the_largest() -> None:
    assert batches(64) == [64, 32, 16, 8, 4, 2, 1]
    assert batches(48) == [48, 32, 16, 8, 4, 2, 1]
    assert batches(1) == [1]
    assert bounds(Full(), 131_072) == [131_072]
    assert bounds(Quest(), 131_072) == [4096, 16_384, 65_536, 131_072]
    assert bounds(Quest(), 2048) == [2048]
