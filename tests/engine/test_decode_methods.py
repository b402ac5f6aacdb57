"""Decode methods in an engine: covering everything is full, and a mixed batch answers as each one alone."""

from typing import Any

import pytest
import torch

from configs.quantised import dequantise
from engine.runner import by_method
from engine.sequence import Sequence
from kvcache.policies import KV_POLICIES
from kvcache.quest import BOUNDS, PER_PAGE, UNIT
from tests.kvcache.test_quest import assert_bounds_hold
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SMALL = {"method": "quest", "read": 128, "sink": 16, "window": 20, "dense_layers": 1}
POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"budget": 160} for name in ("snapkv", "ada-snapkv", "pyramidkv")},
    "streaming": {"window": 192},
    "moa": {"beta": 0.25},
    "s2": {"local_blocks": 1},
    "keep_all": {},
}


@pytest.fixture(scope="module")
def network() -> object:
    return tiny_model()


def test_reading_as_much_as_is_held_answers_as_full(network: object) -> None:
    for reuse in (1, 3):
        wide = plan("wide", decode={"method": "quest", "read": 2048, "reuse": reuse})
        narrow = plan("narrow", decode={**SMALL, "reuse": reuse})
        tiny = tiny_engine(plan("full"), wide, narrow, network=network)
        answers = {name: tiny.answer(make_prompt(400), greedy(12), name) for name in tiny.plans}
        assert answers["wide"] == answers["full"] != answers["narrow"]
        tiny.assert_empty()


def test_several_decode_methods_in_one_batch_answer_as_each_alone(network: object) -> None:
    plans = [
        plan("full"),
        plan("quest", decode=SMALL),
        plan("again", decode=SMALL),  # shares a group with quest
        plan("reused", decode={**SMALL, "reuse": 4}),
        plan("deep", decode={**SMALL, "dense_layers": 0, "read": 96}),
    ]
    prompts = {one.name: make_prompt(150 + 60 * i, seed=i) for i, one in enumerate(plans)}
    alone = tiny_engine(*plans, network=network)
    expected = {name: alone.answer(prompt, greedy(12), name) for name, prompt in prompts.items()}
    together = tiny_engine(*plans, network=network)
    for name, prompt in reversed(prompts.items()):
        together.submit(name, prompt, greedy(12), name)
    assert together.run() == expected
    together.assert_empty()


def test_an_answer_says_what_share_of_what_was_held_it_read(network: object) -> None:
    tiny = tiny_engine(plan("full"), plan("quest", decode=SMALL), network=network)
    for name in tiny.plans:
        tiny.submit(name, make_prompt(380), greedy(5), name)
    found: dict[str, list[float | None]] = {name: [] for name in tiny.plans}
    while tiny.engine.has_work:
        for output in tiny.step():
            found[output.request_id].append(output.decode_read_fraction)
    assert found["full"] == [None] * 5
    # One layer of three is read whole. The others read 8 units, of which the newest holds 13 to 16 tokens.
    read = sum(held + 2 * (112 + held % 16 if held % 16 else 128) for held in range(381, 385))
    assert found["quest"][0] is None  # the first token is the prompt's
    assert found["quest"][-1] == pytest.approx(read / sum(3 * held for held in range(381, 385)))


@pytest.mark.parametrize("policy", ["keep_all", "snapkv"])
def test_bounds_follow_all_that_an_engine_writes_whatever_the_plan(policy: str, network: object) -> None:
    plans = [plan("quest", decode=SMALL), plan("other", kv={"policy": policy, **POLICIES[policy]})]
    tiny = tiny_engine(*plans, network=network, max_num_batched_tokens=128)
    tiny.submit("mine", make_prompt(330), greedy(40), "other")
    tiny.submit("mate", make_prompt(200, seed=1), greedy(40), "quest")
    while all(one.num_generated < 30 for one in tiny.engine._scheduler.running):
        tiny.step()
    slots = [one.slot for one in tiny.engine._scheduler.running]
    assert len(slots) == 2
    for slot in slots:
        assert slot is not None
        assert_bounds_hold(tiny.cache, slot)


