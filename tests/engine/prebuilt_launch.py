"""Launches on an absent GPU: `python -m tests.engine.prebuilt_launch DTYPE ...` says what was kept."""

import sys
from typing import Any

import torch
import triton

from engine.absent_gpu import pretend
from kvcache.kernels.triton_store import store
from kvcache.pool import PagePool
from kvcache.state import StateRegistry


def main(*names: str) -> None:
    gpu, cpu, said = pretend(90), torch.device("cpu"), []

    def listen(*, cache_hit: bool, **rest: Any) -> None:
        said.append("kept" if cache_hit else "compiled")

    triton.knobs.compilation.listener = listen
    for name in names:
        dtype = getattr(torch, name)
        pool = PagePool(4, 16, dtype=dtype, device=cpu, states=StateRegistry())
        k, v = torch.zeros(2, 2, 70, 16, dtype=dtype)
        store(pool, k, v, torch.arange(140).view(2, 70))
    assert gpu.kernels == len(names)
    print(*said)


if __name__ == "__main__":
    main(*sys.argv[1:])
