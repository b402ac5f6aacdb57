"""DecodeMethod: what each row reads in a step, and the torch attention over rows that defines the kernels."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE, ModelInfo
from configs.quantised import dequantise
from configs.rotation import Rotation
from kvcache.state import StateRegistry

if TYPE_CHECKING:
    from kvcache.quest import BestUnits

GROUP_ELEMENTS = 1 << 19  # keys gathered at once, in elements
SHORTEST_IN_GROUP = 0.75  # of the longest: bounds what padding costs
UNITS = (16, PAGE_SIZE)  # tokens that a decode method may select together


@dataclass(frozen=True, slots=True, eq=False)
class StoredKeys:
    """The keys of all pages, as they are stored."""

    pool: Tensor  # [num_pages, PAGE_SIZE, D]
    scales: Tensor | None  # [num_pages, PAGE_SIZE] where these are codes

    def at(self, places: Tensor) -> Tensor:
        """Some of them: float32 [..., D]. places int64 [...], page * PAGE_SIZE + offset."""
        flat = places.flatten()
        keys = self.pool.flatten(0, 1).index_select(0, flat)
        if self.scales is None:
            keys = keys.float()
        else:
            keys = dequantise(keys, self.scales.flatten().index_select(0, flat), torch.float32)
        return keys.view(*places.shape, -1)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of one decode step hold, the step's own tokens included. B slots, one new token each."""

    slots: Tensor  # [B] int64
    pages: Tensor  # [L, B, Hkv, P] int32 page ids by place, -1 = none
    held: Tensor  # [L, B, Hkv] int32 tokens
    max_held: int  # the largest of them, known on the host
    keys: StoredKeys  # of which pages are the ids


@dataclass(frozen=True, slots=True)
class RowSelection:
    """The tokens that each row reads: unit `i` is the places `[i * unit, (i + 1) * unit)` that it holds."""

    ids: Tensor  # [B, Hkv, K] int32 unit ids, ascending, each of a unit that holds something
    counts: Tensor  # [B, Hkv] int32: entries that count, the first ones
    unit: int  # 16 or PAGE_SIZE

    def __post_init__(self) -> None:
        assert self.unit in UNITS and self.ids.dtype == self.counts.dtype == torch.int32, self
        assert self.ids.shape[:2] == self.counts.shape, (self.ids.shape, self.counts.shape)

    def lengths(self, held: Tensor) -> Tensor:
        """Tokens that are read, [B, Hkv] int32. held [B, Hkv]. Only a row's newest unit is not full."""
        if self.ids.shape[2] == 0:
            return torch.zeros_like(held)
        last = self.ids.gather(2, (self.counts - 1).clamp_min(0).long().unsqueeze(2)).squeeze(2)
        missing = ((last + 1) * self.unit - held).clamp_min(0)
        return (self.counts * self.unit - missing).masked_fill(self.counts == 0, 0).int()


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """The queries of one decode step in one layer."""

    q: Tensor  # [B, Hq, D] after RoPE
    positions: Tensor  # [B] int64
    rotation: Rotation | None  # None = the layer rotates nothing
    best_units: "BestUnits | None" = None
    """Quest's choice on this device; None = kvcache.quest.best_units."""

    def pre_rope(self) -> Tensor:
        """The same before RoPE."""
        if self.rotation is None:
            return self.q
        return self.rotation.undo(self.q.transpose(0, 1), self.positions).transpose(0, 1)


