"""Ada-SnapKV shares a layer's budget among its heads by score, exactly, and holds no more than promised."""

from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.ada_snapkv import AdaSnapKV, largest_by_row, shares
from kvcache.cache import KVCache
from kvcache.decode import attend_rows
from kvcache.policies import KV_POLICIES
from kvcache.pool import pages_for
from kvcache.snapkv import SnapKV, largest, window_votes
from kvcache.state import StateRegistry
from tests.kvcache.builders import decode, make_cache, make_model, prefill, random_tokens, view_of
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SCALE = 0.25
WINDOW = 8
ADA = {"policy": "ada-snapkv", "budget": 100}


def attached(policy: SnapKV, *, layers: int = 2, kv_heads: int = 2) -> Any:
    policy.attach(
        make_model(layers=layers, query_heads=2 * kv_heads, kv_heads=kv_heads), Path(), StateRegistry()
    )
    return policy


def queries_and_keys(
    length: int, *, kv_heads: int = 4, group: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Queries of the window [Hq, window, D] and keys [Hkv, N, D]; higher heads look sharper."""
    torch.manual_seed(seed + length)
    sharpness = torch.linspace(0.5, 4, kv_heads).repeat_interleave(group)[:, None, None]
    q = torch.randn(kv_heads * group, WINDOW, 16) * sharpness
    return q, torch.randn(kv_heads, length, 16)


def kept(policy: SnapKV, q: Tensor, k: Tensor, layer: int = 0) -> Tensor:
    mask = policy.after_prefill(layer, q, view_of(k, k), scale=SCALE)
    assert mask is not None and mask.dtype == torch.bool and mask.shape == k.shape[:2]
    return mask


def written_slowly(scores: Tensor, mean: int, safeguard: float) -> tuple[list[int], Tensor]:
    """Shares and choice by one global sort and fractions, in plain Python."""
    heads, length = scores.shape
    everything = sorted(
        product(range(length), range(heads)), key=lambda at: (-scores[at[1], at[0]].item(), at)
    )
    best = [0] * heads
    for _, head in everything[: heads * mean]:
        best[head] += 1
    safe = int(safeguard * mean)
    exact = [safe + Fraction(best[head] * (mean - safe), mean) for head in range(heads)]
    found = [int(share) for share in exact]
    by_loss = sorted(range(heads), key=lambda head: (found[head] - exact[head], head))
    for head in by_loss[: heads * mean - sum(found)]:
        found[head] += 1
    chosen = torch.zeros(heads, length, dtype=torch.bool)
    for head in range(heads):
        ranked = sorted(range(length), key=lambda at, row=scores[head]: (-row[at].item(), at))  # type: ignore[misc]
        chosen[head, ranked[: found[head]]] = True
    return found, chosen


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("heads", "mean", "length"), [(1, 5, 9), (2, 1, 2), (3, 7, 8), (4, 10, 200), (8, 33, 90)]
)
def test_shares_and_choice_are_those_of_one_global_sort(
    heads: int, mean: int, length: int, safeguard: float
) -> None:
    torch.manual_seed(length)
    scores = torch.rand(heads, length).mul(6).round() * torch.rand(heads, 1)  # with ties inside heads
    found = shares(scores, mean, safeguard)
    expected, chosen = written_slowly(scores, mean, safeguard)
    assert found.tolist() == expected
    assert torch.equal(largest_by_row(scores, found), chosen)


@pytest.mark.parametrize("safeguard", [0.0, 0.05, 0.2, 0.29, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_shares_are_exact_in_sum_safe_within_the_prompt_and_never_worse_than_even(
    safeguard: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, mean = 2 + seed, 17 * (seed + 1)
    for length in (mean, mean + 1, 3 * mean):
        scores = torch.rand(heads, length, generator=generator).pow(3)
        scores *= torch.rand(heads, 1, generator=generator).pow(4)  # heads far apart
        found = shares(scores, mean, safeguard)
        assert int(found.sum()) == heads * mean
        assert int(found.min()) >= int(safeguard * mean) and int(found.max()) <= length
        chosen = largest_by_row(scores, found)
        assert torch.equal(chosen.sum(1), found)
        even = largest(scores, mean)
        assert scores.double()[chosen].sum() >= scores.double()[even].sum() - 1e-12  # order of float64 sums


def test_equal_scores_are_shared_evenly() -> None:
    assert shares(torch.ones(4, 100), 25, 0.2).tolist() == [25] * 4
    pooled = torch.ones(3, 90).repeat_interleave(7, 1)  # a plateau longer than the budget
    assert shares(pooled, 10, 0.0).tolist() == [10] * 3


def test_what_rounding_leaves_over_goes_to_who_lost_most() -> None:
    # The best 12 of the layer: 9, 3 and 0. Of 4 each, 2 are safe; the rest 9/2, 3/2 and 0.
    scores = torch.zeros(3, 20)
    scores[0, :9], scores[1, :3] = 2, 1
    assert shares(scores, 4, 0.5).tolist() == [7, 3, 2]  # two equal fractions, one token left: the lower head
    assert shares(scores, 4, 0.0).tolist() == [9, 3, 0]
    assert shares(scores, 4, 1.0).tolist() == [4, 4, 4]


def test_what_a_head_has_no_tokens_for_goes_to_the_next_by_score() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0])[:, None] + torch.linspace(0.5, 0, 12)
    # The layer may keep 24 of 36: head 0 alone would take them all, and has 12.
    assert shares(scores, 8, 0.0).tolist() == [12, 12, 0]
    assert shares(scores, 8, 0.25).tolist() == [11, 11, 2]


@pytest.mark.parametrize("length", [WINDOW, 39, 40])
def test_a_prompt_within_the_budget_is_left_alone(length: int) -> None:
    q, k = queries_and_keys(length)
    policy = AdaSnapKV(budget=40, query_window=WINDOW)
    assert policy.after_prefill(0, q, view_of(k, k), scale=SCALE) is None


@pytest.mark.parametrize("length", [41, 64, 200, 1000])
def test_a_layer_keeps_the_budget_of_its_heads_and_every_window(length: int) -> None:
    mask = kept(AdaSnapKV(budget=40, query_window=WINDOW), *queries_and_keys(length))
    assert int(mask.sum()) == 4 * 40  # one token over budget: one dropped per head on average
    assert mask[:, -WINDOW:].all()
    assert int(mask.sum(1).min()) >= WINDOW + int(0.2 * 32)


def test_a_head_that_looks_at_many_tokens_keeps_more_than_one_that_looks_at_few() -> None:
    q, k = queries_and_keys(600, kv_heads=2)
    q = q[:, :1].expand(-1, WINDOW, -1)  # every row and member of a group asks the same
    q = q[[0, 3]].repeat_interleave(3, 0)
    k *= 0.1
    k[0, 50:290:2] += 8 * q[0, 0]  # 120 tokens
    k[1, 300] += 8 * q[3, 0]  # one
    mask = kept(AdaSnapKV(budget=72, query_window=WINDOW, smoothing=1), q, k)
    assert mask[0, 50:290:2].sum() >= 100 and mask[1, 300]
    assert mask.sum(1).tolist() == [123, 21]  # 12 + 127 * 52 / 64 and 12 + 1 * 52 / 64, and the window
    votes = window_votes(q, k, SCALE)
    for head in range(2):
        past = mask[head, :-WINDOW]
        assert votes[head][past].min() >= votes[head][~past].max()


def test_neighbours_of_a_needle_stay_with_it() -> None:
    q, k = queries_and_keys(300, kv_heads=2)
    k *= 0.01
    k[:, 150] = 20 * q.view(2, 3, WINDOW, 16).mean((1, 2))
    mask = kept(AdaSnapKV(budget=13, query_window=WINDOW, smoothing=5), q, k)
    assert mask[:, 148:153].all() and mask.sum(1).tolist() == [13, 13]


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_a_safeguard_of_one_is_snapkv(pooling: Any) -> None:
    q, k = queries_and_keys(300)
    ada = AdaSnapKV(budget=40, query_window=WINDOW, pooling=pooling, safeguard=1.0)
    assert torch.equal(kept(ada, q, k), kept(SnapKV(budget=40, query_window=WINDOW, pooling=pooling), q, k))


def test_one_kv_head_is_snapkv() -> None:
    q, k = queries_and_keys(300, kv_heads=1)
    ada, snap = AdaSnapKV(budget=40, query_window=WINDOW), SnapKV(budget=40, query_window=WINDOW)
    assert torch.equal(kept(ada, q, k), kept(snap, q, k))
    for prompt, total in [(30, 60), (300, 310), (300, 1000)]:
        assert attached(ada, kv_heads=1).pages_after_prefill(prompt, total) == attached(
            snap, kv_heads=1
        ).pages_after_prefill(prompt, total)


def test_the_order_of_heads_in_a_group_does_not_matter() -> None:
    policy = AdaSnapKV(budget=40, query_window=WINDOW)
    q, k = queries_and_keys(300)
    shuffled = q.view(4, 3, WINDOW, 16)[:, [2, 0, 1]].reshape(q.shape)
    assert torch.equal(kept(policy, q, k), kept(policy, shuffled, k))


def test_ties_within_a_head_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    found = largest_by_row(scores, torch.tensor([3, 0]))
    assert found.tolist() == [[True, True, False, True, False], [False] * 5]


def compacted(
    cache: KVCache, policy: AdaSnapKV, length: int, total: int, greedy_head: int
) -> tuple[int, Tensor, Tensor, Tensor]:
    """A sequence whose `greedy_head` looks everywhere alike and whose other heads look at the window only.

    Admitted, filled, compacted and promised as the engine does it. Returns slot, k, v and keep by layer.
    """
    slot = cache.admit(policy.pages_needed(length, total, 128))
    k, v = random_tokens(cache, length)
    k[:, :, length - policy.query_window] *= 100
    group = 2
    q = (
        k[:, :, length - policy.query_window, None]
        .repeat_interleave(group, 1)
        .repeat(1, 1, policy.query_window, 1)
    )
    q[:, greedy_head * group : (greedy_head + 1) * group] = 0
    for start in range(0, length, 128):
        prefill(cache, slot, k[:, :, start : start + 128], v[:, :, start : start + 128])
        cache.check()
    masks = [policy.after_prefill(at, q[at], cache.view(slot, at, length), scale=1.0) for at in range(len(k))]
    keep = torch.stack([mask for mask in masks if mask is not None])
    cache.compact(slot, keep)
    cache.promise(slot, policy.pages_after_prefill(length, total))
    cache.check()
    return slot, k, v, keep


@pytest.mark.parametrize("safeguard", [0.0, 0.2])
@pytest.mark.parametrize("kv_heads", [2, 3])
@pytest.mark.parametrize(
    ("budget", "length", "total"), [(65, 66, 140), (66, 300, 310), (80, 257, 448), (100, 448, 448)]
)
def test_no_promise_is_broken_when_one_head_takes_nearly_all(
    budget: int, length: int, total: int, kv_heads: int, safeguard: float
) -> None:
    torch.manual_seed(0)
    model = make_model(query_heads=2 * kv_heads, kv_heads=kv_heads)
    policy = AdaSnapKV(budget=budget, query_window=WINDOW, safeguard=safeguard)
    policy.attach(model, Path(), StateRegistry())
    cache = make_cache(model=model, num_pages=policy.pages_needed(length, total, 128))  # not a page to spare
    slot, _, _, keep = compacted(cache, policy, length, total, greedy_head=1)
    counts = keep.sum(-1)
    past = budget - WINDOW
    others = WINDOW + int(safeguard * past)
    assert int(counts[0, 1]) >= min(length, WINDOW + int((1 - safeguard) * kv_heads * past))
    assert counts.sum(1).tolist() == [kv_heads * budget] * 2 and int(counts.min()) >= others
    for _ in range(total - length):  # every page that is promised for generation, to the last token
        decode(cache, [slot], *(torch.randn(2, 1, kv_heads, 4) for _ in range(2)))
        cache.check()
    assert int(cache.computed[slot]) == total
    cache.release(slot)
    cache.check()


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [65, 66, 100, 128, 129])
def test_a_layer_is_promised_what_its_worst_split_takes_and_no_page_more(tokens: int, heads: int) -> None:
    policy = attached(AdaSnapKV(budget=tokens, query_window=1, safeguard=0), layers=1, kv_heads=heads)
    whole = heads * tokens
    splits = (
        (*first, whole - sum(first))
        for first in product(range(1, whole), repeat=heads - 1)
        if sum(first) < whole
    )
    worst = max(sum(pages_for(row) for row in split) for split in splits)
    assert policy.pages_after_prefill(1000, 1000) == worst


def test_promises_exceed_those_of_even_shares_by_less_than_a_page_per_head() -> None:
    for budget, prompt, total in product((64, 100, 1024), (100, 300, 5000), (5000, 5100, 6000)):
        ada = attached(AdaSnapKV(budget=budget), layers=3, kv_heads=4)
        snap = attached(SnapKV(budget=budget), layers=3, kv_heads=4)
        more = ada.pages_after_prefill(prompt, total) - snap.pages_after_prefill(prompt, total)
        assert 0 <= more <= 3 * 3
        assert ada.pages_needed(prompt, total, 256) >= 12 * pages_for(prompt)
        assert ada.pages_needed(prompt, total, 256) <= 12 * pages_for(total)  # keeping all is no dearer
        if prompt <= budget:
            assert more == 0


def test_a_prompt_little_over_budget_is_promised_no_more_than_keeping_all() -> None:
    ada = attached(AdaSnapKV(budget=100), layers=3, kv_heads=4)
    assert ada.pages_after_prefill(101, 128) == 12 * 2  # rounding alone would allow 33


def test_decode_over_ragged_rows_equals_dense_decode_of_each_head() -> None:
    torch.manual_seed(0)
    model = make_model(query_heads=4, kv_heads=2)
    policy = AdaSnapKV(budget=90, query_window=WINDOW)
    policy.attach(model, Path(), StateRegistry())
    cache = make_cache(model=model)
    slot, k, v, keep = compacted(cache, policy, 300, 301, greedy_head=0)
    assert keep.sum(-1)[0].tolist() == [156, 24]  # 2 * 82 past tokens: 148 and 16
    new_k, new_v = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4)
    q = torch.randn(1, 4, 4)
    cache.reserve_next([slot])
    cache.sync()
    destinations = cache.decode_destinations([slot])
    for layer in range(2):
        cache.write(new_k[layer], new_v[layer], destinations[layer])
    rows = cache.decode_rows([slot])
    for layer in range(2):
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
            keys = torch.cat((k[layer, row, keep[layer, row]], new_k[layer, :, row])).double()
            values = torch.cat((v[layer, row, keep[layer, row]], new_v[layer, :, row])).double()
            expected = (keys @ q[0, head].double() * 0.5).softmax(0) @ values
            torch.testing.assert_close(out[0, head].double(), expected, atol=2e-6, rtol=0)  # fp32


@pytest.mark.parametrize("safeguard", [-0.1, 1.1, float("nan")])
def test_a_safeguard_that_is_no_part_is_refused(safeguard: float) -> None:
    with pytest.raises(ValueError, match=r"safeguard \(.*\) must be between 0 and 1"):
        AdaSnapKV(safeguard=safeguard)


def test_options_of_snapkv_are_checked_as_there() -> None:
    with pytest.raises(ValueError, match=r"budget \(32\) must exceed query_window \(32\)"):
        AdaSnapKV(budget=32)


def test_it_is_found_by_the_name_a_plan_uses() -> None:
    assert KV_POLICIES["ada-snapkv"] is AdaSnapKV


@pytest.fixture(scope="module")
def tiny() -> TinyEngine:
    return tiny_engine(
        plan("ada", kv=ADA),
        plan("alone", kv={**ADA, "safeguard": 0.0}),
        plan("all", kv={**ADA, "budget": 2000}),
        plan("dense"),
        network=tiny_model(),
    )


def test_an_engine_keeps_the_mean_budget_in_rows_of_unequal_length_and_frees_all(tiny: TinyEngine) -> None:
    tiny.submit("a", make_prompt(700), greedy(80), "alone")
    (output,) = tiny.step()
    assert output.cost is not None and output.cost.kv_tokens_kept == 100
    held = tiny.cache.held.host[0]  # [L, Hkv]
    assert held.sum(1).tolist() == [200] * 3 and (held[:, 0] != held[:, 1]).any()
    assert output.cost.kv_bytes == pages(held) * tiny.cache.pool.page_bytes
    tiny.run()
    tiny.assert_empty()


def pages(held: Any) -> int:
    return sum(pages_for(int(tokens)) for tokens in held.ravel())


def test_a_request_gets_the_same_tokens_alone_and_among_others(tiny: TinyEngine) -> None:
    prompts = {f"{length}": make_prompt(length, seed=length) for length in (90, 130, 400)}
    alone = {name: tiny.answer(prompt, greedy(12), "ada") for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        tiny.submit(name, prompt, greedy(12), "ada")
    assert tiny.run() == alone  # fp32
    tiny.assert_empty()


def test_a_budget_that_covers_the_prompt_equals_dense(tiny: TinyEngine) -> None:
    prompt = make_prompt(300)
    assert tiny.answer(prompt, greedy(12), "all") == tiny.answer(prompt, greedy(12), "dense")
    assert tiny.answer(prompt, greedy(12), "ada") != tiny.answer(
        prompt, greedy(12), "dense"
    )  # or it proves nothing
    tiny.assert_empty()
