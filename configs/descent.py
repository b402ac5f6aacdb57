"""HiP's search: from a piece of keys down to one of them, halving, each time towards the better middle."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scores = Callable[[Tensor], Tensor]
"""How well keys suit a query, the best-suited where there are several: places int64 [..., C] -> [..., C]."""


def descend(scores: Scores, left: Tensor, right: Tensor, width: int) -> Tensor:
    """The best score met on the way down from each piece, -inf if it is empty: float32 [..., C].

    Pieces [left, right) [..., C] int64 have at most `width` keys. In each of floor(log2(width)) + 1 rounds
    a piece is halved, and goes on as the half whose middle key scores best; ties go right. So each round asks
    for 2 keys of a piece.
    """
    is_empty = left >= right
    left, right = left.masked_fill(is_empty, 0), right.masked_fill(is_empty, 1)
    best = torch.full(left.shape, float("-inf"), device=left.device)
    for _ in range(width.bit_length()):
        middle = (left + right) // 2
        probes = torch.cat(((left + middle) // 2, (middle + right) // 2), dim=-1)
        in_left, in_right = scores(probes).chunk(2, dim=-1)
        goes_left = in_left > in_right
        best = torch.maximum(best, torch.where(goes_left, in_left, in_right))
        left, right = torch.where(goes_left, left, middle), torch.where(goes_left, middle, right)
    return best.masked_fill_(is_empty, float("-inf"))


def check_stages(widths: Sequence[int], keep: Sequence[int], units: Sequence[int]) -> None:
    """Refuse stages that cannot follow each other: pieces of widths[i] keys, of which keep[i] keys go on.

    The last pieces are of one of these units.
    """
    for wider, width in zip(widths, widths[1:], strict=False):
        if width < 1 or wider % width or wider == width:
            raise ValueError(f"widths ({width}) must divide the {wider} before it, and be less")
    if widths[-1] not in units:
        raise ValueError(f"widths ({widths[-1]}) must end with {' or '.join(map(str, units))}")
    for kept, width in zip(keep, widths, strict=True):
        if kept < width or kept % width:
            raise ValueError(f"keep ({kept}) must be a multiple of the {width} keys of its pieces")
    for before, kept in zip(keep, keep[1:], strict=False):
        if kept > before:
            raise ValueError(f"keep ({kept}) must be at most the {before} of the stage before it")
