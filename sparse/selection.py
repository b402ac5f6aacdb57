"""Selection: which keys each block of queries reads: index lists that methods fill and one kernel reads.

query blocks are aligned to absolute position, so the first and last of a chunk may be partial:

    chunk.start = 96, query_block = 64, Tq = 160          block 0        block 1         block 2
                                                     rows  96..127     128..191        192..255
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import PAGE_SIZE

ALL = -1  # a count that means: every causal key (the list is not read)


@dataclass(frozen=True, slots=True)
class BlockLists:
    """One list of units of keys per (head, query block). A unit `i` is the keys `[i * unit, (i + 1) * unit)`.

    The list of (h, b) is `indices[starts[h, b] : starts[h, b] + counts[h, b]]`: ascending, no duplicates.
    Lists may have room to spare between them. The counts of pages may be ALL, those of gathered units never.
    Heads are 1 (shared by all), Hkv (shared by a group) or Hq.
    """

    starts: Tensor  # [H, B] int64 -> into indices
    counts: Tensor  # [H, B] int32, ALL = every causal key
    indices: Tensor  # [capacity] int32 unit ids; what no list covers means nothing
    unit: int  # keys per unit: PAGE_SIZE for whole pages; 1, 8 or 16 for the gathered part

    @property
    def num_heads(self) -> int:
        return self.counts.shape[0]


@dataclass(frozen=True, slots=True)
class ExactRows:
    """The last rows of a chunk, whose dense output a method already knows: its estimator read every key."""

    out: Tensor  # [Hq, R, D], the last R rows
    lse: Tensor  # [Hq, R] float32, natural log


@dataclass(frozen=True, slots=True)
class Correction:
    """Pages that a selection leaves out, each to count as 64 times its mean key and value."""

    k: Tensor  # [Hkv, P, D] float32
    v: Tensor  # [Hkv, P, D] float32
    left_out: Tensor  # [H, B, P] bool: full pages before a query block; H as that of the lists


@dataclass(frozen=True, slots=True)
class Selection:
    """The keys that a chunk's queries read. Parts never overlap; both are causal at unit granularity.

    Pages may contain keys after a query (those of the query block itself); attention masks those. Gathered
    units lie wholly before the first row of their query block, so they need no mask. Where the pages of a
    query block are ALL, its gathered list is not read: it would count keys twice.
    """

    query_block: int  # 64 or 128 rows, aligned to absolute position
    pages: BlockLists  # unit PAGE_SIZE, logical block ids
    gathered: BlockLists | None = None  # unit 1, 8 or 16, logical unit ids; same head axis as pages
    exact: ExactRows | None = None
    correction: Correction | None = None  # not where the pages of a query block are ALL
    estimator_rows: int = 0  # last rows seen by an estimator or forced dense: not for judging

    def __post_init__(self) -> None:
        assert self.query_block in (64, 128), self.query_block
        assert self.pages.unit == PAGE_SIZE, self.pages.unit
        if self.gathered is not None:
            assert self.gathered.unit in (1, 8, 16), self.gathered.unit
            assert self.gathered.num_heads == self.pages.num_heads
        if self.correction is not None:  # a page of which units were gathered has another mean
            assert self.gathered is None and self.exact is None and self.query_block == PAGE_SIZE

    @property
    def is_dense(self) -> bool:
        """Known on the host to read every causal key: made by `dense`, no list to look at."""
        return self.pages.indices.numel() == 0 and self.gathered is None and self.pages.counts.numel() == 0


def num_query_blocks(start: int, length: int, query_block: int) -> int:
    """Query blocks that rows [start, start + length) touch."""
    return (start + length - 1) // query_block - start // query_block + 1


def dense(device: torch.device) -> Selection:
    """Every causal key, without lists."""
    empty = torch.empty(0, 0, dtype=torch.int64, device=device)
    lists = BlockLists(empty, empty.int(), torch.empty(0, dtype=torch.int32, device=device), PAGE_SIZE)
    return Selection(query_block=64, pages=lists)


def pack(ids: Tensor, keep: Tensor, width: int) -> Tensor:
    """Move kept ids to the front, in order: [..., U] -> int32 [..., width], zeros behind. No host sync.

    ids broadcasts to keep, whose rows may not keep more than `width` ids.
    """
    rank = keep.cumsum(-1) - 1  # [..., U] place of a kept id among the kept
    place = torch.where(keep, rank, width)  # those not kept share one extra place, cut off below
    packed = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int32, device=keep.device)
    return packed.scatter_(-1, place, ids.int().expand_as(keep))[..., :width]


def lists_from_ids(ids: Tensor, keep: Tensor, unit: int) -> BlockLists:
    """Index lists of the ids where keep is True. keep [H, B, U] bool, ids ascending, broadcast to it.

    Every list has room for U ids: packing them tightly would need their number on the host, a sync.
    """
    num_heads, num_blocks, width = keep.shape
    starts = torch.arange(num_heads * num_blocks, device=keep.device).view(num_heads, num_blocks) * width
    return BlockLists(starts, keep.sum(-1, dtype=torch.int32), pack(ids, keep, width).flatten(), unit)


def lists_from_mask(mask: Tensor, unit: int) -> BlockLists:
    """Index lists of the True cells. mask [H, B, U] bool, U = number of units. No host sync."""
    return lists_from_ids(torch.arange(mask.shape[-1], device=mask.device), mask, unit)


def mask_from_lists(lists: BlockLists, blocks: Tensor, num_units: int) -> Tensor:
    """The units in the lists of some query blocks, as bool [H, R, num_units]. blocks [R]. No host sync."""
    counts, starts = lists.counts[:, blocks, None], lists.starts[:, blocks, None]
    capacity = lists.indices.shape[0]
    mask = torch.zeros(*counts.shape[:2], num_units + 1, dtype=torch.bool, device=counts.device)
    if capacity:
        places = torch.arange(num_units, device=counts.device)  # a list has no duplicates: it is never longer
        ids = lists.indices[(starts + places).clamp_max(capacity - 1)].long()
        mask.scatter_(-1, torch.where(places < counts, ids, num_units), True)  # one extra unit for no unit
    return mask[..., :num_units]
