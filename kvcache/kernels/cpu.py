"""Decode attention over rows on CPU: launches cpu_decode.cpp, which `make setup` compiles."""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE
from configs.native import library
from configs.quantised import FP8, INT8, is_quantised
from kvcache.decode import RowSelection
from kvcache.decode import attend_rows as attend_rows_in_torch

SOURCE = Path(__file__).with_name("cpu_decode.cpp")
LOG2_E = math.log2(math.e)
POOL_DTYPES = (torch.float32, torch.bfloat16, INT8, FP8)  # in the order of PoolType in native.h


class DecodeCall(ctypes.Structure):
    """Mirrors DecodeCall of cpu_decode.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k_pool", "v_pool", "k_scales", "v_scales")),
        *((name, ctypes.c_void_p) for name in ("pages", "held", "sinks")),
        *((name, ctypes.c_void_p) for name in ("unit_ids", "unit_counts", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_rows", "num_kv_heads", "group_size", "head_dim", "row_pages")
        ),
        *((name, ctypes.c_int64) for name in ("row_units", "unit", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("pool_type", "num_threads")),
    ]


def is_available() -> bool:
    """Whether the kernel runs here; compiled if need be, once per machine. If not, the log says why."""
    return library(SOURCE) is not None


def attend_rows(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pages: Tensor,
    held: Tensor,
    *,
    scale: float,
    max_held: int,
    features: Features = NO_FEATURES,
    selection: RowSelection | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """What kvcache.decode.attend_rows gives, which serves the dtypes and head sizes that this does not."""
    kernels = library(SOURCE)
    assert kernels is not None, "ask is_available() first"
    batch, num_heads, head_dim = q.shape
    if k_pool.dtype not in POOL_DTYPES or q.dtype == torch.float64 or head_dim % kernels.farspan_lanes():
        return attend_rows_in_torch(
            *(q, k_pool, v_pool, pages, held),
            scale=scale,
            max_held=max_held,
            features=features,
            selection=selection,
            k_scales=k_scales,
            v_scales=v_scales,
        )
    num_kv_heads, row_pages = pages.shape[1:]
    assert all(x.device.type == "cpu" for x in (q, k_pool, v_pool, pages, held))
    assert pages.dtype == held.dtype == torch.int32 and pages.shape[:2] == held.shape == (batch, num_kv_heads)
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and k_pool.dtype == v_pool.dtype
    assert k_pool.shape == v_pool.shape and k_pool.shape[1:] == (PAGE_SIZE, head_dim), (k_pool.shape, q.shape)
    assert num_heads % num_kv_heads == 0 and max_held <= row_pages * PAGE_SIZE, (
        num_heads,
        max_held,
        row_pages,
    )
    for scales in (k_scales, v_scales):
        assert (scales is not None) == is_quantised(k_pool.dtype), k_pool.dtype
        assert scales is None or (scales.is_contiguous() and scales.shape == k_pool.shape[:2])
    # What a pointer is taken of must live until the call returns.
    queries = q.float().contiguous()
    pages, held = pages.contiguous(), held.contiguous()
    sinks = None if features.sinks is None else features.sinks.contiguous()
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (num_heads,)), sinks
    ids = counts = None
    if selection is not None:
        assert features.window is None, "layers with a window read all of it"
        assert selection.ids.device.type == "cpu" and selection.counts.shape == held.shape
        ids, counts = selection.ids.contiguous(), selection.counts.contiguous()
    out = torch.empty_like(queries)
    call = DecodeCall(
        *(x.data_ptr() for x in (queries, k_pool, v_pool)),
        *(None if x is None else x.data_ptr() for x in (k_scales, v_scales)),
        *(x.data_ptr() for x in (pages, held)),
        *(None if x is None else x.data_ptr() for x in (sinks, ids, counts)),
        out.data_ptr(),
        *(batch * num_kv_heads, num_kv_heads, num_heads // num_kv_heads, head_dim, row_pages),
        *((0, 0) if selection is None else (selection.ids.shape[2], selection.unit)),
        features.window or 0,
        scale * LOG2_E,
        features.softcap or 0.0,
        POOL_DTYPES.index(k_pool.dtype),
        torch.get_num_threads(),
    )
    kernels.farspan_attend_rows(ctypes.byref(call))
    return out.to(q.dtype)
