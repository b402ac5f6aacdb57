"""PyramidKV keeps more in lower layers than in higher ones, the budget on average, and promises just that."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.decode import attend_rows
from kvcache.policies import KV_POLICIES
from kvcache.pool import pages_for
from kvcache.pyramidkv import PyramidKV
from kvcache.snapkv import SnapKV, largest, window_votes
from kvcache.state import StateRegistry
from tests.kvcache.builders import decode, filled, make_cache, make_model, view_of
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

SCALE = 0.25
WINDOW = 8


def attached(policy: SnapKV, layers: int, kv_heads: int = 2) -> Any:
    policy.attach(make_model(layers=layers, kv_heads=kv_heads), Path(), StateRegistry())
    return policy


def queries_and_keys(length: int) -> tuple[Tensor, Tensor]:
    """Queries of the window [6, window, 16] and keys [2, length, 16]."""
    torch.manual_seed(length)
    return torch.randn(6, WINDOW, 16) * 3, torch.randn(2, length, 16)


def keep(policy: SnapKV, layer: int, q: Tensor, k: Tensor) -> Tensor | None:
    return policy.after_prefill(layer, q, view_of(k, k), scale=SCALE)


def published(budget: int, window: int, beta: int, layers: int, prompt: int) -> list[int]:
    """Past tokens by layer as the method's authors cut them: steps of whole tokens from the first layer."""
    mean = budget - window
    if prompt < 2 * mean:
        return [mean] * layers
    low = mean // beta
    high = 2 * mean - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * mean - high
    step = (high - low) // (layers - 1)
    return [high - layer * step for layer in range(layers)]


def test_the_published_steps_keep_more_than_the_budget() -> None:
    """What the source says of its own rounding: the reason ours differs."""
    assert sum(published(2048, 64, 20, 32, 100_000)) / 32 == 1993.5  # not 1984


@pytest.mark.parametrize("beta", [1, 5, 20, 10_000])
@pytest.mark.parametrize("layers", [2, 3, 28, 30, 32])
@pytest.mark.parametrize(
    ("budget", "prompt"),
    [(40, 41), (40, 63), (40, 64), (40, 70), (40, 500), (9, 300), (2048, 4100), (2048, 99_999)],
)
def test_layers_keep_the_published_line_and_exactly_the_budget_on_average(
    budget: int, prompt: int, layers: int, beta: int
) -> None:
    policy = attached(PyramidKV(budget=budget, query_window=WINDOW, beta=beta), layers)
    past = policy.past_by_layer(prompt)
    assert sum(past) == layers * (budget - WINDOW)
    assert past == sorted(past, reverse=True)
    assert past[-1] >= 0 and past[0] <= prompt - WINDOW
    expected = published(budget, WINDOW, beta, layers, prompt)
    assert past[0] == expected[0]
    for layer in range(layers):  # each whole step may lose a token
        assert 0 <= expected[layer] - past[layer] <= layer


def test_the_line_starts_and_ends_where_it_is_published() -> None:
    policy = attached(PyramidKV(budget=1008, query_window=WINDOW), 5)
    assert policy.past_by_layer(10_000) == [1950, 1475, 1000, 525, 50]


def test_a_prompt_shorter_than_twice_the_budget_gets_it_evenly() -> None:
    policy = attached(PyramidKV(budget=108, query_window=WINDOW), 4)
    assert policy.past_by_layer(199) == [100, 100, 100, 100]
    assert policy.past_by_layer(200) == [192, 131, 69, 8]  # all there is in the first layer


def test_one_layer_keeps_the_budget() -> None:
    assert attached(PyramidKV(budget=108, query_window=WINDOW), 1).past_by_layer(1000) == [100]


@pytest.mark.parametrize("length", [WINDOW, 39, 40])
def test_a_prompt_within_the_budget_is_left_alone_in_every_layer(length: int) -> None:
    policy = attached(PyramidKV(budget=40, query_window=WINDOW), 3)
    q, k = queries_and_keys(length)
    assert [keep(policy, layer, q, k) for layer in range(3)] == [None] * 3


