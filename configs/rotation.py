"""Rotation: RoPE of one layer, as plug-ins see it."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Rotation(Protocol):
    """RoPE of one layer, static: the same for a position in every sequence."""

    @property
    def interleaved(self) -> bool:
        """Are neighbours turned together, (0, 1), (2, 3), ...? Else the halves of what is turned."""

    def apply(self, x: "Tensor", positions: "Tensor") -> "Tensor":
        """x [H, T, D] before RoPE, positions [T] -> [H, T, D] after."""

    def undo(self, x: "Tensor", positions: "Tensor") -> "Tensor":
        """x [H, T, D] after RoPE, positions [T] -> [H, T, D] before."""

    def undoing(self, positions: "Tensor") -> "tuple[Tensor, Tensor]":
        """cos and sin, [T, R / 2] float32 each, that `undo` turns by: R <= D dimensions, the first ones."""
