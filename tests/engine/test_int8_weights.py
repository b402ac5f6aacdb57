"""Weights in 8 bits on CPU: what codes mean, products with them, and models that answer from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.loading import load_config
from configs.native import compiler, load_library
from engine import attention
from engine.decode_layers import fuse_decode
from engine.layers import fuse_layers
from engine.linear import (
    CODES,
    GROUP,
    MOST_TOKENS,
    SOURCE,
    Int8Linear,
    Weights,
    gated_linear,
    linear,
    linear_many,
    speed_up_decode,
    weights_of,
)
from engine.startup import check_weights_dtype, load, resolve
from engine.weights import decoded, encoded, keep_in_int8
from tests.engine.test_bf16_models import PROMPT, heard
from tests.engine.test_decode_layers import switched
from tests.tiny import EAGER, greedy, make_prompt, save_tiny, tiny_engine, tiny_model

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

WHOLE_GROUPS = dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, head_dim=32)
FAMILIES = ["cohere2", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"]


@pytest.fixture(params=[None, 4, 8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as they are compiled here, and with vectors of other processors."""
    flags = [] if request.param is None else [f"-DFARSPAN_LANES={request.param}"]
    kernels = load_library(SOURCE, *flags)
    monkeypatch.setattr("engine.linear.library", lambda source: kernels)


def rotated(x: Tensor) -> Tensor:
    """Groups of x [N, I] times Sylvester's Hadamard matrix over its norm, summed up in the plainest way."""
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(GROUP)] for i in range(GROUP)])
    return (x.double().unflatten(1, (-1, GROUP)) @ signs.double() / 8).float().flatten(1)


def exact_tokens(count: int, inputs: int) -> Tensor:
    """Tokens [count, inputs] whose codes lose nothing: rotated numbers up to 127, which each group has."""
    x = torch.randint(-127, 128, (count, inputs)).float()
    x[:, ::GROUP] = 127
    return rotated(x / 64)


def test_codes_are_the_nearest_and_the_largest_of_a_rotated_group_is_exact() -> None:
    weight = torch.randn(6, 3 * GROUP) * torch.logspace(-3, 3, 3).repeat_interleave(GROUP)
    weight[4, GROUP : 2 * GROUP] = 0
    codes, scales = encoded(weight)
    assert codes.dtype == CODES and codes.shape == weight.shape and scales.shape == (6, 3)
    meant = decoded(codes, scales)
    assert torch.equal(meant[4, GROUP : 2 * GROUP], torch.zeros(GROUP))
    groups, of_codes = (rotated(x).unflatten(1, (3, GROUP)) for x in (weight, meant))
    assert ((of_codes - groups).abs() <= 0.5001 * scales.unsqueeze(-1)).all()
    largest = groups.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(of_codes.gather(2, largest), groups.gather(2, largest), rtol=1e-5, atol=0)
    for rows in (slice(2, 4), slice(0, 1), slice(1, 6)):  # to the last bit, whatever is decoded along
        assert torch.equal(decoded(codes[rows], scales[rows]), meant[rows])


@pytest.mark.usefixtures("lanes")
def test_an_outlier_takes_little_from_the_inputs_beside_it() -> None:
    x, weight = torch.randn(40, 4 * GROUP), torch.randn(30, 4 * GROUP)
    large = torch.randint(0, GROUP, (40, 4)) + GROUP * torch.arange(4)
    x.scatter_(1, large, 60.0)
    weight[:, large.flatten()] *= 1e-3  # the others decide
    expected = x @ weight.T
    # As they are, the outlier alone would set the scale of 64 inputs: its codes are 60 / 127 apart.
    unrotated = (x / (60 / 127)).round() * (60 / 127) @ weight.T
    codes, scales = encoded(weight)
    for multiply in (linear, linear_many):
        error = (multiply(x, codes, None, scales=scales) - expected).abs().mean()
        assert error < 0.5 * (unrotated - expected).abs().mean()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("inputs", [GROUP, 6 * GROUP, 7 * GROUP])  # of a block of linear_many.h: 6
