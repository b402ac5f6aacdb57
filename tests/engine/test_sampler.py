"""Sampling: exact probabilities, limits that hold, and noise that depends on the request alone."""

import pytest
import torch

from engine.messages import Sampling
from engine.sampler import SampledRow, TokenCounts, _adjust_row, gumbel_noise, logprobs_of, sample


def draw(logits: torch.Tensor, count: int, **options: float) -> torch.Tensor:
    """How often each token is drawn at `count` positions of one request."""
    options = {"max_tokens": 1, "seed": 3, **options}
    rows = [SampledRow(Sampling(**options), position) for position in range(count)]  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(sample(logits.expand(count, -1), rows)), minlength=logits.shape[-1])


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    counts = draw(logits, 20_000)
    expected = logits.softmax(-1) * 20_000
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 23.5  # 4 degrees of freedom, p = 1e-4


def test_temperature_sharpens_and_zero_is_greedy() -> None:
    logits = torch.tensor([1.0, 1.5, 0.0])
    assert draw(logits, 500, temperature=0.0).tolist() == [0, 500, 0]
    assert draw(logits, 2000, temperature=0.3)[1] > draw(logits, 2000, temperature=1.0)[1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    rows = [SampledRow(Sampling(max_tokens=1, temperature=temperature, seed=seed), 5) for seed in range(4)]
    assert sample(torch.tensor([[1.0, 3.0, 4.9999, 5.0]]).expand(4, -1), rows) == [3] * 4


def test_top_k_and_top_p_leave_only_what_they_allow() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    assert (draw(logits, 2000, top_k=2) > 0).tolist() == [True, True, False, False, False]
    # 0.5 + 0.2 = 0.7 is the smallest set with at least 0.6 of the mass
    assert (draw(logits, 2000, top_p=0.6) > 0).tolist() == [True, True, False, False, False]
    assert (draw(logits, 2000, top_p=1e-9) > 0).tolist() == [True, False, False, False, False]
    assert (draw(logits, 4000, top_k=4, top_p=0.95) > 0).tolist() == [True, True, True, True, False]
    assert draw(logits, 2000, top_k=100).min() > 0


def test_equal_logits_under_top_k_go_to_the_lower_ids() -> None:
    assert (draw(torch.zeros(6), 1000, top_k=3) > 0).tolist() == [True] * 3 + [False] * 3


def test_a_token_does_not_depend_on_its_batch_mates() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, 1000)
    rows = [SampledRow(Sampling(max_tokens=1, seed=seed, top_p=0.9), 5) for seed in range(8)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(8)]
    mixed = [SampledRow(Sampling(max_tokens=1, temperature=0.0), 5), *rows[1:]]
    assert sample(logits, mixed)[1:] == together[1:]


def test_seed_choice_and_position_each_change_the_noise() -> None:
    logits = torch.zeros(1, 50_000)
    sampling = Sampling(max_tokens=1, seed=1)
    draws = {
        sample(logits, [row])[0]
        for row in (
            SampledRow(sampling, 0),
            SampledRow(sampling, 1),
            SampledRow(sampling, 0, choice=1),
            SampledRow(Sampling(max_tokens=1, seed=2), 0),
            SampledRow(Sampling(max_tokens=1, seed=-2), 0),
        )
    }
    assert len(draws) == 5


def test_noise_is_finite_and_gumbel() -> None:
    noise = gumbel_noise(torch.tensor([0, -1, 2**62]), 100_000)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(1.6449, abs=0.03)  # pi^2 / 6


def greedy_row(**options: object) -> Sampling:
    return Sampling(max_tokens=9, temperature=0.0, **options)  # type: ignore[arg-type]


def test_min_p_leaves_what_is_likely_enough_beside_the_best() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    assert (draw(logits, 3000, min_p=0.25) > 0).tolist() == [True, True, True, False, False]
    assert draw(logits, 500, min_p=1.0).tolist() == [500, 0, 0, 0, 0]


