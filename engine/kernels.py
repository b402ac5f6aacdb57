"""Which attention runs on a device: compiled kernels where they can be had, else the torch code behind
them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import kvcache.decode
import kvcache.kernels.cpu
import sparse.attention
import sparse.kernels.cpu
from sparse.attention import Attended
from sparse.base import Chunk, KeyView
from sparse.selection import Selection


class Attend(Protocol):
    """Attention of a chunk over what a selection names: see sparse.attention.attend."""

    def __call__(
        self, q: Tensor, keys: KeyView, chunk: Chunk, selection: Selection, *, scale: float
    ) -> Attended: ...


class AttendRows(Protocol):
    """Attention of one token per sequence over what its rows hold: see kvcache.decode.attend_rows."""

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
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """The two attentions of a forward."""

    attend: Attend = sparse.attention.attend
    attend_rows: AttendRows = kvcache.decode.attend_rows


def kernels_for(device: torch.device) -> Kernels:
    """The fastest that exists here; where a compiler is missing, the log has said so."""
    if device.type != "cpu":
        return Kernels()
    return Kernels(
        sparse.kernels.cpu.attend if sparse.kernels.cpu.is_available() else sparse.attention.attend,
        kvcache.kernels.cpu.attend_rows if kvcache.kernels.cpu.is_available() else kvcache.decode.attend_rows,
    )
