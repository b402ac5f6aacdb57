"""Which kernels run on a device: compiled ones where they can be had, else the torch code behind them."""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import kvcache.compaction
import kvcache.decode
import kvcache.kernels.cpu
import kvcache.kernels.cpu_quest
import kvcache.kernels.cpu_store
import kvcache.moves
import kvcache.quest
import sparse.antidiagonals
import sparse.attention
import sparse.estimator
import sparse.kernels.cpu
import sparse.lines
import sparse.page_scores
from configs.features import NO_FEATURES, Features
from kvcache.decode import RowSelection
from kvcache.moves import MoveKept, Moves, Store
from kvcache.quest import BestUnits
from sparse.antidiagonals import AntidiagonalMass
from sparse.attention import Attended
from sparse.base import Chunk, KeyView
from sparse.estimator import Estimator
from sparse.index import Index
from sparse.lines import ListLines
from sparse.page_scores import LogEnergy, MeanPages
from sparse.selection import Selection

log = logging.getLogger(__name__)


class Attend(Protocol):
    """Attention of a chunk over what a selection names: see sparse.attention.attend."""

    def __call__(
        self,
        q: Tensor,
        keys: KeyView,
        chunk: Chunk,
        selection: Selection,
        *,
        scale: float,
        features: Features = NO_FEATURES,
    ) -> Attended: ...


class AttendRows(Protocol):
    """Attention of one token per sequence over what its rows hold: see kvcache.decode.attend_rows."""

    def __call__(
        self,
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
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a forward, and the cache around it, compute with."""

    attend: Attend = sparse.attention.attend
    attend_rows: AttendRows = kvcache.decode.attend_rows
    estimate: Estimator = sparse.estimator.estimate
    store: Store = kvcache.moves.store
    move_kept: MoveKept = kvcache.compaction.move_kept
    best_units: BestUnits = kvcache.quest.best_units
    line_lists: ListLines = sparse.lines.line_lists
    mean_pages: MeanPages = sparse.page_scores.mean_pages
    log_energy: LogEnergy = sparse.page_scores.log_energy
    antidiagonal_mass: AntidiagonalMass = sparse.antidiagonals.antidiagonal_mass

    @property
    def index(self) -> Index:
        """Those that methods select with."""
        return Index(self.estimate, self.line_lists, self.mean_pages, self.log_energy, self.antidiagonal_mass)

    @property
    def moves(self) -> Moves:
        """Those that the cache moves keys and values with."""
        return Moves(self.store, self.move_kept)


def kernels_for(device: torch.device, page_dtype: torch.dtype | None = None) -> Kernels:
    """The fastest that exists here, unchecked: see engine/self_check.py. page_dtype: of quantised pages."""
    if device.type == "cuda":
        return triton_kernels()
    decode, stores, quest = kvcache.kernels.cpu, kvcache.kernels.cpu_store, kvcache.kernels.cpu_quest
    return Kernels(
        sparse.kernels.cpu.attend if sparse.kernels.cpu.is_available() else sparse.attention.attend,
        decode.attend_rows if decode.is_available() else kvcache.decode.attend_rows,
        store=stores.store if page_dtype and stores.is_available() else kvcache.moves.store,
        best_units=quest.best_units if quest.is_available() else kvcache.quest.best_units,
    )


def triton_kernels() -> Kernels:
    """Those written in Triton; the log says where it is missing."""
    try:
        from kvcache.kernels import triton_compact, triton_decode, triton_store
        from sparse.kernels import (
            triton_antidiagonals,
            triton_attention,
            triton_energy,
            triton_estimator,
            triton_lines,
            triton_means,
        )
    except ImportError as error:
        log.warning("Triton cannot be imported, torch serves in the place of its kernels: %s", error)
        return Kernels()
    return Kernels(
        triton_attention.attend,
        triton_decode.attend_rows,
        triton_estimator.estimate,
        triton_store.store,
        triton_compact.move_kept,
        line_lists=triton_lines.line_lists,
        mean_pages=triton_means.mean_pages,
        log_energy=triton_energy.log_energy,
        antidiagonal_mass=triton_antidiagonals.antidiagonal_mass,
    )
