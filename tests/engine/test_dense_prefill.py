"""Others serve dense chunks only where they are here, right and faster. No GPU: the clock is made up."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.model import ModelInfo
from engine import dense_prefill
from engine.dense_prefill import with_fastest_dense
from engine.kernels import Kernels
from sparse.kernels.cudnn_dense import CudnnDense
from sparse.kernels.flash_dense import FlashDense
from tests.sparse.test_cudnn_dense import Cudnn
from tests.sparse.test_flash_dense import Flash

MODEL = ModelInfo("tiny", 2, 6, 2, 16, vocab_size=100, max_length=4096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This CPU, as if it were a GPU with both libraries: of its device only the type is looked at."""
    check, draw, cpu = dense_prefill.checked, dense_prefill._draw, torch.device("cpu")
    monkeypatch.setattr(dense_prefill, "checked", lambda *given: check(*given[:3], cpu, *given[4:]))
    monkeypatch.setattr(dense_prefill, "_draw", lambda *given: draw(*given[:2], cpu))
    monkeypatch.setattr(dense_prefill, "LENGTH", 512)
    monkeypatch.setattr(dense_prefill, "CHUNK", 128)
    monkeypatch.setattr(dense_prefill, "CudnnDense", lambda cudnn, other: CudnnDense(cudnn, other, least=128))
    monkeypatch.setattr(dense_prefill, "cudnn_attention", Cudnn())
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=Flash()))
    return SimpleNamespace(type="cuda")


def choose(monkeypatch: pytest.MonkeyPatch, gpu: Any, *seconds: float) -> Kernels:
    """seconds: of ours, flash-attn and cuDNN, as far as they get so far."""

    def timed(ways: list[Any], trial: Any) -> list[float]:
        assert len(ways) == len(seconds), ways
        return list(seconds)

    monkeypatch.setattr(dense_prefill, "_seconds", timed)
    return with_fastest_dense(Kernels(), MODEL, torch.bfloat16, gpu)


def test_the_fastest_one_serves(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert isinstance(choose(monkeypatch, gpu, 0.003, 0.001, 0.002).attend, FlashDense)
    assert "128 tokens at 384: ours 3.00 ms, flash-attn 1.00 ms, cuDNN 2.00 ms" in caplog.text
    assert isinstance(choose(monkeypatch, gpu, 3.0, 2.0, 1.0).attend, CudnnDense)
    assert choose(monkeypatch, gpu, 1.0, 2.0, 3.0) == Kernels()


def test_one_that_is_wrong_or_absent_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flash, cudnn = Flash(), Cudnn()

    def wrong(*given: Any, **options: Any) -> Any:
        out, *rest = flash(*given, **options)
        return out * 1.1, *rest

    def in_base_two(*given: Any) -> Any:
        out, lse = cudnn(*given)
        return out, lse * 1.4427

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=wrong))
    monkeypatch.setattr(dense_prefill, "cudnn_attention", in_base_two)
    assert choose(monkeypatch, gpu) == Kernels()
    assert "flash-attn is not used: it differs from ours" in caplog.text
    assert "cuDNN is not used: it differs from ours" in caplog.text
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with caplog.at_level("INFO"):
        assert choose(monkeypatch, gpu) == Kernels()
    assert "flash-attn cannot be used" in caplog.text and "cuDNN cannot be used" in caplog.text


def test_one_that_fails_leaves_the_other(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("no valid execution plans built\nof many")

    monkeypatch.setattr(dense_prefill, "cudnn_attention", fails)
    assert isinstance(choose(monkeypatch, gpu, 2.0, 1.0).attend, FlashDense)
    assert "cuDNN is not used: RuntimeError: no valid execution plans built" in caplog.text


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert with_fastest_dense(Kernels(), MODEL, torch.bfloat16, torch.device("cpu")) == Kernels()


@pytest.mark.gpu
def test_all_ways_are_timed() -> None:
    ours = Kernels().attend
    trial = dense_prefill._draw(MODEL, torch.bfloat16, torch.device("cuda"))
    found = dense_prefill._seconds([ours, ours], trial)
    assert len(found) == 2 and all(seconds > 0 for seconds in found)
