"""How this processor multiplies bf16."""

import functools
from enum import IntEnum

import torch


class Bf16Products(IntEnum):
    """As the C++ kernels know it: the enum of cpu_attention.cpp."""

    WIDENED = 0  # to float32 first: it has no instruction for bf16
    BY_PAIRS = 1  # AVX512_BF16
    BY_TILES = 2  # AMX, through torch


@functools.cache
def bf16_products() -> Bf16Products:
    """The fastest way that it has."""
    if torch.cpu._is_amx_tile_supported():
        return Bf16Products.BY_TILES
    return Bf16Products.BY_PAIRS if torch.cpu._is_avx512_bf16_supported() else Bf16Products.WIDENED
