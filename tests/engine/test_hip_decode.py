"""HiP at decode in an engine: covering everything is full, and no answer depends on batch mates or slots."""

from typing import Any

import pytest

from tests.engine.test_decode_methods import POLICIES
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

SMALL: dict[str, Any] = {
    "method": "hip",
    "widths": [32, 16, 8],
    "keep": [96, 64, 32],
    "refresh": [6, 3, 1],
    "sink": 16,
    "window": 20,
    "dense_layers": 1,
}


@pytest.fixture(scope="module")
def network() -> object:
    return tiny_model()


def test_reading_as_much_as_is_held_answers_as_full(network: object) -> None:
    wide = plan("wide", decode={**SMALL, "keep": [1024, 512, 512]})
    tiny = tiny_engine(plan("full"), wide, plan("narrow", decode=SMALL), network=network)
    answers = {name: tiny.answer(make_prompt(400), greedy(12), name) for name in tiny.plans}
    assert answers["wide"] == answers["full"] != answers["narrow"]
    tiny.assert_empty()


def test_an_answer_says_what_share_of_what_was_held_it_read(network: object) -> None:
    decode = {**SMALL, "widths": [32, 16], "keep": [96, 64], "refresh": [1, 1]}
    tiny = tiny_engine(plan("hip", decode=decode), network=network)
    tiny.submit("mine", make_prompt(380), greedy(5), "hip")
    found = [output.decode_read_fraction for _ in range(6) for output in tiny.step()]
    # One layer of three is read whole. The others read 8 units, of which the newest holds 13 to 16 tokens.
    read = sum(held + 2 * (112 + (held - 1) % 16 + 1) for held in range(381, 385))
    assert found[-1] == pytest.approx(read / sum(3 * held for held in range(381, 385)))


@pytest.mark.parametrize("policy", ["snapkv", "streaming"])
def test_hip_goes_with_policies_that_move_tokens_or_drop_pages_alone_and_among_others(
    policy: str, network: object
) -> None:
    kv = {"policy": policy, **POLICIES[policy]}
    plans = [
        plan("hip", kv=kv, decode=SMALL),
        plan("deep", kv=kv, decode={**SMALL, "dense_layers": 0}),
        plan("full", kv=kv),
    ]
    alone = tiny_engine(*plans, network=network)
    expected = alone.answer(make_prompt(330), greedy(10), "hip")
    together = tiny_engine(*plans, network=network, max_num_batched_tokens=128)
    together.submit("full", make_prompt(100, seed=1), greedy(3), "full")
    together.submit("deep", make_prompt(200, seed=1), greedy(6), "deep")
    together.submit("mate", make_prompt(200, seed=1), greedy(12), "hip")
    together.submit("mine", make_prompt(330), greedy(10), "hip")
    assert together.run()["mine"] == expected
    together.assert_empty()


def test_choices_of_one_prompt_read_as_if_they_were_alone(network: object) -> None:
    tiny = tiny_engine(plan("hip", decode=SMALL), network=network)
    expected = tiny.answer(make_prompt(250), greedy(10))
    tiny.submit("several", make_prompt(250), greedy(10), choices=2)
    found = tiny.run()
    assert found["several"] == found["several/1"] == expected


def test_pages_of_codes_are_searched_as_they_are_read(network: object) -> None:
    plans = [
        plan("hip", decode={**SMALL, "keep": [1024, 512, 512]}),
        plan("full"),
        plan("narrow", decode=SMALL),
    ]
    tiny = tiny_engine(*plans, network=network, cache_dtype="int8")
    answers = {name: tiny.answer(make_prompt(330), greedy(10), name) for name in tiny.plans}
    assert answers["hip"] == answers["full"]
    tiny.submit("mine", make_prompt(330), greedy(10), "narrow")
    tiny.submit("mate", make_prompt(200, seed=1), greedy(10), "narrow")
    assert tiny.run()["mine"] == answers["narrow"]
