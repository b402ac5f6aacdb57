"""The choice of kernels: compiled where a compiler is, torch where not, and the same answers from both."""

import sys
from operator import attrgetter

import pytest
import torch

import kvcache.decode
import kvcache.kernels
import kvcache.kernels.cpu
import kvcache.kernels.cpu_quest
import kvcache.kernels.cpu_store
import kvcache.moves
import sparse.attention
import sparse.kernels.cpu
import sparse.kernels.cpu_estimator
from configs.native import compiler
from engine.kernels import Kernels, kernels_for
from engine.self_check import TRIALS
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model
from tests.triton_cases import run_cases

PARTS = {
    "prefill": {"method": "minference", "chunk": 128, "vertical": 40, "slash": 100},
    "kv": {"policy": "snapkv", "budget": 100},
}


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_cpu_with_a_compiler_runs_compiled_attention() -> None:
    chosen = kernels_for(torch.device("cpu"))
    assert chosen.attend is sparse.kernels.cpu.attend
    assert chosen.attend_rows is kvcache.kernels.cpu.attend_rows
    assert chosen.index.estimate is sparse.kernels.cpu_estimator.estimate
    assert chosen.best_units is kvcache.kernels.cpu_quest.best_units
    assert chosen.moves.store is kvcache.moves.store  # plain copies are torch's
    assert kernels_for(torch.device("cpu"), torch.int8).moves.store is kvcache.kernels.cpu_store.store


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse.kernels.cpu, "is_available", lambda: False)
    monkeypatch.setattr(sparse.kernels.cpu_estimator, "is_available", lambda: False)
    monkeypatch.setattr(kvcache.kernels.cpu, "is_available", lambda: False)
    monkeypatch.setattr(kvcache.kernels.cpu_store, "is_available", lambda: False)
    monkeypatch.setattr(kvcache.kernels.cpu_quest, "is_available", lambda: False)
    assert kernels_for(torch.device("cpu")) == kernels_for(torch.device("cpu"), torch.int8) == Kernels()
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


@pytest.mark.parametrize(
    "interpreted",
    [
        pytest.param(True, id="in the interpreter"),
        pytest.param(False, id="on the GPU", marks=pytest.mark.gpu),
    ],
)
def test_triton_and_torch_give_the_same_tokens(interpreted: bool) -> None:
    pytest.importorskip("triton")
    run_cases("tests/engine/triton_engine_cases.py", interpreted=interpreted)


def test_a_gpu_runs_triton_where_it_can_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    chosen = kernels_for(torch.device("cuda"))
    for name in set(TRIALS) - {"best_units"}:  # a choice is a few launches of torch's
        assert ".kernels.triton_" in attrgetter(name)(chosen).__module__, name
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "kvcache.kernels.triton_store", None)
    monkeypatch.delattr(kvcache.kernels, "triton_store")
    assert kernels_for(torch.device("cuda")) == Kernels()
    assert "Triton cannot be imported" in caplog.text
