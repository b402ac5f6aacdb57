"""Prefix sharing in the engine: equal beginnings are computed once, and no answer changes by it."""

from itertools import product
from typing import Any

import pytest
import torch

from engine.messages import Cost, FinishReason
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SPARSE = {"method": "minference", "dense_below": 0, "chunk": 128, "vertical": 40, "slash": 10}
SNAP = {"policy": "snapkv", "budget": 100, "query_window": 16}
PLANS = {
    "dense": {},
    "snap": {"kv": SNAP},
    "ada": {"kv": {"policy": "ada-snapkv", "budget": 100, "query_window": 16}},
    "sparse": {"prefill": SPARSE},
    "both": {"prefill": SPARSE, "kv": SNAP},
    "floor": {"prefill": {**SPARSE, "recall_floor": 0.5}},
}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_model()


def sharing(network: torch.nn.Module, *names: str, **options: Any) -> TinyEngine:
    plans = [plan(name, **PLANS[name]) for name in names]
    return tiny_engine(*plans, network=network, **{"share_prefixes": True, **options})


def costs(tiny: TinyEngine) -> dict[str, Cost]:
    found: dict[str, Cost] = {}
    while tiny.engine.has_work:
        for output in tiny.step():
            assert output.error is None, output.error
            if output.cost is not None:
                found[output.request_id] = output.cost
    return found


def document(*, question: int, length: int = 450) -> list[int]:
    """The same beginning, and an ending of its own."""
    return [*make_prompt(length, seed=1), *make_prompt(70, seed=100 + question)]


@pytest.mark.parametrize("name", PLANS)
def test_an_answer_is_the_same_with_the_cache_warm_and_cold(network: torch.nn.Module, name: str) -> None:
    cold = sharing(network, name, share_prefixes=False)
    expected = [cold.answer(document(question=n), greedy(12), name) for n in range(3)]
    warm = sharing(network, name)
    assert [warm.answer(document(question=n), greedy(12), name) for n in range(3)] == expected
    warm.submit("again", document(question=0), greedy(12), name)
    # Whole grid chunks of 128 tokens, or whole pages up to 64 tokens before the end.
    on_grid = "prefill" in PLANS[name]
    (cost,) = costs(warm).values()
    if name != "floor":  # what a floor made dense is not shared
        assert cost.cached_tokens == (384 if on_grid else 448)
    warm.assert_empty()


@pytest.mark.parametrize("name", PLANS)
def test_an_answer_is_the_same_under_pressure_and_among_others(network: torch.nn.Module, name: str) -> None:
    cold = sharing(network, name, share_prefixes=False)
    prompts = {f"{n}": document(question=n, length=200 + 100 * (n % 3)) for n in range(6)}
    expected = {key: cold.answer(prompt, greedy(20), name) for key, prompt in prompts.items()}
    longest = cold.plans[name].pages_needed(470, 490)
    tight = sharing(network, name, num_pages=int(1.2 * longest) + 12, max_num_seqs=3)
    for _ in range(2):
        for key, prompt in prompts.items():
            tight.submit(key, prompt, greedy(20))
        assert tight.run() == expected
        tight.assert_empty()
    assert tight.engine.stats().prefix_hits > 0 or name == "floor"


def test_prompts_that_arrive_together_compute_their_common_beginning_once(network: torch.nn.Module) -> None:
    tiny = sharing(network, "dense", max_num_batched_tokens=4096)
    for n in range(5):
        tiny.submit(f"{n}", document(question=n), greedy(2))
    found = costs(tiny)
    assert [found[f"{n}"].cached_tokens for n in range(5)] == [0, 448, 448, 448, 448]
    assert tiny.engine.stats().prefix_hits == 4 * 448


def test_a_pool_of_two_prompts_serves_many_that_share_most_of_theirs(network: torch.nn.Module) -> None:
    rows = 3 * 2
    tiny = sharing(network, "dense", num_pages=rows * 2 * 9)
    tiny.answer(document(question=0), greedy(2))
    for n in range(1, 5):
        tiny.submit(f"{n}", document(question=n), greedy(40))
    tiny.step()
    assert tiny.engine.stats().running == 4
    tiny.run()
    tiny.assert_empty()


def test_plans_share_exactly_where_their_prefill_is_the_same(network: torch.nn.Module) -> None:
    for first, second in product(("dense", "snap", "sparse", "both"), repeat=2):
        tiny = sharing(network, "dense", "snap", "sparse", "both")
        tiny.answer(document(question=0), greedy(2), first)
        tiny.submit("second", document(question=1), greedy(2), second)
        (cost,) = costs(tiny).values()
        alike = ("prefill" in PLANS[first]) == ("prefill" in PLANS[second])
        assert (cost.cached_tokens > 0) is alike, (first, second)


def test_a_sparse_plan_that_runs_dense_shares_with_dense(network: torch.nn.Module) -> None:
    late = plan("late", prefill={**SPARSE, "dense_below": 1000})
    tiny = tiny_engine(plan("dense"), late, network=network, share_prefixes=True)
    tiny.answer(document(question=0), greedy(2), "dense")
    tiny.submit("late", document(question=1), greedy(2), "late")
    (cost,) = costs(tiny).values()
    assert cost.cached_tokens == 448


def test_salts_do_not_share(network: torch.nn.Module) -> None:
    tiny = sharing(network, "dense")
    for name, salt in (("a", "one"), ("b", "two"), ("c", "one")):
        tiny.submit(name, document(question=0), greedy(2), cache_salt=salt)
        (cost,) = costs(tiny).values()
        assert cost.cached_tokens == (448 if name == "c" else 0)


