"""New tokens into pages of codes on CPU: launches cpu_store.cpp, which `python -m` of this compiles."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.native import library
from configs.quantised import is_quantised
from kvcache.kernels.cpu import POOL_DTYPES
from kvcache.moves import store as store_in_torch
from kvcache.pool import PagePool

SOURCE = Path(__file__).with_name("cpu_store.cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of tokens


class StoreCall(ctypes.Structure):
    """Mirrors StoreCall of cpu_store.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p * 2) for name in ("tokens", "pools", "scales")),
        ("destinations", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("num_a", "num_c", "head_dim")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "pool_type", "num_threads")),
    ]


def is_available() -> bool:
    """Whether the kernel runs here; compiled if need be, once per machine. If not, the log says why."""
    return library(SOURCE) is not None


def store(pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None:
    """What kvcache.moves.store does, which serves pages that hold no codes. k, v [A, C, D]."""
    if pool.k_scales is None or pool.v_scales is None or k.dtype not in DTYPES:
        return store_in_torch(pool, k, v, destinations)
    assert k.shape == v.shape and k.dtype == v.dtype and k.shape[:2] == destinations.shape, (k.shape, v.shape)
    assert is_quantised(pool.k.dtype) and pool.k.shape[1:] == (PAGE_SIZE, k.shape[2]), pool.k.shape
    assert destinations.dtype == torch.int64 and all(x.device.type == "cpu" for x in (k, v, destinations))
    # What a pointer is taken of must live until the call returns.
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    destinations = destinations.contiguous()
    call = StoreCall(
        (k.data_ptr(), v.data_ptr()),
        (pool.k.data_ptr(), pool.v.data_ptr()),
        (pool.k_scales.data_ptr(), pool.v_scales.data_ptr()),
        destinations.data_ptr(),
        (*k.stride()[:2], *v.stride()[:2]),
        *k.shape,
        k.dtype == torch.bfloat16,
        POOL_DTYPES.index(pool.k.dtype),
        torch.get_num_threads(),
    )
    kernels = library(SOURCE)
    assert kernels is not None, "ask is_available() first"
    kernels.farspan_store(ctypes.byref(call))
