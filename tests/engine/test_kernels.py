"""The choice of kernels: compiled where a compiler is, torch where not, and the same answers from both."""

import pytest
import torch

import kvcache.decode
import kvcache.kernels.cpu
import sparse.attention
import sparse.kernels.cpu
from configs.native import compiler
from engine.kernels import Kernels, kernels_for
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

PARTS = {
    "prefill": {"method": "minference", "chunk": 128, "vertical": 40, "slash": 100},
    "kv": {"policy": "snapkv", "budget": 100},
}


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_cpu_with_a_compiler_runs_compiled_attention() -> None:
    chosen = kernels_for(torch.device("cpu"))
    assert chosen.attend is sparse.kernels.cpu.attend
    assert chosen.attend_rows is kvcache.kernels.cpu.attend_rows


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse.kernels.cpu, "is_available", lambda: False)
    monkeypatch.setattr(kvcache.kernels.cpu, "is_available", lambda: False)
    assert kernels_for(torch.device("cpu")) == Kernels()
    assert Kernels().attend is sparse.attention.attend
    assert Kernels().attend_rows is kvcache.decode.attend_rows


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["dense", "sparse and compressed"])
def test_compiled_and_torch_attention_give_the_same_tokens(parts: dict[str, dict[str, object]]) -> None:
    network = tiny_model()
    prompt = make_prompt(500)
    answers = [
        tiny_engine(plan("mine", **parts), network=network, kernels=kernels).answer(prompt, greedy(16))
        for kernels in (Kernels(), kernels_for(torch.device("cpu")))
    ]
    assert answers[0] == answers[1]