class DecodeMethod(Protocol):
    """A dataclass whose fields are its YAML options. Selects for all rows of a step; no host sync."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Once, before weights load: read files, declare page and slot state. Refuses with ValueError."""

    def select(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> RowSelection | None:
        """What each row reads in this layer, None = all it holds. Not asked where the layer has a window.

        Selections of a step have the same unit and the same K in all layers. What is done goes by tensors and
        `rows.max_held` alone: it may be recorded once and replayed for other rows.
        """


@dataclass(frozen=True)
class Full:
    """Read all that is held."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Needs nothing."""

    def select(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> RowSelection | None:
        return None


class AttendRows(Protocol):
    """Attention of one token per sequence over what its rows hold: see `attend_rows`."""

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


def attend_rows(
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
) -> Tensor:
    """Attention of one query token per sequence over what its rows hold: [B, Hq, D] in q's dtype.

    q [B, Hq, D], pools [num_pages, PAGE_SIZE, D], pages int32 [B, Hkv, P] by place, held int32 [B, Hkv], none
    over max_held. Scores, softmax and sums in float32; a row that holds nothing gives 0. Rows go in groups of
    similar length: one long row pads no short ones. A window is the last tokens that a row holds: rows of
    such a layer hold consecutive positions. A selection names what is read of each row, without a window.
    Pools of codes come with their scales [num_pages, PAGE_SIZE].
    """
    batch, num_heads, head_dim = q.shape
    num_rows, group_size = held.numel(), num_heads // held.shape[1]
    assert group_size * held.shape[1] == num_heads and pages.shape[:2] == held.shape
    assert max_held <= pages.shape[2] * PAGE_SIZE, f"{max_held} tokens in {pages.shape[2]} pages"
    queries = (q.float() * scale).reshape(num_rows, group_size, head_dim)
    lengths = held.reshape(num_rows)
    row_pages = pages.reshape(num_rows, -1)
    if selection is not None:  # pages of a selection are units: the same attention over smaller pages
        assert features.window is None, "layers with a window read all of it"
        lengths = selection.lengths(held).reshape(num_rows)
        row_pages = _selected_units(row_pages, selection)
        k_pool, v_pool = (pool.view(-1, selection.unit, head_dim) for pool in (k_pool, v_pool))
        if k_scales is not None and v_scales is not None:
            k_scales, v_scales = k_scales.view(-1, selection.unit), v_scales.view(-1, selection.unit)
    if features.window is not None:
        row_pages, lengths = _last_pages(row_pages, lengths, features.window)
    sinks = None
    if features.sinks is not None:
        sinks = features.sinks.float().view(-1, group_size).repeat(batch, 1)  # [B * Hkv, G]
    out = q.new_zeros(num_rows, group_size, head_dim)
    page_size = k_pool.shape[1]
    groups = _groups(lengths, page_size, head_dim)
    most_pages = max((len(rows) * num_pages for rows, num_pages in groups), default=0)
    # reused: fresh memory costs more than the copy
    gathered = k_pool.new_empty(most_pages, page_size, head_dim)
    keys, values = _Pages(k_pool, k_scales, gathered), _Pages(v_pool, v_scales, gathered)
    for rows, num_pages in groups:
        ids = row_pages[rows, :num_pages].clamp(min=0)
        own_sinks = None if sinks is None else sinks[rows]
        group = _Group(queries[rows], ids, lengths[rows], own_sinks)
        out[rows] = _attend_group(group, keys, values, features).to(q.dtype)
    return out.view(batch, num_heads, head_dim)


def _last_pages(pages: Tensor, lengths: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The pages [n, P] of each row that its window touches, to the front, and the tokens in them [n]."""
    behind = (lengths - window).clamp_min(0) // PAGE_SIZE  # [n] whole pages
    width = min(pages.shape[1], (window - 1) // PAGE_SIZE + 2)
    places = behind[:, None] + torch.arange(width, device=pages.device)
    return pages.gather(1, places.clamp_max(pages.shape[1] - 1).long()), lengths - behind * PAGE_SIZE


def _selected_units(pages: Tensor, selection: RowSelection) -> Tensor:
    """Where the selected units are: [n, K] int32 into the pool cut into units. pages [n, P]."""
    per_page = PAGE_SIZE // selection.unit
    ids = selection.ids.flatten(0, 1)
    of_page = pages.gather(1, (ids // per_page).clamp(0, pages.shape[1] - 1).long())
    return of_page * per_page + ids % per_page


def _groups(lengths: Tensor, page_size: int, head_dim: int) -> list[tuple[Tensor, int]]:
    """Rows that hold something, in groups of similar length and bounded size; pages of the longest."""
    sizes = -(-lengths.cpu().numpy() // page_size)
    order = sizes.argsort(kind="stable")
    ascending, groups, end = sizes[order], [], len(order)
    while end and ascending[end - 1]:
        longest = int(ascending[end - 1])
        similar = int(np.searchsorted(ascending, max(1, longest * SHORTEST_IN_GROUP)))
        first = max(similar, end - max(1, GROUP_ELEMENTS // (longest * page_size * head_dim)))
        groups.append((torch.from_numpy(order[first:end]).to(lengths.device), longest))
        end = first
    return groups


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of similar length."""

    q: Tensor  # [n, G, D] float32, scaled
    pages: Tensor  # [n, P]
    lengths: Tensor  # [n] in [1, P * page size]
    sinks: Tensor | None  # [n, G] float32


@dataclass(frozen=True, slots=True)
class _Pages:
    """Keys or values, to be gathered by page id."""

    pool: Tensor  # [num_pages, page size, D]
    scales: Tensor | None  # [num_pages, page size], of codes
    gathered: Tensor  # [at least the pages of a group, page size, D], overwritten

    def of(self, ids: Tensor) -> Tensor:
        """float32 [n, P * page size, D], which may be overwritten. ids [n, P]."""
        read = torch.index_select(self.pool, 0, ids.flatten(), out=self.gathered[: ids.numel()])
        if self.scales is None:
            read = read.float()
        else:
            read = dequantise(read, self.scales.index_select(0, ids.flatten()), torch.float32)
        return read.view(ids.shape[0], -1, self.pool.shape[2])


def _attend_group(group: _Group, keys: _Pages, values: _Pages, features: Features) -> Tensor:
    """float32 [n, G, D]. The keys are read, then the values: both may be gathered in the same place."""
    q, lengths = group.q, group.lengths
    k = keys.of(group.pages)
    places = torch.arange(k.shape[1], device=q.device)
    unheld = places >= lengths[:, None]  # [n, tokens]
    unseen = unheld if features.window is None else unheld | (places < lengths[:, None] - features.window)
    scores = torch.bmm(q, k.transpose(1, 2))
    if features.softcap is not None:
        scores.div_(features.softcap).tanh_().mul_(features.softcap)
    scores.masked_fill_(unseen.unsqueeze(1), -torch.inf)
    if group.sinks is not None:
        scores = torch.cat([scores, group.sinks.unsqueeze(-1)], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    v = values.of(group.pages)
    # What is not held may be anything, and 0 * NaN is NaN. Few tokens per row: by index, not by mask.
    v.flatten(0, 1).index_fill_(0, unheld.flatten().nonzero().squeeze(1), 0)
    return torch.bmm(weights, v)