@pytest.mark.parametrize("outputs", [2, 7, 48, 400])
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 48, 150])
def test_products_are_those_of_what_codes_mean(tokens: int, outputs: int, inputs: int) -> None:
    x, bias = exact_tokens(tokens, inputs), torch.randn(outputs)
    codes, scales = encoded(torch.randn(outputs, inputs))
    for b in (None, bias):
        expected = torch.nn.functional.linear(x, decoded(codes, scales), b)
        for multiply in (linear, linear_many):
            got = multiply(x, codes, b, scales=scales)
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-5)  # float32


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_gated_products_are_those_of_what_codes_mean(tokens: int) -> None:
    x = exact_tokens(tokens, 2 * GROUP) / 8
    (gate, gate_scales), (up, up_scales) = (encoded(torch.randn(10, 2 * GROUP)) for _ in range(2))
    expected = nn.functional.silu(x @ decoded(gate, gate_scales).T) * (x @ decoded(up, up_scales).T)
    got = gated_linear(x, gate, up, scales=(gate_scales, up_scales))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # float32
    assert weights_of(gate, up, in_bf16=False) == weights_of(gate, in_bf16=True) == Weights.INT8


@pytest.mark.usefixtures("lanes")
def test_tokens_lose_what_codes_cannot_hold_and_zeros_nothing() -> None:
    x = torch.randn(40, 3 * GROUP)
    x[7] = 0
    x[9, :GROUP] *= 1e4  # an outlier spoils its own group, not the others
    weight = torch.randn(30, 3 * GROUP)
    weight[:, :GROUP] *= 1e-4
    codes, scales = encoded(weight)
    expected = x @ decoded(codes, scales).T
    for multiply in (linear, linear_many):
        got = multiply(x, codes, None, scales=scales)
        assert torch.equal(got[7], torch.zeros(30))
        error = (got - expected).abs().mean(1) / expected.abs().mean(1).clamp_min(1e-9)
        assert (error[expected.any(1)] > 0).all() and error.max() < 0.012, error.max()


@pytest.mark.usefixtures("lanes")
def test_a_token_does_not_depend_on_its_batch_mates_to_the_last_bit() -> None:
    x, (codes, scales) = torch.randn(101, 5 * GROUP), encoded(torch.randn(70, 5 * GROUP))
    whole, threads = linear_many(x, codes, None, scales=scales), torch.get_num_threads()
    few = linear(x[:11], codes, None, scales=scales)
    torch.testing.assert_close(few, whole[:11], atol=1e-4, rtol=1e-5)  # sums in another order
    try:
        for cut in (1, 20, 48, 64, 100):
            torch.set_num_threads(1 + cut % 3)
            parts = [linear_many(part, codes, None, scales=scales) for part in (x[:cut], x[cut:])]
            assert torch.equal(torch.cat(parts), whole)
    finally:
        torch.set_num_threads(threads)
    for token in range(11):
        assert torch.equal(linear(x[token : token + 1], codes, None, scales=scales)[0], few[token])


def test_tied_weights_stay_one_and_what_does_not_fit_stays_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(12, GROUP)
            self.head = nn.Linear(GROUP, 12, bias=False)
            self.head.weight = self.embedding.weight
            self.narrow = nn.Linear(GROUP + 32, 4)  # no whole groups
            self.fitting = nn.Linear(2 * GROUP, 8)
            self.other = nn.Bilinear(2, 2, 2)  # another kind of owner
            self.other.shared = nn.Parameter(torch.randn(4, GROUP))

    net = Net()
    wide = net.embedding.weight.detach().clone()
    speed_up_decode(net)
    assert keep_in_int8(net) == 12 * GROUP + 8 * 2 * GROUP
    assert net.head.weight is net.embedding.weight and net.head.weight.dtype == CODES
    assert net.head.weight_scales is net.embedding.weight_scales
    assert isinstance(net.fitting, Int8Linear) and net.fitting.weight.dtype == CODES
    assert net.narrow.weight.dtype == net.other.shared.dtype == torch.float32
    with torch.inference_mode():
        found = net.embedding(torch.tensor([[3, 5]]))
        assert found.shape == (1, 2, GROUP) and found.dtype == torch.float32
        sums, expected = rotated(found[0]), rotated(wide[[3, 5]])
        torch.testing.assert_close(sums, expected, atol=expected.abs().max().item() / 250, rtol=0)
        assert net.head(found).shape == (1, 2, 12)
        assert net.fitting(torch.randn(0, 2 * GROUP)).shape == (0, 8)


