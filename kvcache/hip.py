"""HiP at decode: a generated token reads the units that descents find; each stage serves for some steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.descent import Scores, check_stages, descend
from configs.model import PAGE_SIZE, ModelInfo
from kvcache.decode import UNITS, Queries, Rows, RowSelection, StoredKeys
from kvcache.state import StateRegistry

LAST_WIDTHS = (8, *UNITS)  # keys of the last pieces; those of 8 are widened to the least unit
HELD = "hip.held"  # slot state: tokens that a row held when its first stage ran, 0 = never


@dataclass(frozen=True)
class HiP:
    """InfiniteHiP's pruning for single queries, over what each row holds. https://arxiv.org/abs/2502.08910

    Between the first tokens and the window a row is cut into pieces of widths[0], and keeps keep[0] tokens:
    the pieces with the best score that a descent finds in them, for any query head of the row. Cut into
    pieces of widths[1], keep[1] tokens of them go on, and so forth. A stage runs every refresh[i] steps, and
    after a stage that ran; it begins with what the one before it left when that ran. The window begins where
    it did when the first stage ran, so that nothing is lost between.
    """

    widths: Sequence[int] = (64, 16, 8)  # tokens of a piece, by stage
    keep: Sequence[int] = (2048, 1024, 512)  # tokens that each stage leaves
    refresh: Sequence[int] = (32, 16, 8)  # steps that what each stage leaves serves
    sink: int = 64  # first tokens that are always read, widened to units
    window: int = 256  # nearest tokens that are always read, widened to units
    dense_layers: int = 2  # first layers that read everything

    def __post_init__(self) -> None:
        if not 0 < len(self.widths) == len(self.keep) == len(self.refresh):
            raise ValueError(
                f"widths, keep and refresh have {len(self.widths)}, {len(self.keep)} and {len(self.refresh)} "
                "numbers; each needs one for every stage"
            )
        check_stages(self.widths, self.keep, LAST_WIDTHS)
        longest = PAGE_SIZE
        for steps in self.refresh:
            if not 1 <= steps <= longest:
                raise ValueError(
                    f"refresh ({steps}) must be 1 to {longest} steps: at most {PAGE_SIZE}, and no more than "
                    "that of the stage before"
                )
            longest = steps
        for name, least in {"sink": 0, "window": 1, "dense_layers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        for name in ("widths", "keep", "refresh"):  # plans that say the same are the same
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def unit(self) -> int:
        """Tokens that are read together."""
        return max(self.widths[-1], UNITS[0])

    @property
    def first(self) -> int:
        """Units at the beginning that are always read."""
        return -(-self.sink // self.unit)

    @property
    def nearest(self) -> int:
        """Newest units that are always read, and cover the window however full the last of them is."""
        return (self.window - 1) // self.unit + 2

    @property
    def counts(self) -> list[int]:
        """Pieces that each stage leaves."""
        return [keep // width for keep, width in zip(self.keep, self.widths, strict=True)]

    @property
    def read(self) -> int:
        """Tokens that a row reads at most when its first stage runs. One that holds no more is read whole."""
        return self.unit * (self.first + self.counts[-1] + self.nearest)

    @property
    def reuses(self) -> bool:
        return self.refresh[0] > 1

    @property
    def pieces(self) -> str:
        """Of slot state, where stages serve several steps: where the pieces begin that each has left."""
        return f"hip.pieces.{sum(self.counts)}"

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        if self.reuses:
            rows = (model.num_layers, model.num_kv_heads)
            states.slot_state(self.pieces, (*rows, sum(self.counts)), torch.int32)
            states.slot_state(HELD, rows, torch.int32)

    def select(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> RowSelection | None:
        if layer < self.dense_layers or rows.max_held <= self.read:
            return None
        held = rows.held[layer]
        chooses = held > self.read  # a row that is read whole waits for its turn
        if not self.reuses:
            pieces = held.new_zeros(*held.shape, sum(self.counts))
            self._run_stages(layer, queries, rows, pieces, held, chooses)
            return self._selection(held, held, pieces)
        all_pieces, all_last = states.of_slots(self.pieces), states.of_slots(HELD)
        pieces, last = all_pieces[rows.slots, layer], all_last[rows.slots, layer]
        # Pages that left since moved all places: choose again.
        anew = chooses & ((last == 0) | (held < last) | (held >= last + self.refresh[0]))
        last = torch.where(anew, held, last)
        self._run_stages(layer, queries, rows, pieces, last, chooses)
        all_pieces[rows.slots, layer], all_last[rows.slots, layer] = pieces, last
        return self._selection(held, torch.where(chooses, last, held), pieces)

    def start(self, held: Tensor) -> Tensor:
        """The first of the nearest units of rows that hold so much."""
        return -(-held // self.unit) - self.nearest

    def _run_stages(
        self, layer: int, queries: Queries, rows: Rows, pieces: Tensor, last: Tensor, chooses: Tensor
    ) -> None:
        """The stages whose turn it is, row by row, into pieces [B, Hkv, sum(counts)].

        last [B, Hkv]: tokens held when the first stage ran; chooses bool [B, Hkv].
        """
        steps, chooses = (rows.held[layer] - last).flatten(), chooses.flatten()
        ends = (self.start(last) * self.unit).flatten()
        pages = rows.pages[layer].flatten(0, 1)  # [R, P]
        q = queries.q.reshape(len(ends), -1, queries.q.shape[2]).float()  # [R, G, D]
        left_by = torch.split(pieces.flatten(0, 1), self.counts, dim=1)  # [R, n] each: written through
        due = torch.zeros_like(chooses)
        for stage, width in enumerate(self.widths):
            due = due | (chooses & (steps % self.refresh[stage] == 0))
            some = rows_to_run(due)
            if not len(some):
                continue
            candidates = self._candidates(stage, rows.max_held, left_by[max(0, stage - 1)][some])
            scores = row_scores(q[some], pages[some], rows.keys)
            found = best_pieces(scores, candidates, width, ends[some].unsqueeze(1), self.counts[stage])
            left_by[stage][some] = torch.where(due[some].unsqueeze(1), found.int(), left_by[stage][some])

    def _candidates(self, stage: int, max_held: int, before: Tensor) -> Tensor:
        """Starts of the pieces that a stage chooses from: int64 [R, C]. before [R, n]: of the one before."""
        width, first = self.widths[stage], self.first * self.unit
        if stage:
            parts = torch.arange(0, self.widths[stage - 1], width, device=before.device)
            return (before.unsqueeze(-1) + parts).flatten(1)
        most = max(self.counts[0], -(-(max_held - first) // width))  # those behind the end of a row are empty
        return (first + width * torch.arange(most, device=before.device)).expand(len(before), -1)

    def _selection(self, held: Tensor, last: Tensor, pieces: Tensor) -> RowSelection:
        """First, chosen and nearest units of rows whose first stage ran when they held `last`; all of what is
        short. pieces [B, Hkv, sum(counts)]."""
        device, nothing = held.device, torch.iinfo(torch.int32).max
        units, start = (-(-held // self.unit)).unsqueeze(-1), self.start(last).unsqueeze(-1)
        first = torch.arange(self.first, dtype=torch.int32, device=device).expand(*held.shape, -1)
        chosen = pieces[..., -self.counts[-1] :] // self.unit
        again = torch.zeros_like(chosen, dtype=torch.bool)
        again[..., 1:] = chosen[..., 1:] == chosen[..., :-1]  # two pieces of one unit
        chosen = chosen.masked_fill(again | (chosen >= start), nothing)
        most = self.nearest + -(-(self.refresh[0] - 1) // self.unit)
        near = start + torch.arange(most, dtype=torch.int32, device=device)
        ids = torch.cat((first, chosen, near.masked_fill(near >= units, nothing)), dim=-1).sort(-1).values
        whole = held.unsqueeze(-1) <= self.read
        everything = torch.arange(ids.shape[-1], dtype=torch.int32, device=device)
        counts = torch.where(whole, units, (ids != nothing).sum(-1, keepdim=True, dtype=torch.int32))
        return RowSelection(torch.where(whole, everything, ids), counts.squeeze(-1), self.unit)


def rows_to_run(due: Tensor) -> Tensor:
    """Those that are due, [n] int64 of bool [R]; all of them where asking would wait for the device."""
    every = torch.arange(len(due), device=due.device)
    return every[due] if due.device.type == "cpu" else every


def row_scores(q: Tensor, pages: Tensor, keys: StoredKeys) -> Scores:
    """How well keys at places of rows suit the best-suited query head. q float32 [R, G, D], pages [R, P]."""

    def scores(places: Tensor) -> Tensor:
        of_page = pages.gather(1, places // PAGE_SIZE).long().clamp_min(0)
        return (keys.at(of_page * PAGE_SIZE + places % PAGE_SIZE) @ q.mT).amax(-1)

    return scores


def best_pieces(scores: Scores, left: Tensor, width: int, ends: Tensor, most: int) -> Tensor:
    """Starts of the best pieces of `width` places before `ends`, ascending: int64 [R, most].

    left int64 [R, C] ascending, ends [R, 1]. Empty ones come last. Of equal ones the first are better.
    """
    if left.shape[1] == most:
        return left  # all go on, whatever they score
    best = descend(scores, left, torch.minimum(left + width, ends), width)
    order = best.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    return left.gather(1, order).sort(dim=-1).values
