"""The last-window estimator on CPU: launches cpu_estimator.cpp, which `make setup` compiles."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.native import library
from configs.quantised import is_quantised
from sparse.base import Chunk, KeyView
from sparse.estimator import Estimate
from sparse.estimator import estimate as estimate_in_torch
from sparse.kernels.cpu import DTYPES, POOL_DTYPES, attend
from sparse.selection import dense

SOURCE = Path(__file__).with_name("cpu_estimator.cpp")


class _SumCall(ctypes.Structure):
    """Mirrors SumCall of cpu_estimator.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k_pool", "k_scales", "pages", "lse")),
        *((name, ctypes.c_void_p) for name in ("columns", "diagonals")),
        *((name, ctypes.c_int64) for name in ("q_head_stride", "q_row_stride", "first", "num_rows")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "num_blocks")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("q_is_bf16", "pool_type", "num_threads")),
    ]


def is_available() -> bool:
    """Whether the kernel runs here; compiled if need be, once per machine. If not, the log says why."""
    return library(SOURCE) is not None


def estimate(q_rows: Tensor, first_position: int, keys: KeyView, *, scale: float) -> Estimate:
    """What sparse.estimator.estimate gives, which also serves the dtypes that this does not (fp16, fp64).

    Scores are computed twice, for the softmax and for its sums, and never held for more than a page.
    """
    if q_rows.dtype not in DTYPES or keys.k_pool.dtype not in POOL_DTYPES:
        return estimate_in_torch(q_rows, first_position, keys, scale=scale)
    kernels = library(SOURCE)
    assert kernels is not None, "ask is_available() first"
    num_heads, num_rows, head_dim = q_rows.shape
    num_tokens = first_position + num_rows
    chunk = Chunk(first_position, num_rows, num_tokens, num_tokens, slot=0)
    exact = attend(q_rows, keys, chunk, dense(q_rows.device), scale=scale)
    q_rows = q_rows if q_rows.stride(2) == 1 else q_rows.contiguous()
    pages, k_pool, k_scales = keys.pages.contiguous(), keys.k_pool, keys.k_scales
    assert pages.dtype == torch.int32 and num_tokens <= pages.shape[1] * PAGE_SIZE, (num_tokens, pages.shape)
    assert k_pool.is_contiguous() and k_pool.shape[1:] == (PAGE_SIZE, head_dim), (k_pool.shape, head_dim)
    assert (k_scales is not None) == is_quantised(k_pool.dtype), k_pool.dtype
    assert k_scales is None or (k_scales.is_contiguous() and k_scales.shape == k_pool.shape[:2])
    assert num_heads % pages.shape[0] == 0 and scale > 0, (num_heads, pages.shape, scale)
    columns, diagonals = torch.empty(2, num_heads, num_tokens)
    call = _SumCall(
        *(q_rows.data_ptr(), k_pool.data_ptr(), None if k_scales is None else k_scales.data_ptr()),
        *(x.data_ptr() for x in (pages, exact.lse, columns, diagonals)),
        *(q_rows.stride(0), q_rows.stride(1), first_position, num_rows),
        *(num_heads, pages.shape[0], head_dim, pages.shape[1]),
        scale,
        q_rows.dtype == torch.bfloat16,
        POOL_DTYPES.index(k_pool.dtype),
        torch.get_num_threads(),
    )
    kernels.farspan_sum_lines(ctypes.byref(call))
    return Estimate(columns, diagonals, exact.out, exact.lse)