def test_a_model_takes_a_quarter_and_answers_alike_alone_and_together() -> None:
    network = tiny_model(**WHOLE_GROUPS)
    whole = sum(parameter.nbytes for parameter in network.parameters())
    attention.register()
    network.set_attn_implementation(attention.IMPLEMENTATION)
    speed_up_decode(network)
    fuse_layers(network)
    keep_in_int8(network)
    fuse_decode(network)
    kept = sum(parameter.nbytes for parameter in network.parameters())
    assert kept < 0.28 * whole  # a byte, and 4 of 64 for scales; norms stay
    assert all(switched(network))
    # Few tokens are added up in another order than many, which rounds codes of later layers another way.
    prompts = [make_prompt(length, seed=length) for length in (MOST_TOKENS + 1, 33, 64, 70, 200)]
    tiny = tiny_engine(network=network)
    alone = [tiny.answer(prompt, greedy(12)) for prompt in prompts]
    assert len({token for answer in alone for token in answer}) > 5  # a model that has something to say
    for index, prompt in enumerate(prompts):
        tiny.submit(str(index), prompt, greedy(12))
    together = tiny.run()
    assert [together[str(index)] for index in range(len(prompts))] == alone


def served(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> tuple[Any, list[int], Tensor]:
    """The network, prompt and answer, and logprobs of all of them but the first."""
    flags = {"engine.dtype": dtype, "engine.weights_dtype": "int8"}
    network, answer, likely = heard(folder, monkeypatch, **flags)
    return network, [*PROMPT, *answer], torch.tensor(likely)


def by_huggingface(folder: Path, tokens: list[int], *, rounded: bool) -> Tensor:
    """Logprobs of all tokens but the first, in float32; rounded: from what codes of the weights mean."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("eager" if model.config.model_type in EAGER else "sdpa")
    if rounded:
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = decoded(*encoded(parameter.data))
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        found = model(ids).logits[0, :-1].log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_near_huggingface_from_the_same_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path, family, **WHOLE_GROUPS)
    network, tokens, likely = served(folder, monkeypatch, "float32")
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert linears and all(type(module) is Int8Linear for module in linears)
    exact, whole = (by_huggingface(folder, tokens, rounded=rounded) for rounded in (True, False))
    error, of_weights = ((likely - other).abs().mean() for other in (exact, whole))
    assert 0 < error < 0.12, error  # what tokens lose as codes: noise of a random model
    assert error < of_weights * 1.5, (error, of_weights)


def test_it_serves_bf16_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path, **WHOLE_GROUPS)
    network, tokens, likely = served(folder, monkeypatch, "bfloat16")
    assert network.lm_head.weight.dtype == network.model.embed_tokens.weight.dtype == CODES
    assert network.model.norm.weight.dtype == torch.float32
    assert (likely - by_huggingface(folder, tokens, rounded=False)).abs().mean() < 0.3  # a random model


@pytest.mark.parametrize(
    ("family", "dtype", "sizes", "says"),
    [
        ("qwen3_moe", "bfloat16", WHOLE_GROUPS, "other large weights.* use engine.dtype: float32"),
        ("llama", "float32", {"hidden_size": 96, "intermediate_size": 96}, "groups of 64 inputs"),
    ],
)
def test_models_that_it_would_not_help_are_refused(
    family: str, dtype: str, sizes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    flags = {"engine.model": str(save_tiny(tmp_path, family, **sizes)), "engine.dtype": dtype}
    flags |= {"engine.weights_dtype": "int8", "plans": ["dense"], "cache.kv_cache_memory_bytes": "16MiB"}
    with pytest.raises(ConfigError, match=f"engine.weights_dtype: int8 .*{says}"):
        load(resolve(load_config(None, flags)))


def test_devices_without_kernels_for_it_are_refused() -> None:
    for dtype in ("float32", "bfloat16"):
        check_weights_dtype("int8", dtype, "cpu")
        with pytest.raises(ConfigError, match=f"engine.weights_dtype: int8 is for a CPU .* {dtype} on cuda"):
            check_weights_dtype("int8", dtype, "cuda")
