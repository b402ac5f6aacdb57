"""PageTable: the page ids of every row. Like every SlotArray, true on the host and mirrored on the device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Slots = Sequence[int] | NDArray[np.int64]


class SlotArray:
    """`host` is the truth. `device` is the same memory on a CPU; elsewhere `sync` copies the touched slots.

    Tables change only between forwards, so `sync` is called between forwards and never inside the layer loop.
    """

    host: NDArray[np.int32]  # [S, ...]
    device: Tensor  # [S, ...] int32

    def __init__(self, shape: tuple[int, ...], fill: int, device: torch.device) -> None:
        self.host = np.full(shape, fill, dtype=np.int32)
        self._is_shared = device.type == "cpu"
        self.device = (
            torch.from_numpy(self.host) if self._is_shared else torch.tensor(self.host, device=device)
        )
        self._touched = np.zeros(shape[0], dtype=bool)

    @property
    def is_stale(self) -> bool:
        """The device does not yet know what the host wrote."""
        return not self._is_shared and bool(self._touched.any())

    def touch(self, slots: int | Slots) -> None:
        """The host rows of these slots were written."""
        self._touched[slots] = True

    def sync(self) -> None:
        """Bring the device up to date: one copy of the slots that were touched."""
        if self.is_stale:
            slots = np.flatnonzero(self._touched)
            copied = torch.from_numpy(self.host[slots]).to(self.device.device)
            self.device[torch.from_numpy(slots).to(self.device.device)] = copied
        self._touched[:] = False

    def check(self) -> None:
        """A mirror that is not stale says what the host says."""
        if not self._is_shared and not self.is_stale:
            assert np.array_equal(self.device.cpu().numpy(), self.host), "the device differs from the host"


class PageTable(SlotArray):
    """[S, L, Hkv, P] -> page id, -1 = none. Indexed by logical block in prefill, by place once packed."""

    def __init__(
        self, num_slots: int, num_layers: int, num_kv_heads: int, num_blocks: int, device: torch.device
    ):
        super().__init__((num_slots, num_layers, num_kv_heads, num_blocks), -1, device)
