"""Index: the functions that methods select with, of torch, which defines them, or of the device."""

from dataclasses import dataclass

import sparse.antidiagonals
import sparse.descent
import sparse.estimator
import sparse.lines
import sparse.page_scores
from sparse.antidiagonals import AntidiagonalMass
from sparse.base import Chunk
from sparse.descent import PrunePieces
from sparse.estimator import Estimator
from sparse.lines import ListLines
from sparse.page_scores import LogEnergy, MeanPages, PoolPages


@dataclass(frozen=True, slots=True)
class Index:
    """Each looks at every key, or at every page, once for all heads, and never waits for the device."""

    estimate: Estimator = sparse.estimator.estimate
    line_lists: ListLines = sparse.lines.line_lists
    mean_pages: MeanPages = sparse.page_scores.mean_pages
    log_energy: LogEnergy = sparse.page_scores.log_energy
    antidiagonal_mass: AntidiagonalMass = sparse.antidiagonals.antidiagonal_mass
    pruned_pieces: PrunePieces = sparse.descent.pruned_pieces
    pool_pages: PoolPages = sparse.page_scores.pool_pages


TORCH_INDEX = Index()


def index_of(chunk: Chunk) -> Index:
    """That of the device which the chunk runs on."""
    return chunk.index or TORCH_INDEX