def test_the_next_turn_of_a_chat_starts_where_the_last_one_ended(network: torch.nn.Module) -> None:
    tiny = sharing(network, "dense", "snap", "sparse")
    prompt = make_prompt(150)
    for name, cached in (("dense", 256), ("snap", 128), ("sparse", 0)):
        answer = tiny.answer(prompt, greedy(120), name)
        conversation = [*prompt, *answer, *make_prompt(90, seed=5)]
        tiny.submit(name, conversation, greedy(8), name)
        (cost,) = costs(tiny).values()
        assert cost.cached_tokens == cached, name
        fresh = sharing(network, name, share_prefixes=False)
        assert tiny.answer(conversation, greedy(8), name) == fresh.answer(conversation, greedy(8), name)


def test_generated_tokens_of_a_lossy_plan_are_not_shared(network: torch.nn.Module) -> None:
    tiny = sharing(network, "snap")
    prompt = make_prompt(150)
    answer = tiny.answer(prompt, greedy(120))
    tiny.submit("next", [*prompt, *answer, *make_prompt(90, seed=5)], greedy(2))
    (cost,) = costs(tiny).values()
    assert cost.cached_tokens == 128  # of the prompt only


@pytest.mark.parametrize("name", PLANS)
def test_choices_of_one_prompt_share_it_and_answer_as_if_each_was_asked_alone(
    network: torch.nn.Module, name: str
) -> None:
    tiny = sharing(network, name)
    prompt = make_prompt(300)
    sampling = greedy(30, seed=7)
    tiny.submit("n", prompt, sampling, choices=3)
    found = tiny.run()
    assert found["n"] == found["n/1"] == found["n/2"] == tiny.answer(prompt, sampling)
    tiny.assert_empty()


def test_choices_differ_where_sampling_does_and_a_replay_repeats_them(network: torch.nn.Module) -> None:
    tiny = sharing(network, "dense")
    sampling = greedy(20, seed=7)
    sampling = type(sampling)(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True)
    tiny.submit("n", make_prompt(130), sampling, choices=4)
    found = tiny.run()
    assert len({tuple(tokens) for tokens in found.values()}) == 4
    tiny.submit("n", make_prompt(130), sampling, choices=4)
    assert tiny.run() == found
    assert tiny.answer(make_prompt(130), sampling) == found["n"]


@pytest.mark.parametrize("name", ["dense", "snap"])
def test_choices_hold_little_more_than_one(network: torch.nn.Module, name: str) -> None:
    held = []
    for choices in (1, 4):
        tiny = sharing(network, name, share_prefixes=False)
        tiny.submit("n", make_prompt(300), greedy(3), choices=choices)
        while not tiny.engine.stats().generation_tokens:
            tiny.step()
        held.append(tiny.engine.stats().kv_bytes // tiny.cache.pool.page_bytes)
        tiny.run()
        tiny.assert_empty()
    one, four = held
    assert four == one + 3 * 6  # a copy of every row's last page each


def test_a_request_whose_choices_do_not_fit_together_waits_or_is_refused(network: torch.nn.Module) -> None:
    tiny = sharing(network, "dense", num_pages=6 * (5 + 2 * 2), max_num_seqs=3)
    tiny.submit("three", make_prompt(300), greedy(20), choices=3)
    assert len(tiny.run()) == 3
    tiny.submit("one", make_prompt(100), greedy(20))
    tiny.submit("three", make_prompt(300), greedy(20), choices=3)
    assert len(tiny.run()) == 4
    tiny.submit("four", make_prompt(300), greedy(20), choices=4)
    ends = tiny.step()
    assert [end.choice for end in ends] == [0, 1, 2, 3]
    assert all(end.finish_reason is FinishReason.ERROR and "4 answers" in str(end.error) for end in ends)
    tiny.assert_empty()


def test_an_abort_ends_every_choice_whenever_it_comes(network: torch.nn.Module) -> None:
    for steps in (0, 1, 2, 4, 6):
        tiny = sharing(network, "dense", max_num_batched_tokens=128)
        tiny.submit("n", make_prompt(300), greedy(20), choices=3)
        for _ in range(steps):
            tiny.step()
        tiny.engine.abort("n")
        ends = [output for output in tiny.step() if output.finish_reason is FinishReason.ABORT]
        assert sorted(end.choice for end in ends) == [0, 1, 2]
        assert not tiny.engine.has_work
        tiny.assert_empty()


def test_kv_bytes_are_the_pages_that_rows_read_at_every_moment(network: torch.nn.Module) -> None:
    tiny = sharing(network, "both", "dense", max_num_batched_tokens=256)
    for n in range(3):
        tiny.submit(f"{n}", document(question=n), greedy(10), "dense" if n else "both")
    while tiny.engine.has_work:
        stats = tiny.engine.step().stats
        table = tiny.cache.table.host
        assert stats.kv_bytes == len(set(table[table >= 0].tolist())) * tiny.cache.pool.page_bytes
        pages = (stats.pages_free, stats.pages_cached, stats.pages_borrowed, stats.pages_private)
        assert sum(pages) == tiny.cache.pool.num_pages
        tiny.cache.check()


def test_a_long_answer_behind_a_compacted_prompt_has_its_pages(network: torch.nn.Module) -> None:
    cold = sharing(network, "snap", share_prefixes=False)
    tiny = sharing(network, "snap")
    for question in range(3):
        prompt = document(question=question, length=186)  # whole pages: all of it is published
        assert tiny.answer(prompt, greedy(150)) == cold.answer(prompt, greedy(150))
    tiny.assert_empty()
