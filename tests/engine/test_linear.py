"""Linear layers on CPU: torch's answers, whoever else is in the batch, float32 or bf16 weights."""

import copy

import pytest
import torch

from configs.bf16_products import Bf16Products
from configs.errors import ConfigError
from configs.native import compiler, load_library
from engine.layers import fuse_layers
from engine.linear import (
    MOST_TOKENS,
    SOURCE,
    CpuLinear,
    Weights,
    gated_linear,
    linear,
    linear_many,
    speed_up_decode,
    weights_of,
)
from engine.startup import check_weights_dtype
from engine.weights import keep_in_bf16
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


@pytest.fixture(params=[None, 4, 16])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens go through linear.cpp, as it is compiled here, and for processors with other vectors."""
    flags = [] if request.param is None else [f"-DFARSPAN_LANES={request.param}"]
    kernels = load_library(SOURCE, *flags)
    monkeypatch.setattr("engine.linear.library", lambda source: kernels)
    monkeypatch.setattr("engine.linear.MANY_WITH_LANES", (kernels.farspan_lanes(),))


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("inputs", [16, 288, 304, 592])  # parts of a block, whole ones, and one more
@pytest.mark.parametrize("tokens", [1, 7, 8, 17, 24, 47, 48, 49, 150])
@pytest.mark.parametrize("outputs", [2, 7, 48, 400])
def test_many_tokens_get_torchs_answer(tokens: int, inputs: int, outputs: int) -> None:
    x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x, weight, b)
        torch.testing.assert_close(linear_many(x, weight, b), expected, atol=1e-4, rtol=1e-5)  # float32
    half = weight.bfloat16()
    assert torch.equal(linear_many(x, half, bias), linear_many(x, half.float(), bias))


@pytest.mark.usefixtures("many")
def test_a_chunk_may_be_cut_anywhere_and_shared_by_any_threads_to_the_last_bit() -> None:
    x, weight = torch.randn(101, 320), torch.randn(70, 320)
    whole, threads = linear_many(x, weight, None), torch.get_num_threads()
    try:
        for cut in (1, 20, 48, 64, 100):
            torch.set_num_threads(1 + cut % 3)
            parts = [linear_many(part, weight, None) for part in (x[:cut], x[cut:])]
            assert torch.equal(torch.cat(parts), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(params=[None, 8, 16])
def in_pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is multiplied in pairs: by this processor's instruction, or spelled out."""
    flags = [] if request.param is None else [f"-DFARSPAN_LANES={request.param}"]
    kernels = load_library(SOURCE, *flags)
    monkeypatch.setattr("engine.linear.library", lambda source: kernels)
    monkeypatch.setattr("engine.linear.bf16_products", lambda: Bf16Products.BY_PAIRS)


@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("inputs", [16, 32, 304, 576])  # odd vectors are widened, and then nothing is rounded
@pytest.mark.parametrize("outputs", [2, 7, 96])
def test_few_tokens_are_multiplied_in_bf16_whoever_comes_along(inputs: int, outputs: int) -> None:
    x, bias = torch.randn(7, inputs), torch.randn(outputs)
    weight, gate = (torch.randn(outputs, inputs).bfloat16() for _ in range(2))
    kind = weights_of(weight, gate, in_bf16=True)
    meant = x.bfloat16().float() if kind == Weights.BF16_MULTIPLIED else x
    for b in (None, bias):
        got = linear(x, weight, b, in_bf16=True)
        expected = torch.nn.functional.linear(meant, weight.float(), b)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)  # float32
        for token in range(7):
            assert torch.equal(linear(x[token : token + 1], weight, b, in_bf16=True)[0], got[token])
    got = gated_linear(x, gate, weight, in_bf16=True)
    expected = torch.nn.functional.silu(meant @ gate.float().T) * (meant @ weight.float().T)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)  # float32
    assert weights_of(weight, in_bf16=False) == Weights.BF16_WIDENED
    assert weights_of(weight.float(), in_bf16=True) == Weights.FLOAT32


@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("inputs", [16, 288, 304, 592])
@pytest.mark.parametrize("tokens", [1, 17, 48, 49, 150])
@pytest.mark.parametrize("outputs", [2, 7, 48, 400])
def test_products_of_bf16_are_summed_in_float32(tokens: int, inputs: int, outputs: int) -> None:
    x, weight, bias = (
        torch.randn(tokens, inputs),
        torch.randn(outputs, inputs).bfloat16(),
        torch.randn(outputs),
    )
    for b in (None, bias):
        expected = torch.nn.functional.linear(x.bfloat16().float(), weight.float(), b)
        got = linear_many(x, weight, b, in_bf16=True)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-5)  # float32
    assert torch.equal(
        linear_many(x, weight.float(), None, in_bf16=True), linear_many(x, weight.float(), None)
    )
    whole = linear_many(x, weight, None, in_bf16=True)
    cut = tokens // 3
    parts = [linear_many(part, weight, None, in_bf16=True) for part in (x[:cut], x[cut:]) if len(part)]
    assert torch.equal(torch.cat(parts), whole)


