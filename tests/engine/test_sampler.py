"""Sampling: exact probabilities, limits that hold, and noise that depends on the request alone."""

import pytest
import torch

from engine.messages import Sampling
from engine.sampler import SampledRow, gumbel_noise, sample


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
