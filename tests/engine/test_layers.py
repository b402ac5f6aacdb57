"""Norms, rotations and gated MLPs in C++: HuggingFace's answers, whoever else is in the batch."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from configs.native import compiler
from engine.layers import fuse_layers, rms_norm, rotate, silu_mul
from engine.linear import MOST_TOKENS, gated_linear, speed_up_decode
from tests.tiny import greedy, hf_greedy, make_prompt, tiny_engine
from tests.tiny import tiny_model as narrow_model

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

# What is taken over: norms, MLPs, rotations. Gemma adds 1 to its weights and takes gelu; Cohere 2 and GLM-4
# pair neighbouring dims, gpt-oss stores angles once; StarCoder2, Phi-3 and experts have MLPs of other forms.
TAKEN = {
    "cohere2": (False, True, False),
    "gemma2": (False, False, True),
    "glm4": (True, False, False),
    "gpt_oss": (True, False, False),
    "granite": (True, True, True),
    "llama": (True, True, True),
    "olmo2": (True, True, True),
    "phi3": (True, False, True),
    "qwen3": (True, True, True),
    "smollm3": (True, True, True),
    "starcoder2": (False, False, True),
}


def tiny_model(family: str = "llama") -> Any:
    """Heads wide enough for the vectors of every processor."""
    return narrow_model(family, head_dim=32)


def taken(network: Any) -> tuple[bool, bool, bool]:
    """Which of norms, MLPs and rotations have changed hands."""
    bases = [base.__name__ for module in network.modules() for base in type(module).__mro__[1:3]]
    rotations = any(
        getattr(type(module).forward, "__globals__", {}).get("apply_rotary_pos_emb") is rotate
        for module in network.modules()
    )
    return "Norm" in bases, "GatedMLP" in bases, rotations


@pytest.mark.parametrize("family", sorted(TAKEN))
def test_a_model_answers_as_before(family: str) -> None:
    network = tiny_model(family)
    prompts = [make_prompt(length, seed=length) for length in (1, 70)]  # few tokens, and many
    expected = [hf_greedy(network, prompt, 12) for prompt in prompts]
    weights = {name: value.data_ptr() for name, value in network.state_dict().items()}
    speed_up_decode(network)
    fuse_layers(network)
    assert taken(network) == TAKEN[family]
    assert weights == {name: value.data_ptr() for name, value in network.state_dict().items()}
    tiny = tiny_engine(network=network)
    assert [tiny.answer(prompt, greedy(12)) for prompt in prompts] == expected


def test_other_models_of_the_process_keep_their_own_code() -> None:
    fused, other = tiny_model(), tiny_model()
    theirs = sys.modules[type(other).__module__].apply_rotary_pos_emb
    fuse_layers(fused)
    assert sys.modules[type(other).__module__].apply_rotary_pos_emb is theirs
    assert taken(fused) == (True, True, True) and taken(other) == (False, False, False)


class ShiftedRMSNorm(nn.Module):
    """Looks like the norm of most families, and is another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


def test_what_computes_something_else_is_left_alone() -> None:
    network = tiny_model()
    network.model.norm = ShiftedRMSNorm().requires_grad_(False)
    network.model.layers[0].mlp.act_fn = nn.GELU()
    fuse_layers(network)
    assert type(network.model.norm) is ShiftedRMSNorm
    assert taken(network) == (True, False, True)


def test_a_model_in_bfloat16_is_left_alone() -> None:
    network = tiny_model().bfloat16()
    fuse_layers(network)
    assert taken(network) == (False, False, False)


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_norms_equal_their_formula_and_rows_do_not_meet(rows: int) -> None:
    x, weight = 30 * torch.randn(rows, 96), torch.randn(96)
    x[-1] = 0
    got = rms_norm(x, weight, 1e-5)
    wide = x.double()
    expected = weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)  # float32
    assert torch.equal(got[:1], rms_norm(x[:1], weight, 1e-5))
    assert torch.equal(got, rms_norm(x.T.contiguous().T, weight, 1e-5))


def test_gates_equal_silu_even_where_exp_overflows() -> None:
    gate, up = 5 * torch.randn(600, 64), torch.randn(600, 64)
    gate[0, :8] = torch.tensor([-1e4, -200.0, -88.0, -1e-30, 0.0, 88.0, 200.0, 1e4])
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(silu_mul(gate.clone(), up), expected, atol=1e-6, rtol=1e-5)  # float32


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, MOST_TOKENS])
def test_gated_products_are_those_of_two_layers(tokens: int) -> None:
    x, gate, weight = torch.randn(tokens, 64), torch.randn(33, 64), torch.randn(33, 64)
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ weight.T)
    got = gated_linear(x, gate, weight)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)  # float32
    assert torch.equal(got[:1], gated_linear(x[:1], gate, weight))


@pytest.mark.parametrize("rotary", [32, 96, 128])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_rotations_turn_the_first_dims_of_strided_queries(tokens: int, rotary: int) -> None:
    q, k = (torch.randn(1, tokens, heads, 128).transpose(1, 2) for heads in (6, 2))
    angles = torch.randn(1, tokens, rotary // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    for x, got in zip((q, k), rotate(q, k, cos, sin), strict=True):
        turned, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), dim=-1)
        expected = torch.cat((turned * cos[:, None] + half * sin[:, None], rest), dim=-1)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)  # float32
