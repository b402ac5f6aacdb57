"""Flash-attn serves dense chunks only where it is here, right and faster. No GPU: the clock is made up."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.model import ModelInfo
from engine import dense_prefill
from engine.dense_prefill import with_flash
from engine.kernels import Kernels
from sparse.kernels.flash_dense import FlashDense
from tests.sparse.test_flash_dense import Flash

MODEL = ModelInfo("tiny", 2, 6, 2, 16, vocab_size=100, max_length=4096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """with_flash on this CPU, as if it were a GPU: of its device only the type is looked at."""
    check = dense_prefill.checked
    cpu = torch.device("cpu")
    monkeypatch.setattr(dense_prefill, "checked", lambda *given: check(*given[:3], cpu, *given[4:]))
    return SimpleNamespace(type="cuda")


def choose(monkeypatch: pytest.MonkeyPatch, gpu: Any, flash: Any, seconds: tuple[float, float]) -> Kernels:
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(dense_prefill, "_seconds", lambda *given: list(seconds))
    return with_flash(Kernels(), MODEL, torch.bfloat16, gpu)


def test_the_faster_one_serves(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    package = SimpleNamespace(flash_attn_func=Flash())
    assert isinstance(choose(monkeypatch, gpu, package, (2.0, 1.0)).attend, FlashDense)
    assert choose(monkeypatch, gpu, package, (1.0, 2.0)) == Kernels()


def test_one_that_is_wrong_or_absent_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    right = Flash()

    def wrong(*given: Any, **options: Any) -> Any:
        out, lse, probabilities = right(*given, **options)
        return out * 1.1, lse, probabilities

    assert choose(monkeypatch, gpu, SimpleNamespace(flash_attn_func=wrong), (2.0, 1.0)) == Kernels()
    assert "differs from torch" in caplog.text
    with caplog.at_level("INFO"):
        assert choose(monkeypatch, gpu, None, (2.0, 1.0)) == Kernels()
    assert "flash-attn cannot be imported" in caplog.text


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert with_flash(Kernels(), MODEL, torch.bfloat16, torch.device("cpu")) == Kernels()


@pytest.mark.gpu
def test_both_ways_are_timed() -> None:
    ours = Kernels().attend
    found = dense_prefill._seconds([ours, ours], MODEL, torch.bfloat16, torch.device("cuda"))
    assert len(found) == 2 and all(seconds > 0 for seconds in found)
