"""Origins: which positions the tokens of a packed sequence have, as lists that end where appending began.

    unit 1 (compacted)   ids = kept positions       token i of a row is at ids[i]
    unit 64 (packed)     ids = blocks of pages      token i of a row is at ids[i // 64] * 64 + i % 64

Tokens after the list of their row count on from `start`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Origins:
    """Fixed when the sequence is packed: tokens and pages appended later need no entry."""

    ids: Tensor  # [L, Hkv, K] int32, ascending, -1 = none (only at the end of a row)
    counts: Tensor  # [L, Hkv] int32: entries of a row
    unit: int  # tokens per entry: 1 or PAGE_SIZE
    start: int  # position of the first token after the listed entries

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
