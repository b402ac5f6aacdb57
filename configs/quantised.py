"""Quantised keys and values: codes of 8 bits and one float32 scale per token, so appending never rescales."""

import torch
from torch import Tensor

INT8, FP8 = torch.int8, torch.float8_e4m3fn
LARGEST = {INT8: 127.0, FP8: 448.0}  # code; of int8 the range is symmetric
SCALE_BYTES = 4


def is_quantised(dtype: torch.dtype) -> bool:
    """Are pages of this dtype codes, which mean something only with their scales?"""
    return dtype in LARGEST


def token_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """What the key (or the value) of one token takes in a page of this dtype, its scale included."""
    return head_dim * dtype.itemsize + (SCALE_BYTES if is_quantised(dtype) else 0)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., D] of tokens x [..., D], and their scales [...] float32: the largest element is exact.

    Rounds to the nearest code, ties to even. A token of zeros has the scale 0.
    """
    x = x.float()
    scales = x.abs().amax(-1) / LARGEST[dtype]
    codes = x / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return (codes.round() if dtype == INT8 else codes).to(dtype), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes [..., D] with scales [...] mean, in this dtype: the definition for every kernel."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)
