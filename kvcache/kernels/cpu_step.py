"""A decode step that reads all its rows hold, on CPU: each layer's tokens stored and attended in one go.

What attend_rows of cpu.py and store of cpu_store.py compute; what all layers share is said once a step.
"""

import ctypes

import torch
from torch import Tensor

from configs.features import Features
from configs.model import PAGE_SIZE
from configs.native import library
from kvcache.decode import Rows
from kvcache.kernels import cpu, cpu_store
from kvcache.pool import PagePool


class WholeStep:
    """One decode step of B sequences, layer by layer."""

    def __init__(self, pool: PagePool, rows: Rows, destinations: Tensor) -> None:
        """destinations [L, B, Hkv] int64 into the flattened pool. Pools of POOL_DTYPES, D whole vectors."""
        attending, storing = library(cpu.SOURCE), library(cpu_store.SOURCE)
        assert attending is not None and storing is not None, "ask is_available() first"
        self._attend_rows, self._store = attending.farspan_attend_rows, storing.farspan_store
        _, self._batch, self._num_kv_heads, row_pages = rows.pages.shape
        pages, held, destinations = (x.contiguous() for x in (rows.pages, rows.held, destinations))
        assert held.shape == destinations.shape == pages.shape[:3], (held.shape, destinations.shape)
        assert pages.dtype == held.dtype == torch.int32 and destinations.dtype == torch.int64
        assert rows.max_held <= row_pages * PAGE_SIZE, (rows.max_held, row_pages)
        # What a pointer is taken of must live as long as this.
        self._kept = pool, pages, held, destinations
        self._head_dim = pool.k.shape[2]
        self._read = cpu.DecodeCall(
            k_pool=pool.k.data_ptr(),
            v_pool=pool.v.data_ptr(),
            num_rows=self._batch * self._num_kv_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            row_pages=row_pages,
            pool_type=cpu.POOL_DTYPES.index(pool.k.dtype),
            num_threads=torch.get_num_threads(),
        )
        by_sequence = self._num_kv_heads * self._head_dim
        self._written = cpu_store.StoreCall(
            pools=(pool.k.data_ptr(), pool.v.data_ptr()),
            strides=(by_sequence, self._head_dim) * 2,
            num_a=self._batch,
            num_c=self._num_kv_heads,
            head_dim=self._head_dim,
            pool_type=self._read.pool_type,
            num_threads=self._read.num_threads,
        )
        if pool.k_scales is not None and pool.v_scales is not None:
            self._read.k_scales, self._read.v_scales = pool.k_scales.data_ptr(), pool.v_scales.data_ptr()
            self._written.scales = (pool.k_scales.data_ptr(), pool.v_scales.data_ptr())
        self._row_bytes = 4 * self._read.num_rows  # of `held`, in one layer
        self._pages_at, self._held_at, self._destinations_at = (
            x.data_ptr() for x in (pages, held, destinations)
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, features: Features
    ) -> Tensor:
        """q [B, Hq, D], k and v [B, Hkv, D] of the new tokens, float32 or bf16 -> [B, Hq, D]."""
        asked = q.dtype
        q, k, v = (x.float().contiguous() for x in (q, k, v))
        kept = (self._batch, self._num_kv_heads, self._head_dim)
        assert k.shape == v.shape == kept, (k.shape, kept)
        read, written = self._read, self._written
        written.tokens = (k.data_ptr(), v.data_ptr())
        written.destinations = self._destinations_at + layer * 2 * self._row_bytes
        self._store(ctypes.byref(written))
        sinks = None if features.sinks is None else features.sinks.contiguous()
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == q.shape[1:2]), sinks
        out = torch.empty_like(q)
        read.q, read.out = q.data_ptr(), out.data_ptr()
        read.group_size = q.shape[1] // self._num_kv_heads
        read.pages = self._pages_at + layer * self._row_bytes * read.row_pages
        read.held = self._held_at + layer * self._row_bytes
        read.sinks = None if sinks is None else sinks.data_ptr()
        read.window, read.softcap = features.window or 0, features.softcap or 0.0
        read.scale = scale * cpu.LOG2_E
        self._attend_rows(ctypes.byref(read))
        return out.to(asked)


def serves(pool: PagePool) -> bool:
    """Whether pages of this dtype and head size can be read and written here."""
    kernels = library(cpu.SOURCE)
    if kernels is None or not cpu_store.is_available():
        return False
    fits: bool = pool.k.dtype in cpu.POOL_DTYPES and pool.k.shape[2] % kernels.farspan_lanes() == 0
    return fits and pool.k.device.type == "cpu"
