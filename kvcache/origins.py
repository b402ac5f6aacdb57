"""Origins: which positions the tokens of a packed sequence have, as lists that end where appending began.

    unit 1 (compacted)   ids = kept positions       token i of a row is at ids[i]
    unit 64 (packed)     ids = blocks of pages      token i of a row is at ids[i // 64] * 64 + i % 64

Tokens after the list of their row count on from `start`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Origins:
    """Never changed: what is appended later needs no entry, and where pages leave there are new origins."""

    ids: Tensor  # [L, Hkv, K] int32, ascending, -1 = none (only at the end of a row)
    counts: Tensor  # [L, Hkv] int32: entries of a row
    unit: int  # tokens per entry: 1 or PAGE_SIZE
    start: int  # position of the first token after the listed entries
    host_ids: NDArray[np.int32] | None = (
        None  # of unit PAGE_SIZE: `ids` on the host, since pages may still leave
    )

    @classmethod
    def of_blocks(cls, blocks: NDArray[np.int32], start: int, device: torch.device) -> "Origins":
        """Rows of whole pages. blocks [L, Hkv, K] by place, -1 = none, only at the end of a row."""
        counts = (blocks >= 0).sum(-1, dtype=np.int32)
        ids = np.ascontiguousarray(blocks[..., : counts.max()], dtype=np.int32)
        return cls(
            ids=torch.from_numpy(ids).to(device),
            counts=torch.from_numpy(counts).to(device),
            unit=PAGE_SIZE,
            start=start,
            host_ids=ids,
        )

    def blocks(self, num_places: int) -> NDArray[np.int32]:
        """Which block the page at each place of a row is, appended ones included: [L, Hkv, num_places]."""
        assert self.host_ids is not None, "compacted rows hold parts of blocks"
        place = np.arange(num_places, dtype=np.int32)
        counts = (self.host_ids >= 0).sum(-1, dtype=np.int32)[..., None]
        blocks: NDArray[np.int32] = place - counts + np.int32(self.start // PAGE_SIZE)
        listed = min(num_places, self.host_ids.shape[-1])
        blocks[..., :listed] = np.where(
            place[:listed] < counts, self.host_ids[..., :listed], blocks[..., :listed]
        )
        return blocks

    def positions(self, layer: int, num_held: Tensor, max_held: int) -> Tensor:
        """[Hkv, max_held] int32, -1 pad. num_held [Hkv] tokens held now."""
        place = torch.arange(max_held, dtype=torch.int32, device=self.ids.device)
        listed = self.counts[layer, :, None] * self.unit
        appended = place - listed + self.start
        ids = self.ids[layer]
        if ids.shape[1]:
            entry = (place // self.unit).clamp(max=ids.shape[1] - 1).long()
            kept = ids[:, entry] * self.unit + place % self.unit
            appended = torch.where(place < listed, kept, appended)
        return appended.masked_fill(place >= num_held[:, None], -1).int()
