"""A rehearsal launches all that serving launches. In a process of its own: Triton's driver is replaced.

No kernel is compiled here: what is compared is what Triton would look for in its cache.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton
import yaml

from configs.loading import load_config, load_plan
from engine import prebuild
from engine.absent_gpu import pretend
from engine.kernels import triton_kernels
from engine.prebuild import rehearse, resolve_for, with_twins, without_attending
from tests.tiny import greedy, make_prompt, save_tiny, tiny_engine, tiny_gates, tiny_model

ARCHITECTURE = 90
GPU = pretend(ARCHITECTURE)
LENGTHS = (1, 63, 200, 600)

SNAPKV = {"policy": "snapkv", "budget": 128}
SERVED: dict[str, tuple[str, str, dict[str, Any]]] = {  # family, dtype of the cache, plan
    "minference-snapkv": (
        "llama",
        "auto",
        {"prefill": {"method": "minference", "chunk": 512, "vertical": 64, "slash": 64}, "kv": SNAPKV},
    ),
    "hip, quest": (
        "llama",
        "int8",
        {
            "prefill": {"method": "hip", "keep": [256, 256, 128]},
            "decode": {"method": "quest", "read": 128, "sink": 16, "window": 20},
        },
    ),
    "xattention of a family with windows": (
        "gemma2",
        "auto",
        {"prefill": {"method": "xattention", "delta": 64, "recall_floor": 0.9}},
    ),
    "gates, streaming": (
        "llama",
        "auto",
        {
            "prefill": {"method": "seerattention", "gates": "gates.safetensors", "last_rows_dense": 64},
            "kv": {"policy": "streaming", "sink": 64, "window": 256},
        },
    ),
}


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets of these plans are small: so may be what passes them."""
    monkeypatch.setattr(prebuild, "LONG", 700)


def launches_of(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Kernels by name, with all that Triton finds a compiled one by."""
    found = set()

    def hook(*, fn: Any, compile: dict[str, Any], **rest: object) -> bool:
        where = {name: str(compile[name]) for name in ("signature", "constants", "configs", "num_warps")}
        found.add((f"{fn.module}.{fn.name}", str(where)))
        return True  # do not compile

    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
        action()
    return found


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_was_rehearsed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, cache_dtype, parts = SERVED[name]
    tiny_gates(tmp_path)
    parts["prefill"]["dense_below"] = 150
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(parts))
    folder = save_tiny(tmp_path / "model", family)
    flags = {
        "engine.model": str(folder),
        "engine.dtype": "float32",
        "cache.dtype": cache_dtype,
        "plans": [str(tmp_path / "plan.yaml")],
    }
    config = load_config(None, flags)
    rehearsed = launches_of(
        lambda: rehearse(resolve_for(config, ARCHITECTURE), triton_kernels()), monkeypatch
    )

    def serve() -> None:
        tiny = tiny_engine(
            load_plan(tmp_path / "plan.yaml"),
            network=tiny_model(family),
            kernels=without_attending(with_twins(triton_kernels()), triton_kernels()),
            cache_dtype=cache_dtype,
            share_prefixes=True,
            max_num_batched_tokens=256,
        )
        for turn in range(2):  # the second finds the first one's pages
            for length in LENGTHS:
                tiny.submit(f"{turn} {length}", make_prompt(length), greedy(4))
            tiny.run()

    served = launches_of(serve, monkeypatch)
    assert len(served) >= 4 and served <= rehearsed, sorted(served - rehearsed)


def test_another_dtype_is_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)

    def launched(dtype: str) -> set[tuple[str, str]]:
        config = load_config(None, {"engine.model": str(folder), "engine.dtype": dtype, "plans": ["dense"]})
        return launches_of(lambda: rehearse(resolve_for(config, ARCHITECTURE), triton_kernels()), monkeypatch)

    one, other = launched("auto"), launched("float32")
    of_pages = {name for name, _ in one if "attend" in name or "store" in name}
    assert len(of_pages) >= 3
    assert not {key for key in one & other if key[0] in of_pages}
    assert launched("bfloat16") == one
