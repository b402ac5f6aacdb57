"""HiP: keys pruned in stages, by descents into ever smaller pieces of them; single units are what is left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs.descent import check_stages
from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.descent import Funnel
from sparse.index import index_of
from sparse.page_rules import check_range, forced_pages, with_last_rows_dense
from sparse.page_scores import block_pages
from sparse.selection import Selection, lists_from_ids, lists_from_mask

UNITS = (8, 16)  # what attention gathers


@dataclass(frozen=True)
class HiP:
    """InfiniteHiP's pruning, without its RoPE extension: scores are those of rotated keys.
    https://arxiv.org/abs/2502.08910

    A query block starts with all keys between the first pages and its window, in pieces of widths[0], and
    keeps keep[0] keys: the pieces with the best score that a descent finds in them. Cut into pieces of
    widths[1], keep[1] keys of them go on, and so forth.
    """

    widths: Sequence[int] = (64, 16, 8)  # keys of a piece, by stage
    keep: Sequence[int] = (2048, 1024, 512)  # keys that each stage leaves
    strides: Sequence[int] = (4, 4, 1)  # neighbouring queries that a stage takes as one, their mean
    shared_by: str = "layer"  # heads that choose together: all of a layer, or the group of a KV head
    sink: int = 64  # first keys that are always read
    window: int = 256  # nearest keys that are always read
    last_rows_dense: int = 64  # last rows of a prompt that read everything
    grid = False

    def __post_init__(self) -> None:
        if not 0 < len(self.widths) == len(self.keep) == len(self.strides):
            raise ValueError(
                f"widths, keep and strides have {len(self.widths)}, {len(self.keep)} and {len(self.strides)} "
                "numbers; each needs one for every stage"
            )
        check_stages(self.widths, self.keep, UNITS)
        for stride in self.strides:
            if stride < 1 or PAGE_SIZE % stride:
                raise ValueError(f"strides ({stride}) must divide the {PAGE_SIZE} rows of a query block")
        if self.shared_by not in ("layer", "group"):
            raise ValueError(f"shared_by ({self.shared_by!r}) must be layer or group")
        check_range(self, {"sink": 0, "window": 1, "last_rows_dense": 0})

    @property
    def last_rows(self) -> int:
        return self.last_rows_dense

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Nothing to read and no state: it fits every model."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        block_page = block_pages(chunk, q.device)
        forced = forced_pages(self.sink, self.window, block_page, -(-num_tokens // PAGE_SIZE))
        funnel = Funnel(
            self.widths,
            self.keep,
            self.strides,
            # What a block chooses from lies between the forced pages.
            first=-(-self.sink // PAGE_SIZE) * PAGE_SIZE,
            reach=(self.window + PAGE_SIZE - 2) // PAGE_SIZE,
            num_lists=1 if self.shared_by == "layer" else keys.pages.shape[0],
        )
        lists = lists_from_mask(forced.expand(funnel.num_lists, -1, -1), PAGE_SIZE)
        selection = Selection(PAGE_SIZE, lists)
        if funnel.last(num_tokens) > funnel.first:
            unit = self.widths[-1]
            units = index_of(chunk).pruned_pieces(q, keys, chunk, funnel) // unit  # [H, B, U]
            gathered = lists_from_ids(units, units * unit < funnel.ends(block_page)[:, None], unit)
            selection = Selection(PAGE_SIZE, lists, gathered)
        return with_last_rows_dense(selection, chunk, self.last_rows_dense)
