"""HiP: keys pruned in stages, by descents into ever smaller pieces of them; single units are what is left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs.descent import Scores, check_stages, descend
from configs.model import PAGE_SIZE, ModelInfo
from sparse.base import Chunk, KeyView, StateRegistry
from sparse.descent import mean_queries, probed_scores, tabled_scores
from sparse.page_rules import check_range, forced_pages, with_last_rows_dense
from sparse.page_scores import (
    SCORE_ELEMS,
    block_pages,
    held_pages,
    key_pages,
    query_pages,
    rows_present,
)
from sparse.selection import Selection, lists_from_ids, lists_from_mask

UNITS = (8, 16)  # what attention gathers
READ_COST = 56  # reading a key by its index takes as long as multiplying it with so many queries


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
        k, held = key_pages(keys, num_tokens), held_pages(keys, num_tokens)
        block_page = block_pages(chunk, q.device)
        forced = forced_pages(self.sink, self.window, block_page, k.shape[1])
        num_lists = 1 if self.shared_by == "layer" else k.shape[0]
        selection = Selection(PAGE_SIZE, lists_from_mask(forced.expand(num_lists, -1, -1), PAGE_SIZE))
        # What a block chooses from lies between the forced pages: [first, ends[b]).
        first = -(-self.sink // PAGE_SIZE) * PAGE_SIZE
        reach = (self.window + PAGE_SIZE - 2) // PAGE_SIZE  # pages that a window reaches back
        last = (k.shape[1] - 1 - reach) * PAGE_SIZE  # the largest of ends, on the host
        if last > first:
            rows, present = query_pages(q, chunk.start), rows_present(chunk, q.device)
            starts = torch.arange(first, last, self.widths[0], device=q.device)
            ends = (block_page - reach)[:, None] * PAGE_SIZE  # [B, 1]
            unit = self.widths[-1]
            tabled, step = self._way(starts.shape[0], q, k)
            found = []
            for block in range(0, ends.shape[0], step):
                some = slice(block, block + step)
                num_pages = min(chunk.start // PAGE_SIZE + block + step, k.shape[1])  # up to these blocks
                search = _Search(rows[:, some], present[some], k, held, num_pages, tabled)
                found.append(self._prune(search, starts, ends[some], num_lists) // unit)
            units = torch.cat(found, dim=1)  # [H, B, U]
            gathered = lists_from_ids(units, units * unit < ends, unit)
            selection = Selection(PAGE_SIZE, selection.pages, gathered)
        return with_last_rows_dense(selection, chunk, self.last_rows_dense)

    def _prune(self, search: "_Search", starts: Tensor, ends: Tensor, num_lists: int) -> Tensor:
        """Starts of the pieces that the last stage leaves, ascending: [H, b, U]; some at or behind ends[b].

        starts [C] of the pieces that the first stage begins with; ends [b, 1].
        """
        left = starts.expand(num_lists, ends.shape[0], -1)
        for stage, width in enumerate(self.widths):
            if stage:
                parts = torch.arange(0, self.widths[stage - 1], width, device=left.device)
                left = (left[..., None] + parts).flatten(2)
            most = self.keep[stage] // width
            if left.shape[2] <= most:
                continue  # all go on, whatever they score
            each = left.repeat_interleave(search.rows.shape[0] // num_lists, dim=0)  # [Hq, b, C]
            best = descend(search.scores(self.strides[stage]), each, torch.minimum(each + width, ends), width)
            best = best.view(num_lists, -1, *best.shape[1:]).amax(1)  # of the heads that choose together
            order = best.sort(dim=-1, descending=True, stable=True).indices[..., :most]
            left = left.gather(2, order).sort(dim=-1).values
        return left

    def _way(self, num_pieces: int, q: Tensor, k: Tensor) -> tuple[frozenset[int], int]:
        """Strides whose stages had better score all keys first, and how many query blocks to take at once."""
        num_keys, head_dim = k.shape[1] * PAGE_SIZE, k.shape[3]
        probes: dict[int, int] = {}  # by stride, of one query block
        count, most = num_pieces, 0  # pieces of a stage, and of any
        for stage, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            if stage:
                before = self.widths[stage - 1]
                count = min(count, self.keep[stage - 1] // before) * (before // width)
            most = max(most, count)
            probes[stride] = probes.get(stride, 0) + 2 * width.bit_length() * count
        tabled = {
            stride
            for stride, number in probes.items()
            if number * (PAGE_SIZE // stride + READ_COST) > num_keys * (PAGE_SIZE // stride)
        }
        sizes = [
            num_keys * (PAGE_SIZE // stride)
            if stride in tabled
            else 2 * most * (head_dim + PAGE_SIZE // stride)
            for stride in probes
        ]
        return frozenset(tabled), max(1, SCORE_ELEMS // (q.shape[0] * max(sizes)))


@dataclass(frozen=True, slots=True)
class _Search:
    """Some query blocks, and the scores of keys for them."""

    rows: Tensor  # [Hq, b, 64, D]
    present: Tensor  # [b, 64] bool
    k: Tensor  # [Hkv, P, 64, D]
    held: Tensor  # [Hkv, P] bool
    num_pages: int  # up to the last of these blocks
    tabled: frozenset[int]  # strides for which all keys are scored first
    known: dict[int, Scores] = field(default_factory=dict)  # by stride: stages may share them

    def scores(self, stride: int) -> Scores:
        if stride not in self.known:
            queries = mean_queries(self.rows, self.present, stride)
            if stride in self.tabled:
                k, held = self.k[:, : self.num_pages], self.held[:, : self.num_pages]
                self.known[stride] = tabled_scores(queries, k, held)
            else:
                self.known[stride] = probed_scores(queries, self.k, self.held)
        return self.known[stride]