@pytest.mark.parametrize("length", [41, 63, 64, 70, 200])
def test_every_layer_keeps_its_best_and_its_window(length: int) -> None:
    policy = attached(PyramidKV(budget=40, query_window=WINDOW, smoothing=1), 4)
    q, k = queries_and_keys(length)
    votes = window_votes(q, k, SCALE)
    total = 0
    for layer, past in enumerate(policy.past_by_layer(length)):
        mask = keep(policy, layer, q, k)
        assert mask is not None and mask.shape == k.shape[:2]  # a mask in every layer, even where all stays
        assert mask[:, -WINDOW:].all()
        assert torch.equal(mask[:, :-WINDOW], largest(votes, past))
        total += int(mask.sum())
    assert total == 4 * 2 * 40


def test_lower_layers_keep_what_higher_layers_keep_and_more() -> None:
    policy = attached(PyramidKV(budget=40, query_window=WINDOW), 4)
    q, k = queries_and_keys(300)
    masks = [keep(policy, layer, q, k) for layer in range(4)]
    for lower, higher in zip(masks, masks[1:], strict=False):
        assert lower is not None and higher is not None
        assert (lower | ~higher).all() and int(lower.sum()) > int(higher.sum())


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_a_beta_of_one_is_snapkv(pooling: Any) -> None:
    flat = attached(PyramidKV(budget=40, query_window=WINDOW, pooling=pooling, beta=1), 3)
    snap = attached(SnapKV(budget=40, query_window=WINDOW, pooling=pooling), 3)
    q, k = queries_and_keys(300)
    for layer in range(3):
        found, expected = keep(flat, layer, q, k), keep(snap, layer, q, k)
        assert found is not None and expected is not None and torch.equal(found, expected)
    for prompt, total in [(30, 60), (300, 310), (300, 1000)]:
        assert flat.pages_needed(prompt, total, 128) == snap.pages_needed(prompt, total, 128)
        assert flat.pages_after_prefill(prompt, total) == snap.pages_after_prefill(prompt, total)


@pytest.mark.parametrize(
    ("budget", "length", "total"),
    [(66, 67, 140), (66, 130, 193), (66, 130, 448), (70, 300, 310), (100, 448, 448)],
)
def test_layers_hold_their_share_and_no_promise_is_broken(budget: int, length: int, total: int) -> None:
    model = make_model(layers=3)
    policy = PyramidKV(budget=budget, query_window=WINDOW)
    policy.attach(model, Path(), StateRegistry())
    torch.manual_seed(0)
    pages = policy.pages_needed(length, total, 128)
    cache = make_cache(model=model, num_pages=pages)  # not a page to spare
    slot, k, _ = filled(cache, length, pages=pages)
    tails = torch.randn(3, 4, WINDOW, 4)
    masks = [
        policy.after_prefill(at, tails[at], cache.view(slot, at, length), scale=SCALE) for at in range(3)
    ]
    cache.compact(slot, torch.stack([mask for mask in masks if mask is not None]))
    cache.promise(slot, policy.pages_after_prefill(length, total))
    cache.check()
    assert cache.kept_tokens(slot) == budget
    for layer, past in enumerate(policy.past_by_layer(length)):
        assert cache.held.host[slot, layer].tolist() == [past + WINDOW] * 2
        mask = masks[layer]
        assert mask is not None
        view = cache.view(slot, layer, length)
        for head in range(2):
            assert torch.equal(view.contiguous()[0][head, : past + WINDOW], k[layer, head, mask[head]])
    for _ in range(total - length):
        decode(cache, [slot], torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4))
        cache.check()
    held = int((cache.table.host[slot] >= 0).sum())
    assert held == policy.pages_after_prefill(
        length, total
    )  # what a layer keeps is known: not a page too many
    cache.release(slot)
    cache.check()