def test_tiles_of_bf16_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.linear.bf16_products", lambda: Bf16Products.BY_TILES)
    x, weight, bias = torch.randn(40, 64), torch.randn(30, 64).bfloat16(), torch.randn(30)
    got = linear_many(x, weight, bias, in_bf16=True)
    assert got.dtype == torch.float32
    expected = torch.nn.functional.linear(x, weight.float(), bias)
    torch.testing.assert_close(got, expected, atol=0.3, rtol=2e-2)  # bf16


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
    assert [type(layer) for layer in layers] == [CpuLinear, torch.nn.Linear, torch.nn.Linear]
    assert weights == {name: value.data_ptr() for name, value in layers.state_dict().items()}
    seen: list[int] = []
    monkeypatch.setattr(
        "engine.linear.linear", lambda x, *rest, **options: seen.append(len(x)) or linear(x, *rest, **options)
    )
    many: list[int] = []
    monkeypatch.setattr(
        "engine.linear.linear_many",
        lambda x, *rest, **options: many.append(len(x)) or linear_many(x, *rest, **options),
    )
    with torch.inference_mode():
        for tokens in (0, 1, MOST_TOKENS, MOST_TOKENS + 1):
            assert layers[0](torch.randn(tokens, 64)).shape == (tokens, 8)
    assert seen == [1, MOST_TOKENS] and many == [MOST_TOKENS + 1]


def test_a_model_answers_as_before() -> None:
    network = tiny_model()
    prompt = make_prompt(100)
    before = tiny_engine(network=network).answer(prompt, greedy(20))
    speed_up_decode(network)
    assert isinstance(network.lm_head, CpuLinear)
    assert tiny_engine(network=network).answer(prompt, greedy(20)) == before


@pytest.mark.parametrize("outputs", [2, 7])
@pytest.mark.parametrize("tokens", [1, 3, 4, 6])
def test_bf16_weights_count_as_what_they_widen_to(tokens: int, outputs: int) -> None:
    x, weight, gate = torch.randn(tokens, 64), torch.randn(outputs, 64), torch.randn(outputs, 64)
    weight, gate = weight.bfloat16(), gate.bfloat16()
    assert torch.equal(linear(x, weight, None), linear(x, weight.float(), None))
    assert torch.equal(gated_linear(x, gate, weight), gated_linear(x, gate.float(), weight.float()))


def test_a_model_kept_in_bf16_answers_as_huggingface_does_from_the_rounded_weights() -> None:
    kept = tiny_model()
    rounded = copy.deepcopy(kept)
    for parameter in rounded.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16().float()
    before = sum(parameter.numel() for parameter in kept.parameters()) * 4
    speed_up_decode(kept)
    fuse_layers(kept)
    keep_in_bf16(kept)
    after = sum(parameter.numel() * parameter.element_size() for parameter in kept.parameters())
    assert after < 0.51 * before  # norms stay
    prompts = [make_prompt(MOST_TOKENS + 60, seed=1), make_prompt(MOST_TOKENS - 6, seed=2)]
    for prompt in prompts:  # a chunk of many tokens and one of few; then steps of one
        expected = tiny_engine(network=rounded).answer(prompt, greedy(20))
        assert tiny_engine(network=kept).answer(prompt, greedy(20)) == expected


def test_tied_weights_stay_one_and_what_does_not_fit_stays_whole() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(12, 64)
            self.head = torch.nn.Linear(64, 12, bias=False)
            self.head.weight = self.embedding.weight
            self.narrow = torch.nn.Linear(5, 4)
            self.fitting = torch.nn.Linear(64, 8)
            self.other = torch.nn.Bilinear(2, 2, 2)  # another kind of owner
            self.other.shared = self.fitting.weight

    net = Net()
    speed_up_decode(net)
    keep_in_bf16(net)
    assert net.head.weight is net.embedding.weight and net.head.weight.dtype == torch.bfloat16
    assert net.narrow.weight.dtype == net.fitting.weight.dtype == torch.float32
    with torch.inference_mode():
        assert net.head(net.embedding(torch.tensor([3, 5]))).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "cpu"), ("float16", "cuda"), ("float32", "cuda")])
def test_weights_of_another_dtype_are_refused_where_nothing_widens_them(dtype: str, device: str) -> None:
    check_weights_dtype("auto", dtype, device)
    with pytest.raises(ConfigError, match=f"engine.weights_dtype: .* here is {dtype} on {device}"):
        check_weights_dtype("bfloat16", dtype, device)
