"""Quest: a generated token reads the units whose keys could suit it best, going by their bounds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.decode import Queries, Rows, RowSelection
from kvcache.state import NewKeys, StateRegistry, Upkeep

UNIT = 16  # tokens
PER_PAGE = PAGE_SIZE // UNIT
BOUNDS = "quest.bounds"  # page state [PER_PAGE, 2, D]: least and largest of each coordinate of a unit's keys


@dataclass(frozen=True)
class Quest:
    """Read the units with the highest upper bound on a key's score. https://arxiv.org/abs/2406.10774

    Bounds are of keys after RoPE, in units of 16 tokens, and always up to date. The query heads of a KV head
    choose together, by the sum of their bounds. The first tokens and the nearest are always read.
    """

    read: int = 1024  # tokens that each KV head reads, those that are always read among them
    sink: int = 16  # first tokens that are always read, widened to units
    window: int = 64  # nearest tokens that are always read, widened to units
    dense_layers: int = 2  # first layers that read everything
    reuse: int = (
        1  # steps that a choice serves; the window grows meanwhile, so that nothing is lost between them
    )

    def __post_init__(self) -> None:
        for name in ("sink", "dense_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1: a token reads itself")
        if not 1 <= self.reuse <= PAGE_SIZE:
            raise ValueError(f"reuse ({self.reuse}) must be 1 to {PAGE_SIZE} steps")
        if self.read % UNIT:
            raise ValueError(f"read ({self.read}) must be a multiple of {UNIT} tokens")
        if self.chosen < 1:
            forced = UNIT * (self.first + self.nearest)
            raise ValueError(
                f"read ({self.read}) must exceed what is always read ({forced} tokens) by {UNIT}"
            )

    @property
    def first(self) -> int:
        """Units at the beginning that are always read."""
        return -(-self.sink // UNIT)

    @property
    def nearest(self) -> int:
        """Newest units that are always read, and cover the window however full the last of them is."""
        return (self.window - 1) // UNIT + 2

    @property
    def chosen(self) -> int:
        """Units between them that are chosen."""
        return self.read // UNIT - self.first - self.nearest

    @property
    def names(self) -> tuple[str, str]:
        """Of slot state, where a choice serves several steps: what was chosen, and when."""
        return f"quest.chosen.{self.chosen}", "quest.held"

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        states.page_state(BOUNDS, (PER_PAGE, 2, model.head_dim), upkeep=Upkeep(write_bounds, rebuild_bounds))
        if self.reuse > 1:
            rows = (model.num_layers, model.num_kv_heads)
            states.slot_state(self.names[0], (*rows, self.chosen), torch.int32)
            states.slot_state(self.names[1], rows, torch.int32)  # tokens held then; 0 = never chosen

    def select(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> RowSelection | None:
        if layer < self.dense_layers or rows.max_held <= self.read:
            return None
        held = rows.held[layer]
        if self.reuse == 1:
            return self._selection(held, held, self.best(layer, queries, rows, states))
        chosen, when = states.of_slots(self.names[0]), states.of_slots(self.names[1])
        before, last = chosen[rows.slots, layer], when[rows.slots, layer]
        # A row that is read whole waits for its turn. Pages that left since moved all places: choose again.
        due = (held > self.read) & ((last == 0) | (held < last) | (held >= last + self.reuse))
        if held.device.type != "cpu" or bool(due.any()):  # elsewhere asking would wait for the device
            now = self.best(layer, queries, rows, states)
            before, last = torch.where(due.unsqueeze(-1), now, before), torch.where(due, held, last)
            chosen[rows.slots, layer], when[rows.slots, layer] = before, last
        return self._selection(held, torch.where(held > self.read, last, held), before)

    def best(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> Tensor:
        """The units that are chosen: see `best_units`."""
        choose = queries.best_units or best_units
        return choose(queries.q, states.of_pages(BOUNDS), rows.pages[layer], rows.held[layer], self)

    def start(self, held: Tensor) -> Tensor:
        """The first of the nearest units of rows that hold so much."""
        return -(-held // UNIT) - self.nearest

    def _selection(self, held: Tensor, last: Tensor, chosen: Tensor) -> RowSelection:
        """First, chosen and nearest units of rows that chose when they held `last`; all of what is short."""
        device = held.device
        first = torch.arange(self.first, dtype=torch.int32, device=device).expand(*held.shape, -1)
        reach = torch.arange(self.nearest + -(-(self.reuse - 1) // UNIT), dtype=torch.int32, device=device)
        units, start = -(-held // UNIT), self.start(last)
        ids = torch.cat((first, chosen, start.unsqueeze(-1) + reach), dim=-1)
        whole = held <= self.read
        everything = torch.arange(ids.shape[-1], dtype=torch.int32, device=device)
        counts = torch.where(whole, units, self.first + self.chosen + units - start)
        return RowSelection(torch.where(whole.unsqueeze(-1), everything, ids), counts.int(), UNIT)


class BestUnits(Protocol):
    """The units that a choice adds to the first and the nearest ones: see `best_units`."""

    def __call__(self, q: Tensor, bounds: Tensor, pages: Tensor, held: Tensor, wanted: Quest) -> Tensor: ...


def best_units(q: Tensor, bounds: Tensor, pages: Tensor, held: Tensor, wanted: Quest) -> Tensor:
    """The best units between the first and the nearest ones: [B, Hkv, chosen] int32, ascending.

    q [B, Hq, D], bounds [num_pages, PER_PAGE, 2, D], pages [B, Hkv, P], held [B, Hkv]. Of rows that are read
    whole, anything.
    """
    return top_units(unit_scores(q, bounds, pages), held, wanted)


def top_units(scores: Tensor, held: Tensor, wanted: Quest) -> Tensor:
    """The same by these scores [B, Hkv, U], which are overwritten."""
    place = torch.arange(scores.shape[2], device=scores.device)
    between = (place >= wanted.first) & (place < wanted.start(held).unsqueeze(-1))
    scores.masked_fill_(~between, float("-inf"))
    return scores.topk(wanted.chosen, sorted=False).indices.sort().values.int()


def unit_scores(q: Tensor, bounds: Tensor, pages: Tensor) -> Tensor:
    """Upper bounds on the score of any key of a unit, summed over the heads of a row: float32 [B, Hkv, U].

    q [B, Hq, D], bounds [num_pages, PER_PAGE, 2, D], pages [B, Hkv, P]. In every coordinate the larger of
    q * least and q * largest: one product, since the sign of q says which it is.
    """
    batch, num_kv_heads, num_pages = pages.shape
    q = q.float().view(batch, num_kv_heads, -1, q.shape[2])  # [B, Hkv, G, D]
    weights = torch.cat((q.clamp_max(0), q.clamp_min(0)), dim=-1).sum(2)  # [B, Hkv, 2 D]
    of_rows = bounds.index_select(0, pages.flatten().clamp_min(0))  # [B * Hkv * P, PER_PAGE, 2, D]
    of_rows = of_rows.view(batch * num_kv_heads, num_pages * PER_PAGE, -1)
    # in this order: a product with one column on the right takes a CPU three times as long
    return torch.bmm(weights.view(len(of_rows), 1, -1), of_rows.mT).view(batch, num_kv_heads, -1)


def write_bounds(state: Tensor, new: NewKeys) -> None:
    """Bounds follow new keys. state [num_pages, PER_PAGE, 2, D]."""
    units = state.view(-1, 2, state.shape[-1])
    if new.is_chunk:
        missing = -new.k.shape[1] % UNIT
        k = torch.cat(
            (new.k, new.k[:, -1:].expand(-1, missing, -1)), dim=1
        )  # repeating a key changes no bound
        keys = k.float().reshape(k.shape[0], -1, UNIT, k.shape[2])  # [Hkv, U, UNIT, D]
        units[new.destinations[:, ::UNIT] // UNIT] = torch.stack((keys.amin(2), keys.amax(2)), dim=2)
        return
    at, k = new.destinations.flatten(), new.k.flatten(0, 1).float()  # one token of each row, [R, D]
    before = units[at // UNIT]
    starts = (at % UNIT == 0).unsqueeze(-1)
    least = torch.where(starts, k, torch.minimum(before[:, 0], k))
    largest = torch.where(starts, k, torch.maximum(before[:, 1], k))
    units[at // UNIT] = torch.stack((least, largest), dim=1)


def rebuild_bounds(state: Tensor, pages: Tensor, keys: Tensor, counts: Tensor) -> None:
    """Bounds of whole pages [n] from their keys [n, PAGE_SIZE, D], of which `counts` [n] are there."""
    held = (torch.arange(PAGE_SIZE, device=keys.device) < counts.unsqueeze(-1)).unsqueeze(-1)
    least, largest = (
        keys.float().masked_fill(~held, fill).view(-1, PER_PAGE, UNIT, keys.shape[2])
        for fill in (float("inf"), float("-inf"))
    )
    state[pages] = torch.stack((least.amin(2), largest.amax(2)), dim=2)
