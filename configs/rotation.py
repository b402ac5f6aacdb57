"""Rotation: RoPE of one layer, as plug-ins see it."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Rotation(Protocol):
    """RoPE of one layer, static: the same for a position in every sequence."""

    def apply(self, x: "Tensor", positions: "Tensor") -> "Tensor":
        """x [H, T, D] before RoPE, positions [T] -> [H, T, D] after."""

    def undo(self, x: "Tensor", positions: "Tensor") -> "Tensor":
        """x [H, T, D] after RoPE, positions [T] -> [H, T, D] before."""
