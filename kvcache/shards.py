"""Shards: the static pattern of S2-Attention: every head reads what is near, and a part of what is far."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE
from kvcache.reach import FOREVER

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shards:
    """Head h reads block j from block i >= j if j is near (i - j < local_blocks) or of the head's shard:

        (j + shift[h]) % vert_stride == 0

    and of the near ones, where local_stride is more than 1, its own and those of a finer shard. Blocks are
    counted from the start of the text: what moves with the query is only where `near` ends.
    """

    shifts: tuple[int, ...]  # by head
    local_blocks: int
    vert_stride: int
    local_stride: int = 1

    def reads(self, num_blocks: int) -> Mask:
        """The pattern itself: bool [H, i, j]."""
        i, j = np.arange(num_blocks)[:, None], np.arange(num_blocks)
        near = self._of_shard(j, self.local_stride)[:, None] | (i == j)
        read: Mask = (j <= i) & np.where(
            i - j < self.local_blocks, near, self._of_shard(j, self.vert_stride)[:, None]
        )
        return read

    def refuse_unless_monotone(self) -> None:
        """ValueError if a block that one query skips is read by a later one: pages could never leave."""
        period = math.lcm(self.vert_stride, self.local_stride)
        if not is_monotone(self.reads(self.local_blocks + 2 * period)):
            raise ValueError(
                f"local_stride ({self.local_stride}) must divide vert_stride ({self.vert_stride}): queries"
                " nearby would skip what later ones read, so that no block could ever be forgotten"
            )

    def refuse_unless_complete(self) -> None:
        """ValueError if some blocks are read by no head."""
        if self.union < 1:
            raise ValueError(
                f"vert_stride ({self.vert_stride}): the shards of {len(self.shifts)} heads hold"
                f" {100 * self.union:.0f}% of the far blocks, nobody reads the others;"
                f" {len(self.shifts)} would fit"
            )

    @property
    def union(self) -> float:
        """Part of the far blocks that some head reads."""
        return len({shift % self.vert_stride for shift in self.shifts}) / self.vert_stride

    def reach(self, num_blocks: int) -> NDArray[np.int64]:
        """Blocks of queries that read each block, its own first: [H, J]. Of a monotone pattern."""
        j = np.arange(num_blocks)
        near = np.where(self._of_shard(j, self.local_stride), self.local_blocks, 1)
        return np.where(self._of_shard(j, self.vert_stride), FOREVER, near)

    def _of_shard(self, blocks: NDArray[np.int64], stride: int) -> Mask:
        """[H, J]."""
        of_shard: Mask = (blocks + np.array(self.shifts)[:, None]) % stride == 0
        return of_shard


def is_monotone(reads: Mask) -> bool:
    """Is a block that one query block skips skipped by all later ones? reads [..., i, j]."""
    causal = np.tri(reads.shape[-2], reads.shape[-1], dtype=bool)
    again = ~reads[..., :-1, :] & reads[..., 1:, :] & causal[:-1]
    return not bool(again.any())


def pages_of_blocks(reach: NDArray[np.int64], block_size: int) -> NDArray[np.int32]:
    """Pages of queries that read each page, if its blocks are read for so many blocks of queries.

    reach [..., J] of blocks of `block_size` tokens, which divides a page -> [..., P].
    """
    per_page = PAGE_SIZE // block_size
    block = np.arange(reach.shape[-1])
    last = (block + reach - 1) // per_page  # the last page of queries that reads the block
    pages = (last - block // per_page + 1).reshape(*reach.shape[:-1], -1, per_page).max(-1)
    endless = (reach >= FOREVER).reshape(pages.shape + (per_page,)).any(-1)
    return np.where(endless, FOREVER, pages).astype(np.int32)
