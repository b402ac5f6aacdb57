"""Decode: what each row reads in a step, and the torch attention over rows that defines the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE, ModelInfo
from kvcache.state import StateRegistry

GROUP_ELEMENTS = 1 << 19  # keys gathered at once, in elements
SHORTEST_IN_GROUP = 0.75  # of the longest: bounds what padding costs


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of one decode step hold, the step's own tokens included. B slots, one new token each."""

    slots: Tensor  # [B] int64
    pages: Tensor  # [L, B, Hkv, P] int32 page ids by place, -1 = none
    held: Tensor  # [L, B, Hkv] int32 tokens
    max_held: int  # the largest of them, known on the host


@dataclass(frozen=True, slots=True)
class RowSelection:
    """The tokens that each row reads: unit `i` is the places `[i * unit, (i + 1) * unit)` of the row."""

    ids: Tensor  # [B, Hkv, K] int32 unit ids, ascending
    counts: Tensor  # [B, Hkv] int32: entries that count
    unit: int  # 16 or PAGE_SIZE


class DecodeMethod(Protocol):
    """A dataclass whose fields are its YAML options. Selects for all rows of a step; no host sync."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Once, before weights load: read files, declare page and slot state. Refuses with ValueError."""

    def select(
        self, layer: int, q: Tensor, q_pre_rope: Callable[[], Tensor], rows: Rows, states: StateRegistry
    ) -> RowSelection | None:
        """What each row reads in this layer, None = all it holds. q [B, Hq, D]; q_pre_rope() un-rotated."""


@dataclass(frozen=True)
class Full:
    """Read all that is held."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Needs nothing."""

    def select(
        self, layer: int, q: Tensor, q_pre_rope: Callable[[], Tensor], rows: Rows, states: StateRegistry
    ) -> RowSelection | None:
        return None


DECODE_METHODS = {"full": Full}


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
) -> Tensor:
    """Attention of one query token per sequence over what its rows hold: [B, Hq, D] in q's dtype.

    q [B, Hq, D], pools [num_pages, PAGE_SIZE, D], pages int32 [B, Hkv, P] by place, held int32 [B, Hkv], none
    over max_held. Scores, softmax and sums in float32; a row that holds nothing gives 0. Rows go in groups of
    similar length: one long row pads no short ones. A window is the last tokens that a row holds: rows of
    such a layer hold consecutive positions.
    """
    batch, num_heads, head_dim = q.shape
    num_rows, group_size = held.numel(), num_heads // held.shape[1]
    assert group_size * held.shape[1] == num_heads and pages.shape[:2] == held.shape
    assert max_held <= pages.shape[2] * PAGE_SIZE, f"{max_held} tokens in {pages.shape[2]} pages"
    queries = (q.float() * scale).reshape(num_rows, group_size, head_dim)
    lengths = held.reshape(num_rows)
    row_pages = pages.reshape(num_rows, -1)
    if features.window is not None:
        row_pages, lengths = _last_pages(row_pages, lengths, features.window)
    sinks = None
    if features.sinks is not None:
        sinks = features.sinks.float().view(-1, group_size).repeat(batch, 1)  # [B * Hkv, G]
    out = q.new_zeros(num_rows, group_size, head_dim)
    groups = _groups(lengths, head_dim)
    most_pages = max((len(rows) * num_pages for rows, num_pages in groups), default=0)
    gathered = k_pool.new_empty(
        most_pages, PAGE_SIZE, head_dim
    )  # reused: fresh memory costs more than the copy
    for rows, num_pages in groups:
        ids = row_pages[rows, :num_pages].clamp(min=0)
        own_sinks = None if sinks is None else sinks[rows]
        group = _Group(queries[rows], ids, lengths[rows], own_sinks)
        out[rows] = _attend_group(group, k_pool, v_pool, gathered, features).to(q.dtype)
    return out.view(batch, num_heads, head_dim)


def _last_pages(pages: Tensor, lengths: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The pages [n, P] of each row that its window touches, to the front, and the tokens in them [n]."""
    behind = (lengths - window).clamp_min(0) // PAGE_SIZE  # [n] whole pages
    width = min(pages.shape[1], (window - 1) // PAGE_SIZE + 2)
    places = behind[:, None] + torch.arange(width, device=pages.device)
    return pages.gather(1, places.clamp_max(pages.shape[1] - 1).long()), lengths - behind * PAGE_SIZE


def _groups(lengths: Tensor, head_dim: int) -> list[tuple[Tensor, int]]:
    """Rows that hold something, in groups of similar length and bounded size; pages of the longest."""
    sizes = -(-lengths.cpu().numpy() // PAGE_SIZE)
    order = sizes.argsort(kind="stable")
    ascending, groups, end = sizes[order], [], len(order)
    while end and ascending[end - 1]:
        longest = int(ascending[end - 1])
        similar = int(np.searchsorted(ascending, max(1, longest * SHORTEST_IN_GROUP)))
        first = max(similar, end - max(1, GROUP_ELEMENTS // (longest * PAGE_SIZE * head_dim)))
        groups.append((torch.from_numpy(order[first:end]).to(lengths.device), longest))
        end = first
    return groups


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of similar length."""

    q: Tensor  # [n, G, D] float32, scaled
    pages: Tensor  # [n, P]
    lengths: Tensor  # [n] in [1, P * PAGE_SIZE]
    sinks: Tensor | None  # [n, G] float32


def _attend_group(
    group: _Group, k_pool: Tensor, v_pool: Tensor, gathered: Tensor, features: Features
) -> Tensor:
    """float32 [n, G, D].

    gathered [at least n * P, PAGE_SIZE, D] is overwritten: first with the keys, then with the values.
    """
    q, pages, lengths = group.q, group.pages, group.lengths
    gathered = gathered[: pages.numel()]
    shape = (pages.shape[0], pages.shape[1] * PAGE_SIZE, q.shape[2])
    places = torch.arange(shape[1], device=q.device)
    unheld = places >= lengths[:, None]  # [n, tokens]
    unseen = unheld if features.window is None else unheld | (places < lengths[:, None] - features.window)
    keys = torch.index_select(k_pool, 0, pages.flatten(), out=gathered).view(shape)
    scores = torch.bmm(q, keys.float().transpose(1, 2))
    if features.softcap is not None:
        scores.div_(features.softcap).tanh_().mul_(features.softcap)
    scores.masked_fill_(unseen.unsqueeze(1), -torch.inf)
    if group.sinks is not None:
        scores = torch.cat([scores, group.sinks.unsqueeze(-1)], dim=-1)
    weights = scores.softmax(-1)[..., : shape[1]]
    values = torch.index_select(v_pool, 0, pages.flatten(), out=gathered).view(shape)
    # What is not held may be anything, and 0 * NaN is NaN. Few tokens per row: by index, not by mask.
    values.flatten(0, 1).index_fill_(0, unheld.flatten().nonzero().squeeze(1), 0)
    return torch.bmm(weights, values.float())
