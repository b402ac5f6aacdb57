"""Files of SeerAttention's gates: the weights of every layer, checked. What a file holds is never run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.gate_weights import check_layer, read_layers
from configs.model import ModelInfo

PREFIX = "model.layers.{layer}.self_attn.attn_gate.mask_linear_"
LINEAR_Q, LINEAR_K = "mask_linear_q", "mask_linear_k"


@dataclass(frozen=True, slots=True)
class Gate:
    """The weights of one layer, float32. y = x @ W, head by head."""

    k: Tensor  # [H, 3 D, D] of pooled keys (max | min | mean): a gate per query head, or, with q, per KV head
    q: Tensor | None  # [Hq, D, D] of mean queries; None = they are taken as they are

    def to(self, device: torch.device) -> "Gate":
        return Gate(self.k.to(device), None if self.q is None else self.q.to(device))


def read_gates(path: Path, model: ModelInfo) -> list[Gate]:
    """The gate of every layer. ValueError says what does not fit.

    The form is that of published checkpoints: tensors named model.layers.I.self_attn.attn_gate.mask_linear_k
    (and _q).weight, of every layer, and nothing else.
    """
    layers = read_layers(path, (LINEAR_Q, LINEAR_K), model)
    with_q = sum(LINEAR_Q in weights for weights in layers)
    if with_q not in (0, len(layers)):
        raise ValueError(f"gates: {path} has mask_linear_q for {with_q} of {len(layers)} layers")
    return [_gate(weights, layer, path, model) for layer, weights in enumerate(layers)]


def write_gates(path: Path, gates: list[Gate]) -> None:
    """A .safetensors file that read_gates reads."""
    weights = {}
    for layer, gate in enumerate(gates):
        prefix = PREFIX.format(layer=layer)
        weights[f"{prefix}k.weight"] = gate.k
        if gate.q is not None:
            weights[f"{prefix}q.weight"] = gate.q
    save_file(weights, path)


def _gate(weights: dict[str, Tensor], layer: int, path: Path, model: ModelInfo) -> Gate:
    size, q = model.head_dim, weights.get(LINEAR_Q)
    heads = model.num_query_heads if q is None else model.num_kv_heads
    shapes: dict[str, tuple[int, ...]] = {LINEAR_K: (heads, 3 * size, size)}
    if q is not None:
        shapes[LINEAR_Q] = (model.num_query_heads, size, size)
    check_layer(weights, shapes, layer, path, model)
    return Gate(weights[LINEAR_K].float(), None if q is None else q.float())
