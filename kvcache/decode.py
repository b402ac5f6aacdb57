"""Decode: what each row reads in a step, and the torch attention over rows that defines the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

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
    q: Tensor, k_pool: Tensor, v_pool: Tensor, pages: Tensor, held: Tensor, *, scale: float, max_held: int
) -> Tensor:
    """Attention of one query token per sequence over what its rows hold: [B, Hq, D] in q's dtype.

    q [B, Hq, D], pools [num_pages, PAGE_SIZE, D], pages int32 [B, Hkv, P] by place, held int32 [B, Hkv], none
    over max_held. Scores, softmax and sums in float32; a row that holds nothing gives 0. Rows go in groups of
    similar length: one long row pads no short ones.
    """
    batch, num_heads, head_dim = q.shape
    num_rows, group_size = held.numel(), num_heads // held.shape[1]
    assert group_size * held.shape[1] == num_heads and pages.shape[:2] == held.shape
    assert max_held <= pages.shape[2] * PAGE_SIZE, f"{max_held} tokens in {pages.shape[2]} pages"
    queries = (q.float() * scale).reshape(num_rows, group_size, head_dim)
    lengths = held.reshape(num_rows)
    row_pages = pages.reshape(num_rows, -1)
    out = q.new_zeros(num_rows, group_size, head_dim)
    groups = _groups(lengths, head_dim)
    most_pages = max((len(rows) * num_pages for rows, num_pages in groups), default=0)
    gathered = k_pool.new_empty(
        most_pages, PAGE_SIZE, head_dim
    )  # reused: fresh memory costs more than the copy
    for rows, num_pages in groups:
        ids = row_pages[rows, :num_pages].clamp(min=0)
        result = _attend_group(queries[rows], k_pool, v_pool, ids, lengths[rows], gathered)
        out[rows] = result.to(q.dtype)
    return out.view(batch, num_heads, head_dim)


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


def _attend_group(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, pages: Tensor, lengths: Tensor, gathered: Tensor
) -> Tensor:
    """q [n, G, D] float32, scaled; pages [n, P]; lengths [n] in [1, P * PAGE_SIZE] -> float32 [n, G, D].

    gathered [at least n * P, PAGE_SIZE, D] is overwritten: first with the keys, then with the values.
    """
    gathered = gathered[: pages.numel()]
    shape = (pages.shape[0], pages.shape[1] * PAGE_SIZE, q.shape[2])
    unheld = torch.arange(shape[1], device=q.device) >= lengths[:, None]  # [n, tokens]
    keys = torch.index_select(k_pool, 0, pages.flatten(), out=gathered).view(shape)
    scores = torch.bmm(q, keys.float().transpose(1, 2))
    weights = scores.masked_fill_(unheld.unsqueeze(1), -torch.inf).softmax(-1)
    values = torch.index_select(v_pool, 0, pages.flatten(), out=gathered).view(shape)
    # What is not held may be anything, and 0 * NaN is NaN. Few tokens per row: by index, not by mask.
    values.flatten(0, 1).index_fill_(0, unheld.flatten().nonzero().squeeze(1), 0)
    return torch.bmm(weights, values.float())
