"""The host tier in the engine: sequences give way and come back, and no answer changes by it."""

from typing import Any

import pytest
import torch

from engine.messages import FinishReason
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

ROWS = 2 * 2
SPARSE = {"method": "minference", "dense_below": 0, "chunk": 128, "vertical": 40, "slash": 10}
HIP = {
    "method": "hip",
    "widths": [32, 16],
    "keep": [64, 48],
    "refresh": [6, 3],
    "sink": 16,
    "window": 20,
    "dense_layers": 0,
}
SNAP = {"policy": "snapkv", "budget": 70, "query_window": 16}
PLANS: dict[str, dict[str, Any]] = {
    "dense": {},
    "snapkv": {"kv": SNAP},
    "streaming": {"kv": {"policy": "streaming", "window": 120}},
    "moa": {"kv": {"policy": "moa", "beta": 0.9}},
    "s2": {"kv": {"policy": "s2", "local_blocks": 4}},
    "grid-snapkv": {"prefill": SPARSE, "kv": SNAP},
    "quest": {"decode": {"method": "quest", "read": 128, "dense_layers": 0, "reuse": 4}},
    "hip": {"decode": HIP},
}
LENGTHS = (60, 125, 190, 62)
ANSWER = 85  # tokens: rows of the first prompt want more pages than they begin with
# More than any one of these sequences needs, less than those that are let in together come to need.
PAGES = {"dense": 24, "quest": 24, "hip": 24, "moa": 22, "s2": 25}
FEW = 21  # of the other plans
GARBAGE = 1e4  # what is in pages that nobody has


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(network: torch.nn.Module) -> dict[str, dict[str, list[int]]]:
    """By plan and request: the answers of sequences that have all the pages they want."""
    tiny = tiny_engine(*(plan(name, **parts) for name, parts in PLANS.items()), network=network)
    for name in PLANS:
        submit_all(tiny, name, prefix=f"{name}/")
    found = tiny.run()
    return {name: {f"{n}": found[f"{name}/{n}"] for n in range(len(LENGTHS))} for name in PLANS}


@pytest.mark.parametrize("name", PLANS)
def test_answers_are_the_same_when_sequences_must_give_way(
    network: torch.nn.Module, expected: dict[str, dict[str, list[int]]], name: str
) -> None:
    assert answers_under_pressure(tight(network, name), name) == expected[name]


def test_quantised_pages_come_back_with_their_scales(network: torch.nn.Module) -> None:
    roomy = tiny_engine(network=network, cache_dtype="int8")
    submit_all(roomy, "dense")
    assert answers_under_pressure(tight(network, cache_dtype="int8"), "dense") == roomy.run()


def submit_all(tiny: TinyEngine, name: str, prefix: str = "") -> None:
    for number, length in enumerate(LENGTHS):
        tiny.submit(f"{prefix}{number}", make_prompt(length, seed=number), greedy(ANSWER), name)


def tight(network: torch.nn.Module, name: str = "dense", **options: Any) -> TinyEngine:
    options = {"num_pages": PAGES.get(name, FEW), "host_pages": 100, **options}
    return tiny_engine(plan(name, **PLANS[name]), network=network, max_num_batched_tokens=128, **options)


def spoil(tiny: TinyEngine) -> None:
    free = tiny.cache.pool.references == 0
    for tensor in tiny.cache.pool.carried:
        tensor[: len(free)][free] = GARBAGE if tensor.is_floating_point() else 77


def run_until_somebody_is_out(tiny: TinyEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while not tiny.engine.stats().swapped:
        for output in tiny.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
    return tokens


def answers_under_pressure(tiny: TinyEngine, name: str) -> dict[str, list[int]]:
    submit_all(tiny, name)
    tokens = run_until_somebody_is_out(tiny)
    while tiny.engine.has_work:
        spoil(tiny)
        for output in tiny.step():
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.tokens)
    stats = tiny.engine.stats()
    assert stats.swaps_out == stats.swaps_in > 0
    assert stats.swapped == stats.pages_host == 0
    tiny.assert_empty()
    return tokens


def test_more_sequences_live_at_once(network: torch.nn.Module) -> None:
    live = []
    for host_pages in (0, 400):
        tiny = tight(network, num_pages=ROWS * 12, host_pages=host_pages)
        for number in range(6):
            tiny.submit(f"{number}", make_prompt(60, seed=number), greedy(250))
        tiny.step()
        live.append(tiny.engine.stats().running)
        for number in range(6):
            tiny.engine.abort(f"{number}")
        tiny.step()
        tiny.assert_empty()
    assert live == [2, 6]


