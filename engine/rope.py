"""The rotations of a model, taken back or applied: for methods that score queries and keys before RoPE."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.models import rotates_layer

INTERLEAVED = {"cohere2", "glm4"}  # model types that pair neighbours: (0, 1), (2, 3), ...; others pair halves


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """One rotation, as transformers applies it. Static ones only reach this point: engine/models.py."""

    frequencies: Tensor  # [R / 2] float32; R <= D dims are rotated, the first ones
    scaling: float  # attention_scaling of yarn, which cos and sin are multiplied by; 1 for all others
    interleaved: bool

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [H, T, D] before RoPE, positions [T] -> [H, T, D] after."""
        angles = positions[:, None] * self.frequencies  # [T, R / 2]
        return self._turn(x, angles.cos() * self.scaling, angles.sin() * self.scaling)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [H, T, D] after RoPE, positions [T] -> [H, T, D] before. Orthogonal up to scaling."""
        return self._turn(x, *self.undoing(positions))

    def undoing(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, R / 2] each, that `undo` turns by."""
        angles = positions[:, None] * self.frequencies
        return angles.cos() / self.scaling, -angles.sin() / self.scaling

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Every pair (a, b) of x [H, T, D] becomes (a cos - b sin, b cos + a sin); cos and sin [T, R / 2]."""
        half = self.frequencies.numel()
        rotated, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
        shape, axis = ((half, 2), -1) if self.interleaved else ((2, half), -2)
        pairs = rotated.reshape(*x.shape[:-1], *shape)
        first, second = pairs.unbind(axis)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=axis)
        return torch.cat((turned.flatten(-2).to(x.dtype), rest), dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """The rotations of a model, layer by layer."""

    rotations: tuple[Rotation | None, ...]  # [L]; None = the layer rotates nothing

    @classmethod
    def of(cls, model: Any) -> "Rope":
        """From a transformers causal language model."""
        embedding, config = model.get_decoder().rotary_emb, model.config
        interleaved = config.model_type in INTERLEAVED
        by_type: dict[str, Rotation] = {}  # of models whose layer types rotate differently
        for kind in getattr(embedding, "layer_types", ()):
            frequencies = getattr(embedding, f"{kind}_inv_freq").float()
            scaling = float(getattr(embedding, f"{kind}_attention_scaling"))
            by_type[kind] = Rotation(frequencies, scaling, interleaved)
        if not by_type:
            one = Rotation(embedding.inv_freq.float(), float(embedding.attention_scaling), interleaved)
            rotates = [rotates_layer(config, layer) for layer in range(config.num_hidden_layers)]
            return cls(tuple(one if does else None for does in rotates))
        return cls(tuple(by_type[kind] for kind in config.layer_types))

    def unrotate(self, x: Tensor, positions: Tensor, layer: int) -> Tensor:
        """x [H, T, D] of a layer after RoPE, positions [T] -> [H, T, D] before."""
        rotation = self.rotations[layer]
        return x if rotation is None else rotation.undo(x, positions)
