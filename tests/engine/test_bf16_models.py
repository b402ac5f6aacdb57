"""bf16 models on CPU: their weights as they are, float32 around them, keys and values in bf16."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from configs.bf16_products import Bf16Products, bf16_products
from configs.loading import load_config
from configs.native import compiler
from engine import startup
from engine.linear import Bf16Linear
from engine.messages import Submit
from engine.startup import load, resolve
from engine.weights import compute_in_float32
from tests.tiny import EAGER, greedy, make_prompt, save_tiny, tiny_model

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

PROMPT = make_prompt(150, seed=3)
ANSWER = 12  # tokens
TAKEN = [
    "cohere2",
    "glm4",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
]
IN_TWO_CALLS = {
    "granite",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
}  # decoder layers over a few tokens
# Experts, or an embedding of another class.
LEFT_ALONE = ["gemma3_text", "gpt_oss", "qwen3_moe"]


def dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in network.state_dict().items()}


def heard(folder: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> tuple[Any, list[int], list[float]]:
    """The network of an engine, in bf16 if flags say nothing, its answer, and how likely it finds all."""
    networks: list[Any] = []
    monkeypatch.setattr(startup, "load_model", _kept(startup.load_model, networks))
    asked = {"engine.model": str(folder), "engine.dtype": "bfloat16", "engine.threads": 1, "plans": ["dense"]}
    asked |= {"cache.kv_cache_memory_bytes": "64MiB"} | flags
    engine, card = load(resolve(load_config(None, asked)))
    assert (card.dtype, card.device) == (asked["engine.dtype"], "cpu")
    sampling = greedy(ANSWER, logprobs=1, prompt_logprobs=1)
    engine.submit(Submit("one", PROMPT, len(PROMPT), "dense", sampling))
    tokens: list[int] = []
    likely: list[float] = []
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None, output.error
            tokens += output.tokens
            likely += [one.logprob for one in (*output.prompt_logprobs, *output.logprobs)]
    return networks[-1], tokens, likely


def _kept(load_model: Any, networks: list[Any]) -> Any:
    def loading(*arguments: Any, **options: Any) -> Any:
        networks.append(load_model(*arguments, **options))
        return networks[-1]

    return loading


def by_huggingface(folder: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Logprobs of all tokens but the first, of the model's weights rounded to bf16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(dtype)
    model.set_attn_implementation("eager" if model.config.model_type in EAGER else "sdpa")
    ids = torch.tensor([[*PROMPT, *tokens]])
    with torch.inference_mode():
        found = model(ids).logits[0, :-1].float().log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("family", TAKEN)
def test_it_is_nearer_to_what_its_weights_mean_than_bf16_throughout(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path, family, head_dim=32)
    network, tokens, likely = heard(folder, monkeypatch)
    kinds = {name: dtype for name, dtype in dtypes(network).items() if "weight" in name}
    for name, dtype in kinds.items():
        assert dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    for layer in network.model.layers:
        assert (type(layer).forward.__module__ == "engine.decode_layers") == (family in IN_TWO_CALLS)
    exact, coarse = (by_huggingface(folder, tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours = torch.tensor(likely)
    assert ours.shape == exact.shape == (len(PROMPT) + ANSWER - 1,)
    parts = {"prompt": slice(0, len(PROMPT) - 1), "answer": slice(len(PROMPT) - 1, None)}
    for name, part in parts.items():
        error, theirs = ((one[part] - exact[part]).abs().mean() for one in (ours, coarse))
        assert 0 < error < theirs, (name, error, theirs)


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_where_large_weights_are_something_else_all_is_bf16(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path, family)
    network, tokens, likely = heard(folder, monkeypatch)
    assert set(dtypes(network).values()) == {torch.bfloat16}
    exact = by_huggingface(folder, tokens, torch.float32)
    assert (torch.tensor(likely) - exact).abs().mean() < 0.3  # bf16


def test_a_model_whose_weights_do_not_fit_is_not_changed() -> None:
    network = tiny_model().bfloat16()
    network.lm_head = nn.Linear(96, 256, bias=False).to(torch.bfloat16)
    network.model.layers[1].mlp.down_proj = nn.Linear(7, 96, dtype=torch.bfloat16)
    before = copy.deepcopy(network)
    assert not compute_in_float32(network)
    assert dtypes(network) == dtypes(before)
    assert not any(isinstance(module, Bf16Linear) for module in network.modules())


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_quantised_pages_serve_it_too(
    cache_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path, head_dim=32)
    _, tokens, likely = heard(folder, monkeypatch, **{"cache.dtype": cache_dtype})
    exact = by_huggingface(folder, tokens, torch.float32)
    assert (torch.tensor(likely) - exact).abs().mean() < 0.3  # codes of 8 bits


def test_the_default_dtype_is_what_the_processor_multiplies(tmp_path: Path) -> None:
    flags = {"engine.model": str(save_tiny(tmp_path)), "engine.device": "cpu", "plans": ["dense"]}
    expected = "float32" if bf16_products() == Bf16Products.WIDENED else "bfloat16"
    assert resolve(load_config(None, flags)).dtype == expected