def test_without_a_host_the_most_is_promised_at_once(network: torch.nn.Module) -> None:
    tiny = tight(network, num_pages=200, host_pages=0)
    submit_all(tiny, "dense")
    tiny.step()
    assert tiny.cache.host is None and tiny.engine.stats().pages_host == 0
    needed = sum(ROWS * -(-(length + ANSWER) // 64) for length in LENGTHS)
    assert tiny.cache.promises.total == tiny.cache.promises.secured == needed


def test_a_full_host_makes_others_wait(network: torch.nn.Module) -> None:
    for host_pages, live in ((11, 2), (12, 3)):
        tiny = tight(network, num_pages=24, host_pages=host_pages)
        tiny.submit("secured", make_prompt(60, seed=0), greedy(70))
        for number in (1, 2, 3):
            tiny.submit(f"{number}", make_prompt(60, seed=number), greedy(70))
        tiny.step()
        tiny.step()
        most = [tiny.cache.promises.secured, tiny.cache.promises.covered]
        assert most[0] <= 24 and most[1] <= host_pages
        assert tiny.engine.stats().running == live, host_pages
    assert len(tiny.run()) == 4
    tiny.assert_empty()


@pytest.mark.parametrize("steps", [0, 9])
def test_a_request_that_is_out_can_be_aborted(network: torch.nn.Module, steps: int) -> None:
    tiny = tight(network)
    submit_all(tiny, "dense")
    run_until_somebody_is_out(tiny)
    for _ in range(steps):
        tiny.step()
    (out,) = {one.request_id for one in tiny.engine._scheduler.swapped}
    tiny.engine.abort(out)
    (end,) = [output for output in tiny.step() if output.finish_reason is not None]
    assert (end.request_id, end.finish_reason) == (out, FinishReason.ABORT)
    tiny.cache.check()
    stats = tiny.engine.stats()
    assert stats.swapped == stats.pages_host == 0 and stats.swaps_in == 0
    for number in range(len(LENGTHS)):
        tiny.engine.abort(f"{number}")
    tiny.step()
    tiny.assert_empty()


def test_a_step_that_fails_leaves_those_that_are_out(
    network: torch.nn.Module,
    expected: dict[str, dict[str, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = tight(network)
    submit_all(tiny, "dense")
    tokens = run_until_somebody_is_out(tiny)
    (out,) = {one.request_id for one in tiny.engine._scheduler.swapped}
    running = {one.request_id for one in tiny.engine._scheduler.running}
    with monkeypatch.context() as patch:
        patch.setattr(network, "forward", None)
        ends = tiny.step()
    assert {end.request_id for end in ends if end.finish_reason is FinishReason.ERROR} == running
    tiny.cache.check()
    assert tokens.get(out, []) + tiny.run()[out] == expected["dense"][out]
    tiny.assert_empty()


@pytest.mark.parametrize("name", ["dense", "snapkv"])
def test_choices_of_one_prompt_stay_while_others_give_way(network: torch.nn.Module, name: str) -> None:
    roomy = tiny_engine(plan(name, **PLANS[name]), network=network)
    tiny = tight(network, name, num_pages=44)
    for one in (roomy, tiny):
        one.submit("other", make_prompt(60, seed=5), greedy(ANSWER))
        one.submit("n", make_prompt(62), greedy(ANSWER), choices=2)
        one.submit("last", make_prompt(190, seed=6), greedy(ANSWER))
    assert tiny.run() == roomy.run()
    assert tiny.engine.stats().swaps_out > 0
    tiny.assert_empty()


def test_borrowed_columns_are_borrowed_again(network: torch.nn.Module) -> None:
    document = make_prompt(130, seed=9)
    prompts = {f"{n}": (*document, *make_prompt(55, seed=n)) for n in range(4)}
    roomy = tiny_engine(network=network, share_prefixes=True)
    tiny = tight(network, num_pages=36, share_prefixes=True)
    borrowed = []
    swap_in = tiny.cache.swap_in

    def watched(swapped: Any) -> int:
        slot = swap_in(swapped)
        borrowed.append(tiny.cache.promises.columns(slot).size)
        return slot

    tiny.cache.swap_in = watched  # type: ignore[method-assign]
    for one in (roomy, tiny):
        for name, prompt in prompts.items():
            one.submit(name, prompt, greedy(ANSWER))
    tokens: dict[str, list[int]] = {}
    while tiny.engine.has_work:
        spoil(tiny)
        for output in tiny.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
    assert tokens == roomy.run()
    assert max(borrowed) == 2  # whole blocks of the document, which another one still reads
    tiny.assert_empty()


def ask(tiny: TinyEngine, prompt: tuple[int, ...], name: str) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were not computed."""
    tiny.submit("asked", prompt, greedy(6), name)
    tokens, cached = [], 0
    while tiny.engine.has_work:
        for output in tiny.step():
            assert output.error is None, output.error
            tokens += output.tokens
            cached = cached if output.cost is None else output.cost.cached_tokens
    return tokens, cached


@pytest.mark.parametrize("name", ["dense", "snapkv", "streaming", "grid-snapkv"])
def test_a_document_asked_about_again_starts_with_a_copy(network: torch.nn.Module, name: str) -> None:
    document = make_prompt(330, seed=1)
    first, second = ((*document, *make_prompt(70, seed=seed)) for seed in (3, 4))
    cold, _ = ask(tiny_engine(plan(name, **PLANS[name]), network=network), second, name)
    tiny = tight(network, name, num_pages=44, host_pages=100, host_columns=10, share_prefixes=True)
    ask(tiny, first, name)
    for _ in range(2):
        tiny.cache.prefix.make_room(44)  # as others may want them all
        spoil(tiny)
        answer, cached = ask(tiny, second, name)
        # Whole pages of the document, or whole chunks of the grid.
        assert answer == cold and cached == (256 if name.startswith("grid") else 320)
    assert tiny.engine.stats().host_hits == 2 * cached
    tiny.assert_empty()
