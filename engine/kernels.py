"""Which kernels run on a device: compiled ones where they can be had, else the torch code behind them."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

import kvcache.decode
import kvcache.kernels.cpu
import kvcache.kernels.cpu_quest
import kvcache.kernels.cpu_store
import kvcache.quest
import sparse.attention
import sparse.kernels.cpu
import sparse.kernels.cpu_estimator
from kvcache.decode import AttendRows
from kvcache.moves import TORCH_MOVES, Moves
from kvcache.quest import BestUnits
from sparse.attention import Attend
from sparse.index import TORCH_INDEX, Index

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a forward, and the cache around it, compute with."""

    attend: Attend = sparse.attention.attend
    attend_rows: AttendRows = kvcache.decode.attend_rows
    index: Index = TORCH_INDEX
    moves: Moves = TORCH_MOVES
    best_units: BestUnits = kvcache.quest.best_units

    def with_kernel(self, name: str, kernel: Any) -> "Kernels":
        """These, with another one in a place; those of a group are named with it: moves.store."""
        group, _, field = name.rpartition(".")
        if group:
            kernel = replace(getattr(self, group), **{field: kernel})
        return replace(self, **{group or field: kernel})


def kernels_for(device: torch.device, page_dtype: torch.dtype | None = None) -> Kernels:
    """The fastest that exists here, unchecked: see engine/self_check.py. page_dtype: of quantised pages."""
    if device.type == "cuda":
        return triton_kernels()
    decode, stores, quest = kvcache.kernels.cpu, kvcache.kernels.cpu_store, kvcache.kernels.cpu_quest
    estimator = sparse.kernels.cpu_estimator
    return Kernels(
        sparse.kernels.cpu.attend if sparse.kernels.cpu.is_available() else sparse.attention.attend,
        decode.attend_rows if decode.is_available() else kvcache.decode.attend_rows,
        Index(estimator.estimate) if estimator.is_available() else TORCH_INDEX,
        moves=Moves(stores.store) if page_dtype and stores.is_available() else TORCH_MOVES,
        best_units=quest.best_units if quest.is_available() else kvcache.quest.best_units,
    )


def triton_kernels() -> Kernels:
    """Those written in Triton; the log says where it is missing."""
    try:
        from kvcache.kernels import triton_compact, triton_decode, triton_store
        from sparse.kernels import (
            triton_antidiagonals,
            triton_attention,
            triton_descent,
            triton_energy,
            triton_estimator,
            triton_lines,
            triton_means,
            triton_pooled,
        )
    except ImportError as error:
        log.warning("Triton cannot be imported, torch serves in the place of its kernels: %s", error)
        return Kernels()
    return Kernels(
        triton_attention.attend,
        triton_decode.attend_rows,
        Index(
            triton_estimator.estimate,
            triton_lines.line_lists,
            triton_means.mean_pages,
            triton_energy.log_energy,
            triton_antidiagonals.antidiagonal_mass,
            triton_descent.pruned_pieces,
            triton_pooled.pool_pages,
        ),
        Moves(triton_store.store, triton_compact.move_kept),
    )