def test_promises_cover_prefill_and_what_is_generated() -> None:
    policy = attached(PyramidKV(budget=1008, query_window=WINDOW), 5)
    assert policy.pages_after_prefill(10_000, 10_056) == 2 * sum(
        pages_for(n + 64) for n in (1950, 1475, 1000, 525, 50)
    )
    assert policy.pages_needed(10_000, 10_056, 256) == 10 * 157  # prefill is the peak
    assert policy.pages_needed(1008, 2000, 256) == policy.pages_after_prefill(1008, 2000) == 10 * 32


def test_decode_over_layers_of_unequal_length_equals_dense_decode_of_each() -> None:
    model = make_model(layers=3)
    policy = PyramidKV(budget=70, query_window=WINDOW)
    policy.attach(model, Path(), StateRegistry())
    cache = make_cache(model=model)
    torch.manual_seed(0)
    slot, k, v = filled(cache, 300, pages=40)
    tails = torch.randn(3, 4, WINDOW, 4)
    masks = [policy.after_prefill(at, tails[at], cache.view(slot, at, 300), scale=SCALE) for at in range(3)]
    chosen = torch.stack([mask for mask in masks if mask is not None])
    cache.compact(slot, chosen)
    new_k, new_v, q = torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4), torch.randn(1, 4, 4)
    cache.reserve_next([slot])
    cache.sync()
    destinations = cache.decode_destinations([slot])
    for layer in range(3):
        cache.write(new_k[layer], new_v[layer], destinations[layer])
    rows = cache.decode_rows([slot])
    assert rows.held[:, 0].tolist() == [[past + WINDOW + 1] * 2 for past in (121, 62, 3)]
    for layer in range(3):
        out = attend_rows(
            q,
            cache.pool.k,
            cache.pool.v,
            rows.pages[layer],
            rows.held[layer],
            scale=0.5,
            max_held=rows.max_held,
        )
        for head in range(4):
            row = head // 2
            keys = torch.cat((k[layer, row, chosen[layer, row]], new_k[layer, :, row])).double()
            values = torch.cat((v[layer, row, chosen[layer, row]], new_v[layer, :, row])).double()
            expected = (keys @ q[0, head].double() * 0.5).softmax(0) @ values
            torch.testing.assert_close(out[0, head].double(), expected, atol=2e-6, rtol=0)  # fp32


def test_a_beta_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta \(0\) must be at least 1"):
        PyramidKV(beta=0)


def test_options_of_snapkv_are_checked_as_there() -> None:
    with pytest.raises(ValueError, match=r"budget \(32\) must exceed query_window \(32\)"):
        PyramidKV(budget=32)


def test_it_is_found_by_the_name_a_plan_uses() -> None:
    assert KV_POLICIES["pyramidkv"] is PyramidKV


def test_an_engine_keeps_the_mean_budget_less_in_each_layer_and_frees_all() -> None:
    small = {"policy": "pyramidkv", "budget": 100}
    tiny = tiny_engine(
        plan("pyramid", kv=small),
        plan("all", kv={**small, "budget": 2000}),
        plan("dense"),
        network=tiny_model(),
    )
    tiny.submit("a", make_prompt(700), greedy(80), "pyramid")
    (output,) = tiny.step()
    assert output.cost is not None and output.cost.kv_tokens_kept == 100
    held = tiny.cache.held.host[0]  # 68 past tokens on average: 133, 68 and 3, and 32 of the window
    assert held.tolist() == [[165, 165], [100, 100], [35, 35]]
    assert output.cost.kv_bytes == 2 * (3 + 2 + 1) * tiny.cache.pool.page_bytes
    tiny.run()
    tiny.assert_empty()

    prompts = {f"{length}": make_prompt(length, seed=length) for length in (90, 130, 400)}
    alone = {name: tiny.answer(prompt, greedy(12), "pyramid") for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        tiny.submit(name, prompt, greedy(12), "pyramid")
    assert tiny.run() == alone  # fp32
    prompt = make_prompt(300)
    assert tiny.answer(prompt, greedy(12), "all") == tiny.answer(prompt, greedy(12), "dense")
    assert tiny.answer(prompt, greedy(12), "pyramid") != tiny.answer(
        prompt, greedy(12), "dense"
    )  # else no proof
    tiny.assert_empty()
