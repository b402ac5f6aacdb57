"""Delta correction in an engine: with every row dense it answers as dense, and however a prompt is cut."""

from typing import Any

import pytest

from configs.errors import ConfigError
from configs.plan import PlanFile
from engine.messages import Cost
from engine.plans import resolve_plan
from tests.sparse.builders import make_model
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SPARSE: dict[str, Any] = {"method": "mean_pool", "threshold": 0.2, "window": 64}


def sparse_plan(name: str, delta: int | None, **parts: Any) -> PlanFile:
    return plan(name, prefill={**SPARSE, "delta": delta}, **parts)


@pytest.fixture(scope="module")
def network() -> object:
    return tiny_model()


def cost_of(tiny: TinyEngine, name: str) -> Cost:
    tiny.submit("cost", make_prompt(500), greedy(1), name)
    (cost,) = [output.cost for output in tiny.step() if output.cost is not None]
    return cost


def test_with_every_row_dense_it_answers_as_dense_and_says_what_it_reads(network: object) -> None:
    plans = [plan("dense"), sparse_plan("none", None), sparse_plan("some", 16), sparse_plan("all", 1)]
    tiny = tiny_engine(*plans, network=network)
    answers = {name: tiny.answer(make_prompt(500), greedy(10), name) for name in tiny.plans}
    assert answers["all"] == answers["dense"] != answers["none"] != answers["some"]
    read = {name: cost_of(tiny, name).prefill_read_fraction for name in tiny.plans}
    assert read["all"] == read["dense"] == 1
    # One row of 16 reads all that it had not read.
    assert read["some"] - read["none"] == pytest.approx((1 - read["none"]) / 16, rel=0.2)
    tiny.assert_empty()


def test_an_answer_is_the_same_however_a_prompt_is_cut_and_shared(network: object) -> None:
    plans = [sparse_plan("delta", 64), sparse_plan("other", 16)]
    prompt = make_prompt(500)
    whole = tiny_engine(*plans, network=network)
    expected = {name: whole.answer(prompt, greedy(10), name) for name in whole.plans}
    pieces = tiny_engine(*plans, network=network, max_num_batched_tokens=128, share_prefixes=True)
    assert {name: pieces.answer(prompt, greedy(10), name) for name in pieces.plans} == expected
    assert pieces.engine.stats().prefix_hits == 0  # what one plan computed, the other does not borrow
    assert pieces.answer(prompt, greedy(10), "delta") == expected["delta"]
    assert pieces.engine.stats().prefix_hits > 0


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"prefill": {"delta": 16}}, "prefill.delta: every row of dense is read densely"),
        (
            {"prefill": {**SPARSE, "delta": 16}, "kv": {"policy": "streaming"}},
            "prefill.delta: streaming hides keys from every row",
        ),
    ],
)
def test_what_could_not_be_corrected_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_plan(plan("mine", **parts), make_model())


@pytest.mark.parametrize("delta", [0, 65, 24])
def test_groups_of_rows_must_divide_pages(delta: int) -> None:
    with pytest.raises(ValueError, match="delta"):
        sparse_plan("mine", delta)
