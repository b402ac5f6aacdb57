"""Block-sparse attention on CPU: launches cpu_attention.cpp, which `make setup` compiles."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from configs.bf16_products import Bf16Products, bf16_products
from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE
from configs.native import library
from configs.quantised import FP8, INT8, is_quantised
from sparse.attention import Attended
from sparse.attention import attend as attend_in_torch
from sparse.base import Chunk, KeyView
from sparse.correction import corrected
from sparse.selection import BlockLists, Selection, num_query_blocks

SOURCE = Path(__file__).with_name("cpu_attention.cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of queries
POOL_DTYPES = (*DTYPES, INT8, FP8)  # in the order of PoolType in native.h


class _Lists(ctypes.Structure):
    _fields_ = [
        ("starts", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("unit", ctypes.c_int64),
    ]


class _AttentionCall(ctypes.Structure):
    """Mirrors AttentionCall of cpu_attention.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k_pool", "v_pool", "k_scales", "v_scales")),
        *((name, ctypes.c_void_p) for name in ("pages", "out", "lse", "sinks")),
        ("whole", _Lists),
        ("gathered", _Lists),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("q_head_stride", "q_token_stride", "out_tokens"),
                *("start", "length"),
                *("num_heads", "num_kv_heads", "head_dim", "num_blocks"),
                *("num_lists", "num_query_blocks", "query_block"),
                "window",
            )
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("q_is_bf16", "pool_type", "bf16_products", "num_threads")),
    ]


def is_available() -> bool:
    """Whether the kernel runs here; compiled if need be, once per machine. If not, the log says why."""
    return library(SOURCE) is not None


def attend(
    q: Tensor,
    keys: KeyView,
    chunk: Chunk,
    selection: Selection,
    *,
    scale: float,
    features: Features = NO_FEATURES,
) -> Attended:
    """What sparse.attention.attend gives, which also serves the dtypes that this does not (fp16, fp64)."""
    if q.dtype not in DTYPES or keys.k_pool.dtype not in POOL_DTYPES:
        return attend_in_torch(q, keys, chunk, selection, scale=scale, features=features)
    assert features.window is None or selection.gathered is None, "gathered units on a layer with a window"
    num_heads, length, head_dim = q.shape
    out = q.new_empty(num_heads, length, head_dim)
    lse = q.new_empty(num_heads, length, dtype=torch.float32)
    num_exact = 0
    if selection.exact is not None:
        num_exact = selection.exact.lse.shape[1]
        out[:, length - num_exact :] = selection.exact.out
        lse[:, length - num_exact :] = selection.exact.lse
    if length > num_exact:
        _launch(q, keys, chunk.start, length - num_exact, selection, scale, features, out, lse)
    return Attended(*corrected(out, lse, q, chunk, selection, scale, features))


def _launch(
    q: Tensor,
    keys: KeyView,
    start: int,
    length: int,
    selection: Selection,
    scale: float,
    features: Features,
    out: Tensor,
    lse: Tensor,
) -> None:
    """The first `length` rows of q [Hq, Tq, D] into out [Hq, Tq, D] and lse [Hq, Tq]."""
    q = q if q.stride(2) == 1 else q.contiguous()
    k_pool, v_pool, pages = keys.k_pool, keys.v_pool, keys.pages.contiguous()
    num_heads, out_tokens, head_dim = q.shape
    num_kv_heads, num_blocks = pages.shape
    assert all(x.device.type == "cpu" for x in (q, k_pool, v_pool, pages)) and pages.dtype == torch.int32
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and k_pool.dtype == v_pool.dtype
    assert k_pool.shape == v_pool.shape and k_pool.shape[1:] == (PAGE_SIZE, head_dim), (k_pool.shape, q.shape)
    scales = (keys.k_scales, keys.v_scales)
    for of_tokens in scales:
        assert (of_tokens is not None) == is_quantised(k_pool.dtype), k_pool.dtype
        assert of_tokens is None or (of_tokens.is_contiguous() and of_tokens.shape == k_pool.shape[:2])
    assert num_heads % num_kv_heads == 0 and scale > 0, (num_heads, num_kv_heads, scale)
    assert start + length <= min(keys.num_tokens, num_blocks * PAGE_SIZE), (start, length, pages.shape)
    blocks = num_query_blocks(start, out_tokens, selection.query_block)
    whole, gathered = selection.pages, selection.gathered
    num_lists = num_kv_heads if selection.is_dense else whole.num_heads
    assert num_lists in (1, num_kv_heads, num_heads), (num_lists, num_kv_heads, num_heads)
    # What a pointer is taken of must live until the call returns: `parts` keeps it.
    parts = [
        None if x is None or selection.is_dense else _plain(x, num_lists, blocks) for x in (whole, gathered)
    ]
    sinks = None if features.sinks is None else features.sinks.contiguous()
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (num_heads,)), sinks
    call = _AttentionCall(
        *(x.data_ptr() for x in (q, k_pool, v_pool)),
        *(None if x is None else x.data_ptr() for x in scales),
        *(x.data_ptr() for x in (pages, out, lse)),
        None if sinks is None else sinks.data_ptr(),
        *(_Lists() if x is None else _pointers(x) for x in parts),
        *(q.stride(0), q.stride(1), out_tokens),
        *(start, length),
        *(num_heads, num_kv_heads, head_dim, num_blocks),
        *(num_lists, blocks, selection.query_block),
        features.window or 0,
        *(scale, features.softcap or 0.0),
        q.dtype == torch.bfloat16,
        POOL_DTYPES.index(k_pool.dtype),
        bf16_products() if q.dtype == torch.bfloat16 and head_dim % 16 == 0 else Bf16Products.WIDENED,
        torch.get_num_threads(),
    )
    kernels = library(SOURCE)
    assert kernels is not None, "ask is_available() first"
    kernels.farspan_attend(ctypes.byref(call))


def _plain(lists: BlockLists, num_lists: int, num_blocks: int) -> BlockLists:
    """The lists in the layout that the kernel reads."""
    assert lists.counts.shape == lists.starts.shape == (num_lists, num_blocks), (
        lists.counts.shape,
        num_blocks,
    )
    assert lists.counts.dtype == lists.indices.dtype == torch.int32 and lists.starts.dtype == torch.int64
    return BlockLists(
        lists.starts.contiguous(), lists.counts.contiguous(), lists.indices.contiguous(), lists.unit
    )


def _pointers(lists: BlockLists) -> _Lists:
    return _Lists(lists.starts.data_ptr(), lists.counts.data_ptr(), lists.indices.data_ptr(), lists.unit)
