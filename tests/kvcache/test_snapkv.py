"""SnapKV keeps what the last queries look at: exactly the budget, window included, per KV head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvcache.keep_all import KeepAll
from kvcache.policies import KV_POLICIES
from kvcache.snapkv import SnapKV, largest, window_votes
from kvcache.state import StateRegistry
from tests.kvcache.builders import decode, filled, make_cache, make_model, view_of

SCALE = 0.25


def make_prompt(length: int, *, kv_heads: int = 2, group: int = 3, window: int = 8) -> tuple[Tensor, Tensor]:
    """Queries of the window [Hq, window, D] and keys [Hkv, length, D]."""
    torch.manual_seed(length)
    return torch.randn(kv_heads * group, window, 16) * 3, torch.randn(kv_heads, length, 16)


def keep(policy: SnapKV, q: Tensor, k: Tensor) -> Tensor | None:
    return policy.after_prefill(0, q, view_of(k, k), scale=SCALE)


def kept(policy: SnapKV, q: Tensor, k: Tensor) -> Tensor:
    mask = keep(policy, q, k)
    assert mask is not None and mask.dtype == torch.bool and mask.shape == k.shape[:2]
    return mask


def published(policy: SnapKV, q: Tensor, k: Tensor) -> Tensor:
    """The method as its paper tells it, one head and one query at a time, in float64."""
    heads, length, _ = k.shape
    group, window = q.shape[0] // heads, q.shape[1]
    mask = torch.zeros(heads, length, dtype=torch.bool)
    for head in range(heads):
        votes = torch.zeros(length - window, dtype=torch.float64)
        for member in range(group):
            for row in range(window):
                seen = length - window + row + 1
                scores = k[head, :seen].double() @ q[head * group + member, row].double() * SCALE
                votes += scores.softmax(0)[: length - window] / (group * window)
        edge = policy.smoothing // 2
        filler = -torch.inf if policy.pooling == "max" else 0.0
        windows = F.pad(votes, (edge, edge), value=filler).unfold(0, policy.smoothing, 1)
        pooled = windows.amax(1) if policy.pooling == "max" else windows.mean(1)
        ranked = sorted(range(length - window), key=lambda j, s=pooled: (-s[j].item(), j))  # type: ignore[misc]
        mask[head, ranked[: policy.budget - window]] = True
        mask[head, length - window :] = True
    return mask


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("smoothing", [1, 5, 7])
@pytest.mark.parametrize("length", [65, 130, 300])
def test_the_choice_is_the_published_one(pooling: Any, smoothing: int, length: int) -> None:
    policy = SnapKV(budget=40, query_window=8, smoothing=smoothing, pooling=pooling)
    q, k = make_prompt(length)
    expected, found = published(policy, q, k), kept(policy, q, k)
    # Votes within float32 rounding of the last one kept may fall either way; the seeds here have none.
    assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [8, 39, 40])
def test_a_prompt_within_the_budget_is_left_alone(length: int) -> None:
    policy = SnapKV(budget=40, query_window=8)
    assert keep(policy, *make_prompt(length)) is None


def test_one_token_over_budget_drops_exactly_one() -> None:
    mask = kept(SnapKV(budget=40, query_window=8), *make_prompt(41))
    assert mask.sum(1).tolist() == [40, 40]


@pytest.mark.parametrize("length", [41, 64, 200, 1000])
def test_every_head_keeps_the_budget_and_the_window(length: int) -> None:
    mask = kept(SnapKV(budget=40, query_window=8), *make_prompt(length))
    assert mask.sum(1).tolist() == [40, 40]
    assert mask[:, -8:].all()


def test_smoothing_of_one_pools_nothing() -> None:
    q, k = make_prompt(200)
    votes = window_votes(q, k, SCALE)
    for pooling in ("max", "avg"):
        policy = SnapKV(budget=40, query_window=8, smoothing=1, pooling=pooling)  # type: ignore[arg-type]
        assert torch.equal(kept(policy, q, k)[:, :-8], largest(votes, 32))


def test_smoothing_wider_than_the_prompt_is_served() -> None:
    mask = kept(SnapKV(budget=10, query_window=8, smoothing=63), *make_prompt(12))
    assert mask.sum(1).tolist() == [10, 10]


def test_average_pooling_counts_the_zeros_beyond_the_ends() -> None:
    policy = SnapKV(budget=40, query_window=8, smoothing=5, pooling="avg")
    assert policy._smooth(torch.ones(1, 6))[0].tolist() == pytest.approx([0.6, 0.8, 1, 1, 0.8, 0.6])
    assert SnapKV(smoothing=5)._smooth(-torch.ones(1, 6))[0].tolist() == [-1] * 6  # max has none to count


def test_neighbours_of_a_needle_stay_with_it() -> None:
    q, k = make_prompt(300)
    k *= 0.01
    k[:, 150] = 5 * q.view(2, 3, 8, 16).mean((1, 2))
    mask = kept(SnapKV(budget=13, query_window=8, smoothing=5), q, k)
    assert mask[0].nonzero().flatten().tolist() == [148, 149, 150, 151, 152, *range(292, 300)]
    alone = kept(SnapKV(budget=9, query_window=8, smoothing=1), q, k)
    assert alone[1].nonzero().flatten().tolist() == [150, *range(292, 300)]


def test_the_order_of_heads_in_a_group_does_not_matter() -> None:
    policy = SnapKV(budget=40, query_window=8)
    q, k = make_prompt(300, group=4)
    shuffled = q.view(2, 4, 8, 16)[:, [2, 0, 3, 1]].reshape(8, 8, 16)
    assert torch.equal(kept(policy, q, k), kept(policy, shuffled, k))


def test_a_group_asking_the_same_question_chooses_like_one_head() -> None:
    policy = SnapKV(budget=40, query_window=8)
    q, k = make_prompt(300, group=1)
    assert torch.equal(kept(policy, q, k), kept(policy, q.repeat_interleave(3, 0), k))


def test_each_kv_head_chooses_for_itself() -> None:
    policy = SnapKV(budget=40, query_window=8)
    q, k = make_prompt(300, group=3)
    both = kept(policy, q, k)
    assert torch.equal(both[:1], kept(policy, q[:3], k[:1]))
    assert torch.equal(both[1:], kept(policy, q[3:], k[1:]))
    assert not torch.equal(both[0], both[1])


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert largest(scores, 3).tolist() == [[True, True, False, True, False], [True, True, True, False, False]]


def test_a_future_token_gets_no_vote() -> None:
    q, k = make_prompt(100)
    q[:, -1] = 0  # the one query that may see the last token looks everywhere alike
    loud = k.clone()
    loud[:, -1] = q[:, :-1].view(2, 3, 7, 16).mean((1, 2)) * 1000
    assert torch.equal(window_votes(q, k, SCALE), window_votes(q, loud, SCALE))


def test_low_precision_is_scored_in_float32() -> None:
    q, k = make_prompt(300)
    rounded = window_votes(q.bfloat16(), k.bfloat16(), SCALE)
    assert rounded.dtype == torch.float32
    expected = window_votes(q.bfloat16().float(), k.bfloat16().float(), SCALE)
    assert torch.equal(rounded, expected)


def test_kept_keys_and_values_are_the_originals_bit_for_bit() -> None:
    torch.manual_seed(0)
    cache = make_cache(num_pages=64)
    policy = SnapKV(budget=70, query_window=8)
    slot, k, v = filled(cache, 300, pages=20)
    tails = torch.randn(cache.num_layers, 4, 8, 4)
    masks = []
    for layer in range(cache.num_layers):
        mask = policy.after_prefill(layer, tails[layer], cache.view(slot, layer, 300), scale=SCALE)
        assert mask is not None
        masks.append(mask)
    cache.compact(slot, torch.stack(masks))
    cache.check()
    for layer, mask in enumerate(masks):
        view = cache.view(slot, layer, 300)
        keys, values = view.contiguous()
        for head in range(2):
            positions = mask[head].nonzero().flatten()
            assert view.positions[head].tolist() == positions.tolist()
            assert torch.equal(keys[head], k[layer, head, positions])
            assert torch.equal(values[head], v[layer, head, positions])
    assert cache.kept_tokens(slot) == 70 and cache.computed[slot] == 300
    decode(cache, [slot], torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4))
    assert cache.view(slot, 0, 301).positions[:, -1].tolist() == [300, 300]  # the true length, not the budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_window": 0}, "at least 1"),
        ({"budget": 32, "query_window": 32}, r"budget \(32\) must exceed query_window \(32\)"),
        ({"smoothing": 4}, r"smoothing \(4\) must be odd"),
        ({"smoothing": 0}, "must be odd"),
        ({"pooling": "sum"}, "'max' or 'avg'"),
    ],
)
def test_nonsense_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**options)


def test_promised_pages_cover_prefill_and_what_is_generated() -> None:
    policy = SnapKV(budget=128, query_window=8)
    policy.attach(make_model(layers=3, kv_heads=2), Path(), StateRegistry())
    assert policy.pages_needed(1000, 1100, 256) == 6 * 16  # prefill is the peak
    assert policy.pages_after_prefill(1000, 1100) == 6 * 4  # 128 kept + 100 generated
    assert policy.pages_needed(100, 1100, 256) == 6 * 18  # generation is the peak
    assert policy.pages_after_prefill(100, 1100) == 6 * 18


def test_keep_all_promises_everything_and_keeps_everything() -> None:
    policy = KeepAll()
    policy.attach(make_model(layers=3, kv_heads=2), Path(), StateRegistry())
    assert policy.pages_needed(1000, 1100, 256) == policy.pages_after_prefill(1000, 1100) == 6 * 18
    q, k = make_prompt(100)
    assert policy.after_prefill(0, q, view_of(k, k), scale=SCALE) is None
    assert policy.query_window == 0


def test_policies_are_found_by_the_name_a_plan_uses() -> None:
    assert KV_POLICIES["keep_all"] is KeepAll and KV_POLICIES["snapkv"] is SnapKV
