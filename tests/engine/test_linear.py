"""Linear layers over a few tokens: torch's answers, whoever else is in the batch."""

import pytest
import torch

from configs.native import compiler
from engine.linear import MOST_TOKENS, FewTokensLinear, linear, speed_up_decode
from tests.tiny import greedy, make_prompt, tiny_engine, tiny_model

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("outputs", [2, 3, 7, 96])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 16])
def test_it_gives_torchs_answer(tokens: int, outputs: int) -> None:
    x, weight, bias = torch.randn(tokens, 64), torch.randn(outputs, 64), torch.randn(outputs)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x, weight, b)
        torch.testing.assert_close(linear(x, weight, b), expected, atol=2e-5, rtol=1e-5)  # float32


def test_a_token_does_not_depend_on_its_batch_mates_to_the_last_bit() -> None:
    x, weight = torch.randn(11, 128), torch.randn(33, 128)
    together = linear(x, weight, None)
    for index in range(11):
        assert torch.equal(linear(x[index : index + 1], weight, None)[0], together[index])


def test_strided_inputs_and_leading_dimensions_are_kept() -> None:
    x, weight = torch.randn(2, 64, 3).transpose(1, 2), torch.randn(5, 64)
    torch.testing.assert_close(linear(x, weight, None), x @ weight.T, atol=2e-5, rtol=1e-5)


def test_only_layers_that_fit_are_changed_and_only_few_tokens_take_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = torch.nn.Sequential(
        torch.nn.Linear(64, 8), torch.nn.Linear(8, 4).bfloat16(), torch.nn.Linear(5, 4)
    )
    weights = {name: value.data_ptr() for name, value in layers.state_dict().items()}
    speed_up_decode(layers)
    assert [type(layer) for layer in layers] == [FewTokensLinear, torch.nn.Linear, torch.nn.Linear]
    assert weights == {name: value.data_ptr() for name, value in layers.state_dict().items()}
    seen = []
    monkeypatch.setattr("engine.linear.linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    with torch.inference_mode():
        for tokens in (0, 1, MOST_TOKENS, MOST_TOKENS + 1):
            assert layers[0](torch.randn(tokens, 64)).shape == (tokens, 8)
    assert seen == [1, MOST_TOKENS]


def test_a_model_answers_as_before() -> None:
    network = tiny_model()
    prompt = make_prompt(100)
    before = tiny_engine(network=network).answer(prompt, greedy(20))
    speed_up_decode(network)
    assert isinstance(network.lm_head, FewTokensLinear)
    assert tiny_engine(network=network).answer(prompt, greedy(20)) == before