def penalised(logits: list[float], tokens: list[int], prompt_length: int, **options: float) -> torch.Tensor:
    """What becomes of the logits after these tokens."""
    counts = TokenCounts(len(logits), torch.device("cpu"))
    counts.catch_up(tokens, prompt_length)
    row = SampledRow(greedy_row(**options), len(tokens), num_generated=len(tokens), counts=counts)
    adjusted = _adjust_row(torch.tensor(logits), row)
    assert adjusted is not None
    return adjusted


def test_repetition_counts_prompt_and_answer_and_the_others_the_answer_only() -> None:
    logits = [2.0, 2.0, -2.0, 1.0]
    tokens = [0, 0, 2, 1, 1, 1]  # a prompt of three, an answer of three
    assert penalised(logits, tokens, 3, repetition_penalty=2.0).tolist() == [1.0, 1.0, -4.0, 1.0]
    assert penalised(logits, tokens, 3, presence_penalty=0.5).tolist() == [2.0, 1.5, -2.0, 1.0]
    assert penalised(logits, tokens, 3, frequency_penalty=0.5).tolist() == [2.0, 0.5, -2.0, 1.0]
    together = penalised(
        logits, tokens, 3, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.5
    )
    assert together.tolist() == [1.0, -1.0, -4.0, 1.0]


def test_counts_are_the_same_however_the_tokens_arrived() -> None:
    tokens = [3, 1, 3, 2, 2, 0]
    once, slowly = (TokenCounts(5, torch.device("cpu")) for _ in range(2))
    once.catch_up(tokens, 3)
    for length in range(1, 7):
        slowly.catch_up(tokens[:length], 3)
        slowly.catch_up(tokens[:length], 3)
    assert once.in_prompt.tolist() == slowly.in_prompt.tolist() == [False, True, False, True, False]
    assert once.generated.tolist() == slowly.generated.tolist() == [1, 0, 2, 0, 0]


def test_a_bias_moves_a_token_and_a_mask_is_final() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert sample(logits, [SampledRow(greedy_row(logit_bias=((0, 4.0), (1, -0.5))), 1)]) == [0]
    assert sample(logits, [SampledRow(greedy_row(logit_bias=((1, -100.0),)), 1)]) == [2]
    allowed = torch.tensor([True, False, True])
    assert sample(logits, [SampledRow(greedy_row(logit_bias=((1, 100.0),)), 1, allowed=allowed)]) == [2]
    assert logits.tolist() == [[0.0, 3.0, 1.0]]  # logprobs are of the model's own


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    sampling = greedy_row(min_tokens=2, stop_token_ids=(1,))
    drawn = [sample(logits, [SampledRow(sampling, 5 + n, num_generated=n)])[0] for n in range(4)]
    assert drawn == [2, 2, 1, 1]


def test_what_a_mate_asks_for_changes_no_token() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 500, dtype=torch.bfloat16)
    counts = TokenCounts(500, torch.device("cpu"))
    counts.catch_up([1, 2, 3, 4, 4], 3)
    rows = [
        SampledRow(Sampling(max_tokens=9, seed=1), 5),
        SampledRow(Sampling(max_tokens=9, seed=2, min_p=0.3, logit_bias=((7, 5.0),)), 5),
        SampledRow(Sampling(max_tokens=9, seed=3, frequency_penalty=1.0), 5, counts=counts),
        SampledRow(greedy_row(), 5),
    ]
    assert sample(logits, rows) == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]


def test_logprobs_are_the_models_own_and_rank_the_token() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 40)
    expected = logits.log_softmax(-1)
    order = expected.argsort(-1, descending=True)
    tokens = [int(order[0, 0]), int(order[1, 4]), 7]
    found = logprobs_of(logits, tokens, [2, 0, 3])
    assert [one.rank for one in found[:2]] == [1, 5]
    assert [len(one.top) for one in found] == [2, 0, 3]
    for i, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-6)
        assert [token for token, _ in one.top] == order[i, : len(one.top)].tolist()
        values = [value for _, value in one.top]
        assert values == pytest.approx(expected[i, order[i, : len(values)]].tolist(), abs=1e-6)
