"""Files of SeerAttention's gates: the weights of every layer, checked. What a file holds is never run."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.model import ModelInfo

PREFIX = "model.layers.{layer}.self_attn.attn_gate.mask_linear_"
NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.attn_gate\.mask_linear_([qk])\.weight")
SUFFIXES = (".pth", ".safetensors")


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
    weights: dict[tuple[int, str], Tensor] = {}
    for name, tensor in _read(path).items():
        match = NAME.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(f"gates: {path} holds {name!r}, which is no weight of a gate")
        weights[int(match[1]), match[2]] = tensor
    layers = {layer for layer, _ in weights}
    if layers != set(range(model.num_layers)):
        raise ValueError(
            f"gates: {path} has gates of {len(layers)} layers; {model.name} has {model.num_layers}, 0 to "
            f"{model.num_layers - 1}, and each needs one"
        )
    with_q = {layer for layer, kind in weights if kind == "q"}
    if with_q and with_q != layers:
        raise ValueError(f"gates: {path} has mask_linear_q for {len(with_q)} of {len(layers)} layers")
    return [_gate(weights, layer, path, model) for layer in sorted(layers)]


def write_gates(path: Path, gates: list[Gate]) -> None:
    """A .safetensors file that read_gates reads."""
    weights = {}
    for layer, gate in enumerate(gates):
        prefix = PREFIX.format(layer=layer)
        weights[f"{prefix}k.weight"] = gate.k
        if gate.q is not None:
            weights[f"{prefix}q.weight"] = gate.q
    save_file(weights, path)


def _gate(weights: dict[tuple[int, str], Tensor], layer: int, path: Path, model: ModelInfo) -> Gate:
    size = model.head_dim
    q = weights.get((layer, "q"))
    wanted = {"k": (model.num_query_heads if q is None else model.num_kv_heads, 3 * size, size)}
    if q is not None:
        wanted["q"] = (model.num_query_heads, size, size)
    for kind, shape in wanted.items():
        found = weights.get((layer, kind))
        if found is None or tuple(found.shape) != shape:
            raise ValueError(
                f"gates: {path}: layer {layer} has mask_linear_{kind} of shape "
                f"{None if found is None else list(found.shape)}; {model.name} needs {list(shape)}"
            )
        if not found.isfinite().all():
            raise ValueError(
                f"gates: {path}: layer {layer} has mask_linear_{kind} with values that are no numbers"
            )
    return Gate(weights[layer, "k"].float(), None if q is None else q.float())


def _read(path: Path) -> dict[str, Tensor]:
    """What a file holds by name; `.pth` as weights only, since a pickle may hold code."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"gates: {path} must be a file that ends with {' or '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"gates: cannot read {path}: {first}") from error
    if not isinstance(found, dict):
        raise ValueError(f"gates: {path} holds a {type(found).__name__}, not weights by name")
    return found
