"""What choosing holds at a million tokens, counted on tensors without values: a hundredth of the KV cache."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.model import PAGE_SIZE, ModelInfo
from engine.kernels import triton_kernels
from engine.rope import Rotation
from kvcache.state import StateRegistry
from sparse.base import Chunk, PrefillMethod
from sparse.flashprefill import FlashPrefill
from sparse.flexprefill import FlexPrefill
from sparse.gate_files import Gate
from sparse.hip import HiP
from sparse.index import Index
from sparse.mean_pool import MeanPool
from sparse.minference import MInference
from sparse.seerattention import SeerAttention
from sparse.xattention import XAttention
from tests.sparse.builders import PagedKeys

pytest.importorskip("triton")
from sparse.kernels import (
    triton_antidiagonals,
    triton_descent,
    triton_energy,
    triton_estimator,
    triton_lines,
    triton_means,
    triton_pooled,
)

KERNELS = (
    triton_antidiagonals,
    triton_descent,
    triton_energy,
    triton_estimator,
    triton_lines,
    triton_means,
    triton_pooled,
)
MILLION = 1 << 20
MODEL = ModelInfo("large", 32, 32, 8, 128, vocab_size=100, max_length=MILLION)
KV_BYTES = 2 * MODEL.num_layers * MODEL.num_kv_heads * MILLION * MODEL.head_dim * 2  # 2 bytes a number


class Held(TorchDispatchMode):
    """The most bytes that tensors made under it take at once. What an operation holds inside is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))
        return made


class NoLaunch:
    """In the place of a kernel, where there is nothing to compute on."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in KERNELS:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoLaunch())
    monkeypatch.setattr(triton_estimator, "num_processors", lambda device: 132)


def a_million_tokens(length: int) -> tuple[torch.Tensor, PagedKeys, Chunk]:
    """The last chunk of a prompt, in bf16: queries, keys, chunk."""
    dtype, meta = torch.bfloat16, torch.device("meta")
    num_pages = MODEL.num_kv_heads * MILLION // PAGE_SIZE
    pool = torch.empty(num_pages, PAGE_SIZE, MODEL.head_dim, dtype=dtype, device=meta)
    pages = torch.empty(MODEL.num_kv_heads, MILLION // PAGE_SIZE, dtype=torch.int32, device=meta)
    q = torch.empty(MODEL.num_query_heads, length, MODEL.head_dim, dtype=dtype, device=meta)
    return q, PagedKeys(MILLION, pool, pool, pages), Chunk(MILLION - length, length, MILLION, MILLION + 1, 0)


INDEXES = {
    "kernels": triton_kernels().index,
    "lists by torch": Index(triton_estimator.estimate),
}


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.9, "vertical": 4096, "slash": 1024}])
def test_columns_and_diagonals_take_less_than_a_hundredth_of_the_cache(
    index: str, length: int, options: dict[str, Any]
) -> None:
    expect_little_held(MInference(**options), length, INDEXES[index])


@pytest.mark.parametrize(
    "method",
    [
        MeanPool(),
        XAttention(),
        FlashPrefill(),
        FlexPrefill(),
        MInference(pattern="block_sparse"),
        MInference(pattern="a_shape"),
        HiP(),
        HiP(shared_by="group"),
    ],
    ids=lambda method: (
        f"{type(method).__name__}-{getattr(method, 'pattern', getattr(method, 'shared_by', ''))}"
    ),
)
def test_pages_take_as_little_in_chunks_of_the_shipped_plans(method: PrefillMethod) -> None:
    expect_little_held(method, 2048, INDEXES["kernels"])


@pytest.mark.parametrize("heads", [8, 32])
def test_gates_take_as_little(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate for each KV head, with weights of queries, and for each query head."""
    size = MODEL.head_dim
    k, q = (torch.empty(number, n * size, size, device="meta") for number, n in ((heads, 3), (32, 1)))
    monkeypatch.setattr("sparse.seerattention.read_gates", lambda *_: [Gate(k, q if heads == 8 else None)])
    expect_little_held(SeerAttention(Path("gates")), 2048, INDEXES["kernels"])


def expect_little_held(method: PrefillMethod, length: int, index: Index) -> None:
    method.attach(MODEL, Path(), StateRegistry())
    q, keys, chunk = a_million_tokens(length)
    rotation = Rotation(torch.empty(MODEL.head_dim // 2, device="meta"), 1.0, interleaved=False)
    chunk = replace(chunk, pre_rope=lambda: (q, q), rotation=rotation)
    with Held() as held:
        method.select(0, q, keys, replace(chunk, index=index), scale=0.1)
    assert 0 < held.peak < KV_BYTES / 100
