"""Features: what some model families do to attention beyond scale and causality."""

from __future__ import annotations  # torch is for type checkers only: the serving process never imports it

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Of one layer. None = the layer does not do it."""

    window: int | None = None  # key j is visible to query i where i - j < window
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sinks: Tensor | None = None  # [Hq] float32, natural log: a logit without a value in each row's softmax

    def __post_init__(self) -> None:
        assert self.window is None or self.window > 0, self.window
        assert self.softcap is None or self.softcap > 0, self.softcap


NO_FEATURES = Features()
