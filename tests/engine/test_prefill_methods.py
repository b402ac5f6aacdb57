"""Every prefill method behind the engine: it reads less and says so, and answers do not depend on load."""

from typing import Any

import pytest
import torch

from sparse.methods import PREFILL_METHODS
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_gates, tiny_model

METHODS: dict[str, dict[str, Any]] = {  # settings for prompts of some hundred tokens
    "minference": {"vertical": 40, "slash": 100, "chunk": 128},
    "mean_pool": {"threshold": 0.5},
    "xattention": {"threshold": 0.5},
    "flashprefill": {"alpha": 1.0, "relative_to": "all", "window": 64, "last_rows_dense": 64},
    "flexprefill": {"threshold": 0.3, "min_budget": 64, "chunk": 256},
    "seerattention": {"threshold": 0.1, "last_rows_dense": 64},
    "hip": {"widths": [16, 8], "keep": [64, 64], "strides": [4, 4], "window": 64},
}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture(scope="module", autouse=True)
def gates(tmp_path_factory: pytest.TempPathFactory) -> None:
    METHODS["seerattention"]["gates"] = str(tiny_gates(tmp_path_factory.mktemp("gates")))


def serve(network: torch.nn.Module, **options: Any) -> TinyEngine:
    plans = [plan(name, prefill={"method": name, **chosen}) for name, chosen in METHODS.items()]
    return tiny_engine(plan("dense"), *plans, network=network, **options)


def test_none_is_forgotten() -> None:
    assert {"dense", *METHODS} == set(PREFILL_METHODS)


def test_one_engine_serves_a_question_under_each_and_tells_what_each_read(network: torch.nn.Module) -> None:
    tiny = serve(network)
    for name in tiny.plans:
        tiny.submit(name, make_prompt(700), greedy(2), name)
    costs: dict[str, Any] = {}
    while tiny.engine.has_work:
        costs |= {output.request_id: output.cost for output in tiny.step() if output.cost is not None}
    assert costs["dense"].prefill_read_fraction == 1.0
    for name in METHODS:
        assert 0.1 < costs[name].prefill_read_fraction < 0.75, name
        assert 0 < costs[name].attention_recall_p5 < costs[name].attention_recall < 1.0, name
    tiny.assert_empty()


@pytest.mark.parametrize("name", METHODS)
def test_an_answer_does_not_depend_on_the_room_in_a_step_or_on_a_prefix_that_is_known(
    network: torch.nn.Module, name: str
) -> None:
    prompt = make_prompt(700)
    expected = serve(network).answer(prompt, greedy(10), name)
    assert serve(network, max_num_batched_tokens=64).answer(prompt, greedy(10), name) == expected
    sharing = serve(network, share_prefixes=True)
    sharing.answer(prompt[:600], greedy(2), name)
    assert sharing.answer(prompt, greedy(10), name) == expected
    sharing.assert_empty()
