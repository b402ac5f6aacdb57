"""Resolving a configuration, sizing the cache, and the refusals that need no process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.loading import load_config
from configs.native import compiler
from configs.schema import ServeConfig
from engine import startup
from engine.attention_timing import AttentionTimer, Times
from engine.kernels import Kernels
from engine.linear import CpuLinear
from engine.models import end_tokens, prepare_model
from engine.self_check import TRIALS
from engine.startup import host_sizes, load, resolve
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(folder: Path, **flags: Any) -> ServeConfig:
    base = {
        "engine.model": str(folder),
        "engine.threads": 1,
        "engine.dtype": "float32",
        "cache.kv_cache_memory_bytes": "8MiB",
        "plans": ["dense"],
    }
    return load_config(None, {**base, **flags})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"engine.max_model_len": 100_000}, "engine.max_model_len: 100000 is more than the 8192 tokens"),
        ({"engine.model": "./no-such-folder"}, "not a folder"),
        ({"engine.model": "missing.gguf"}, "missing.gguf: no such file"),
        ({"plans": ["dense", "dense"]}, "two plans"),
        ({"plans": []}, "at least one plan"),
        ({"plans": ["denze"]}, "did you mean 'dense'"),
        ({"engine.dtype": "float16", "engine.device": "cpu"}, "engine.dtype: float16"),
        ({"engine.cuda_graphs": "on", "engine.device": "cpu"}, "engine.cuda_graphs: on needs a CUDA device"),
    ],
)
def test_what_cannot_be_served_is_refused_before_weights_load(
    folder: Path, flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(config(folder, **flags))
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", TRIALS)
def test_a_server_starts_without_a_kernel_that_fails_here(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(startup, "kernels_for", lambda *asked: Kernels().with_kernel(name, broken))
    load(resolve(config(folder, plans=["minference-snapkv"])))  # warms up with a request of its own
    assert f"kernel {name} is not used on cpu" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match="engine.device"):
        resolve(config(folder, **{"engine.device": "cuda"}))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_needed_file_is_refused(tmp_path: Path, missing: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=missing.removeprefix("model.")):
        prepare_model(config(tmp_path).engine)


def test_the_context_is_what_the_cache_can_hold(folder: Path) -> None:
    """Pages of 64 tokens x 16 dims x 2 x 4 bytes = 8 KiB; 6 rows: 4 MiB hold 85 blocks of every row."""
    engine, card = load(resolve(config(folder, **{"cache.kv_cache_memory_bytes": "4MiB"})))
    assert (card.num_pages, card.page_bytes) == (512, 8192)
    assert card.max_model_len == 85 * 64
    assert engine.stats().pages_free == card.num_pages


def test_quantised_pages_hold_more_in_the_same_memory(folder: Path) -> None:
    """Pages of 64 tokens x 2 x (16 bytes and a scale of 4) = 2.5 KiB, where full ones take 8."""
    flags = {"cache.kv_cache_memory_bytes": "4MiB", "cache.dtype": "int8"}
    resolution = resolve(config(folder, **flags))
    assert resolution.bytes_per_token == 6 * 2 * (16 + 4)
    _, card = load(resolution)
    assert (card.num_pages, card.page_bytes, card.cache_dtype) == (1638, 2560, "int8")


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_weights_are_kept_in_the_dtype_that_was_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load_model = startup.load_model
    monkeypatch.setattr(
        startup,
        "load_model",
        lambda *args, **options: loaded.append(load_model(*args, **options)) or loaded[-1],
    )
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        load(resolve(config(folder, **{"engine.dtype": "float32", "engine.weights_dtype": asked})))
        linears = [module for module in loaded[-1].modules() if isinstance(module, CpuLinear)]
        assert {module.weight.dtype for module in linears} == {dtype}
    with pytest.raises(ConfigError, match="engine.weights_dtype: .* float32; here is bfloat16"):
        resolve(config(folder, **{"engine.dtype": "bfloat16", "engine.weights_dtype": "bfloat16"}))


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused_with_what_would(folder: Path) -> None:
    flags = {"cache.kv_cache_memory_bytes": "1MiB", "engine.max_model_len": 4096}
    with pytest.raises(ConfigError, match=r"4096 tokens do not fit the cache of 128 pages; 1344 would"):
        load(resolve(config(folder, **flags)))


def test_a_host_tier_has_the_size_that_was_asked_for(folder: Path) -> None:
    """Pages of 8 KiB; a column has 6."""
    for flags, pages, columns in (
        ({}, 0, 0),
        ({"cache.host_memory": "1MiB"}, 128, 10),
        ({"cache.host_memory": "1MiB", "cache.host_columns": 0}, 128, 0),
        ({"cache.host_memory": "1MiB", "cache.enable_prefix_caching": False}, 128, 0),
    ):
        assert host_sizes(resolve(config(folder, **flags))) == (pages, columns)
    with pytest.raises(ConfigError, match=r"cache.host_memory: 40000 bytes .* 49152; give it more"):
        host_sizes(resolve(config(folder, **{"cache.host_memory": 40_000})))


def test_a_break_even_is_measured_once_and_clients_see_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path))
    asked = []

    def compare(self: AttentionTimer, start: int, length: int, *, rounds: int = 3) -> Times:
        asked.append(start + length)
        return Times(1.0, 2.0 if start + length < 1024 else 0.1)

    monkeypatch.setattr(AttentionTimer, "compare", compare)
    (tmp_path / "auto.yaml").write_text("prefill: {method: minference, dense_below: auto}")
    flags = {"plans": [str(tmp_path / "auto.yaml"), "dense"]}
    resolution = resolve(config(folder, **flags))
    assert [plan.dense_below for plan in resolution.card.plans] == [None, 0]
    seen = []
    for _ in range(2):
        _, card = load(resolve(config(folder, **flags)))
        seen.append(card.plans[0].dense_below)
        asked.append(0)
    assert seen[0] == seen[1] and 512 < (seen[0] or 0) <= 1024
    assert asked.count(0) == 2 and asked[-2:] == [0, 0]  # the second start asked nothing


def test_end_tokens_come_from_the_generation_config(folder: Path, tmp_path: Path) -> None:
    assert end_tokens(folder) == ()
    save_tiny(tmp_path, eos_token_id=[5, 7])
    assert end_tokens(tmp_path) == (5, 7)


def test_code_of_a_model_folder_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    save_tiny(tmp_path)
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    text = (tmp_path / "config.json").read_text()
    auto_map = '{"auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},'
    (tmp_path / "config.json").write_text(text.replace("{", auto_map, 1))
    load(resolve(config(tmp_path)))
    assert not marker.exists()
