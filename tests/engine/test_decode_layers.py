"""Decoder layers in two calls: HuggingFace's answers for each family that fits, whoever is in the batch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.native import compiler
from engine import attention
from engine.attention import Layer
from engine.decode_layers import fuse_decode
from engine.layers import fuse_layers
from engine.linear import MOST_TOKENS, speed_up_decode
from engine.weights import keep_in_bf16
from kvcache.kernels.cpu_step import WholeStep
from tests.tiny import greedy, hf_greedy, make_prompt, plan, tiny_engine, tiny_model

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

TAKEN = {"granite", "llama", "mistral", "qwen2", "qwen3", "smollm3"}
# Others norm, gate, rotate, add up or keep their weights in another way.
LEFT_ALONE = {
    "cohere2",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "olmo2",
    "phi3",
    "qwen3_moe",
    "starcoder2",
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("granite", {"residual_multiplier": 0.5}),
    ("llama", {"attention_bias": True}),  # qwen2 has biases anyway, all but one
    ("mistral", {"sliding_window": 50}),
]


def fused(network: Any, *, bf16: bool = False) -> Any:
    """As engine/startup.py does it."""
    attention.register()
    network.set_attn_implementation(attention.IMPLEMENTATION)
    speed_up_decode(network)
    fuse_layers(network)
    if bf16:
        keep_in_bf16(network)
    fuse_decode(network)
    return network


def switched(network: Any) -> list[bool]:
    """By layer: has it changed hands?"""
    layers = network.get_decoder().layers
    return [type(one).forward.__module__ == "engine.decode_layers" for one in layers]


def small(family: str, **overrides: Any) -> Any:
    """Heads wide enough for the vectors of every processor."""
    network = tiny_model(family, head_dim=32, **overrides)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros
            torch.manual_seed(len(name))
            parameter.data += 0.2 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((name, {}) for name in sorted(TAKEN)), *VARIANTS],
)
def test_a_model_answers_as_huggingface_alone_and_together(family: str, overrides: dict[str, Any]) -> None:
    network = small(family, **overrides)
    prompts = [make_prompt(length, seed=length) for length in (1, 5, 63, 70)]
    expected = [hf_greedy(network, prompt, 10) for prompt in prompts]
    assert len({token for answer in expected for token in answer}) > 5  # a model that has something to say
    assert all(switched(fused(network)))
    tiny = tiny_engine(network=network)
    assert tiny.answer(prompts[0], greedy(10)) == expected[0]
    for index, prompt in enumerate(prompts):
        tiny.submit(str(index), prompt, greedy(10))
    together = tiny.run()
    assert [together[str(index)] for index in range(len(prompts))] == expected


@pytest.mark.parametrize("family", sorted(LEFT_ALONE))
def test_layers_of_another_form_are_left_alone(family: str) -> None:
    assert not any(switched(fused(tiny_model(family))))


class Forward:
    """Stands for a forward: attention that depends on all it is given, token by token."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = (k.tanh() * v).repeat_interleave(q.shape[0] // k.shape[0], dim=0)
        return (q.sin() + layer.scale * mixed).transpose(0, 1).contiguous()

    def attend_by_token(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(layer, *(x.transpose(0, 1) for x in (q, k, v)))


def outputs(network: Any, x: Tensor) -> Tensor:
    """Of the second layer for x (1, T, W), whose tokens stand at 100, 101, ..."""
    angles = network.model.rotary_emb(x, torch.arange(100, 100 + x.shape[1])[None])
    with torch.inference_mode():
        return network.model.layers[1](x, position_embeddings=angles, batch=Forward(), attention_mask=None)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["granite", "qwen2", "qwen3"])
def test_a_layer_gives_its_own_answer_and_tokens_do_not_meet(family: str, bf16: bool) -> None:
    network = small(family, **dict(VARIANTS).get(family, {}))
    ours = fused(copy.deepcopy(network), bf16=bf16)
    assert all(switched(ours))
    if bf16:
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.bfloat16().float()
    attention.register()
    network.set_attn_implementation(attention.IMPLEMENTATION)
    many = torch.randn(1, MOST_TOKENS + 1, 96)
    for num_tokens in (1, 2, 3, 4, 5, MOST_TOKENS, MOST_TOKENS + 1):
        x = many[:, :num_tokens]
        got, expected = outputs(ours, x), outputs(network, x)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)  # float32
        if 1 < num_tokens <= MOST_TOKENS:
            assert torch.equal(got[:, :1], outputs(ours, x[:, :1]))


def test_what_computes_something_else_is_left_alone() -> None:
    network = small("llama")
    network.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-6
    theirs = type(network.model.layers[2]).forward

    class Louder(type(network.model.layers[2])):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return 1.01 * theirs(self, *arguments, **options)

    network.model.layers[2].__class__ = Louder
    assert switched(fused(network)) == [True, True, False]


def test_layers_can_still_be_sliced_and_counted() -> None:
    layers = fused(tiny_model()).model.layers
    assert layers[:3] is layers and len(layers) == 3
    assert list(layers[1:]) == [layers[1], layers[2]] and list(layers[:2]) == [layers[0], layers[1]]


def test_a_copy_and_a_forward_without_our_attention_run_huggingfaces_code() -> None:
    network = fused(tiny_model())
    copied = copy.deepcopy(network)
    for one in copied.model.layers:
        nn.init.zeros_(one.self_attn.o_proj.weight)
        nn.init.zeros_(one.mlp.down_proj.weight)
    x = torch.randn(1, 3, 96)
    assert torch.equal(outputs(copied, x), x)
    assert not torch.equal(outputs(network, x), x)
    assert hf_greedy(network, make_prompt(9), 4) == hf_greedy(tiny_model(), make_prompt(9), 4)


@pytest.mark.parametrize("method", ["full", "quest"])
def test_a_step_is_whole_where_all_is_read(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, prompt, attended = small("llama"), make_prompt(80), []
    expected = hf_greedy(network, prompt, 6)
    attend = WholeStep.attend
    monkeypatch.setattr(
        WholeStep, "attend", lambda step, *rest, **by: attended.append(rest[0]) or attend(step, *rest, **by)
    )
    tiny = tiny_engine(plan("mine", decode={"method": method}), network=fused(network))
    assert tiny.answer(prompt, greedy(6)) == expected  # quest reads more than this prompt
    assert attended == ([0, 1, 2] * 5 if method == "full" else [])
