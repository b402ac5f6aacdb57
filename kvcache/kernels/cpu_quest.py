"""Quest's choice on CPU: launches cpu_quest.cpp, which `make setup` compiles."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from configs.native import library
from kvcache.quest import PER_PAGE, Quest
from kvcache.quest import best_units as best_units_in_torch

SOURCE = Path(__file__).with_name("cpu_quest.cpp")


class _ChooseCall(ctypes.Structure):
    """Mirrors ChooseCall of cpu_quest.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "bounds", "pages", "held", "ids")),
        *((name, ctypes.c_int64) for name in ("num_rows", "group_size", "head_dim", "row_pages")),
        *((name, ctypes.c_int64) for name in ("first", "nearest", "chosen")),
        ("num_threads", ctypes.c_int32),
    ]


def is_available() -> bool:
    """Whether the kernel runs here; compiled if need be, once per machine. If not, the log says why."""
    return library(SOURCE) is not None


def best_units(q: Tensor, bounds: Tensor, pages: Tensor, held: Tensor, wanted: Quest) -> Tensor:
    """What kvcache.quest.best_units gives, which serves the head sizes that this does not."""
    kernels = library(SOURCE)
    assert kernels is not None, "ask is_available() first"
    batch, num_kv_heads, row_pages = pages.shape
    num_heads, head_dim = q.shape[1:]
    if head_dim % kernels.farspan_lanes():
        return best_units_in_torch(q, bounds, pages, held, wanted)
    assert all(x.device.type == "cpu" for x in (q, bounds, pages, held))
    assert (
        bounds.dtype == torch.float32
        and bounds.is_contiguous()
        and bounds.shape[1:] == (PER_PAGE, 2, head_dim)
    )
    assert pages.dtype == held.dtype == torch.int32 and held.shape == (batch, num_kv_heads)
    # What a pointer is taken of must live until the call returns.
    queries, pages, held = q.float().contiguous(), pages.contiguous(), held.contiguous()
    ids = torch.empty(batch, num_kv_heads, wanted.chosen, dtype=torch.int32)
    call = _ChooseCall(
        *(x.data_ptr() for x in (queries, bounds, pages, held, ids)),
        *(batch * num_kv_heads, num_heads // num_kv_heads, head_dim, row_pages),
        *(wanted.first, wanted.nearest, wanted.chosen),
        torch.get_num_threads(),
    )
    kernels.farspan_choose_units(ctypes.byref(call))
    return ids
