"""Taking a rotation back: queries and keys as they were before RoPE, for methods that score unrotated
ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """The rotation of a model, as transformers applies it: halves paired, cos and sin scaled by `scaling`.

    Only static rotations reach this point (engine/models.py), so the frequencies never change.
    """

    frequencies: Tensor  # [R / 2] float32; R <= D dims are rotated, the first ones
    scaling: float  # attention_scaling of yarn; 1 for all others

    @classmethod
    def of(cls, model: Any) -> "Rope":
        """The rotary embedding of a transformers decoder."""
        embedding = model.get_decoder().rotary_emb
        return cls(embedding.inv_freq.float(), float(embedding.attention_scaling))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [H, T, D] after RoPE, positions [T] -> [H, T, D] before. The rotation is orthogonal up to
        scaling."""
        angles = positions[:, None] * self.frequencies  # [T, R / 2]
        cos, sin = angles.cos(), angles.sin()
        half = self.frequencies.numel()
        first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
        back = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1) / self.scaling
        return torch.cat((back.to(x.dtype), rest), dim=-1)