def test_layers_with_a_window_read_all_of_it() -> None:
    quest = plan("quest", decode={**SMALL, "dense_layers": 0})
    # windows of 50 in two layers of three
    tiny = tiny_engine(plan("full"), quest, network=tiny_model("gemma3_text"))
    tiny.submit("mine", make_prompt(304), greedy(2), "quest")
    *_, last = (output for _ in range(3) for output in tiny.step())
    assert last.decode_read_fraction == pytest.approx((2 * 50 + 113) / (2 * 50 + 305))
    assert len(tiny.answer(make_prompt(304), greedy(8), "quest")) == 8


def test_sequences_are_grouped_by_what_their_decode_method_does() -> None:
    tiny = tiny_engine(plan("a", decode=SMALL), plan("b"), plan("c", decode=SMALL))
    sequences: list[Sequence] = []
    for name in ("a", "b", "c", "b"):
        tiny.submit(name + str(len(sequences)), make_prompt(10), plan=name)
        sequences.append(tiny.engine._scheduler.waiting[-1])
    groups = by_method(sequences)
    assert [[one.plan.name for one in group] for group in groups] == [["a", "c"], ["b", "b"]]


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_quest_goes_with_every_policy_alone_and_among_others(policy: str, network: object) -> None:
    plans = [
        plan("quest", kv={"policy": policy, **POLICIES[policy]}, decode={**SMALL, "reuse": 3}),
        plan("full", kv={"policy": policy, **POLICIES[policy]}),
    ]
    prompt, other = make_prompt(330), make_prompt(200, seed=1)
    alone = tiny_engine(*plans, network=network)
    expected = alone.answer(prompt, greedy(10), "quest")
    together = tiny_engine(*plans, network=network, max_num_batched_tokens=128)
    together.submit("other", other, greedy(6), "full")
    together.submit("mate", other, greedy(14), "quest")
    together.submit("mine", prompt, greedy(10), "quest")
    assert together.run()["mine"] == expected
    together.assert_empty()


def test_pages_computed_under_another_plan_bring_their_bounds(network: object) -> None:
    plans = [plan("full"), plan("quest", decode=SMALL)]
    prompt = make_prompt(330)
    cold = tiny_engine(*plans, network=network)
    expected = cold.answer(prompt, greedy(10), "quest")
    warm = tiny_engine(*plans, network=network, share_prefixes=True)
    warm.answer(prompt, greedy(2), "full")
    assert warm.answer(prompt, greedy(10), "quest") == expected
    assert warm.engine.stats().prefix_hits > 0


@pytest.mark.parametrize("policy", ["keep_all", "snapkv"])
def test_quest_over_pages_of_codes_goes_by_the_keys_as_they_are_read(policy: str, network: object) -> None:
    plans = [plan("quest", kv={"policy": policy, **POLICIES[policy]}, decode=SMALL)]
    tiny = tiny_engine(*plans, network=network, cache_dtype="int8")
    prompt = make_prompt(330)
    expected = tiny.answer(prompt, greedy(10))
    tiny.submit("mine", prompt, greedy(10))
    tiny.submit("mate", make_prompt(200, seed=1), greedy(10))
    assert tiny.run()["mine"] == expected
    tiny.submit("mine", prompt, greedy(10))
    while not tiny.engine._scheduler.running or not tiny.engine._scheduler.running[0].num_generated:
        tiny.step()
    slot = tiny.engine._scheduler.running[0].slot
    assert slot is not None
    bounds, pool = tiny.cache.states.of_pages(BOUNDS), tiny.cache.pool
    assert pool.k_scales is not None
    page = int(tiny.cache.table.host[slot, 1, 0, 0])
    keys = dequantise(pool.k[page], pool.k_scales[page], torch.float32).view(PER_PAGE, UNIT, -1)
    assert torch.equal(bounds[page], torch.stack((keys.amin(1), keys.amax(1)), 1))


def test_choices_of_one_prompt_read_as_if_they_were_alone(network: object) -> None:
    quest = plan("quest", decode={**SMALL, "reuse": 3})
    tiny: TinyEngine = tiny_engine(quest, network=network)
    expected = tiny.answer(make_prompt(250), greedy(10))
    tiny.submit("several", make_prompt(250), greedy(10), choices=2)
    found = tiny.run()
    assert found["several"] == found["several/1"] == expected
