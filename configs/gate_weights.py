"""Weights of gates as published for SeerAttention, read by layer and name, checked; never run."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.model import ModelInfo

SUFFIXES = (".pth", ".safetensors")


def read_layers(path: Path, names: tuple[str, ...], model: ModelInfo) -> list[dict[str, Tensor]]:
    """What a file holds of every layer, by name; ValueError says what does not fit.

    Published checkpoints name tensors model.layers.I.self_attn.attn_gate.NAME.weight. They must be of every
    layer of the model, and nothing else may be there.
    """
    pattern = re.compile(rf"model\.layers\.(\d+)\.self_attn\.attn_gate\.({'|'.join(names)})\.weight")
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _read(path).items():
        match = pattern.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(f"gates: {path} holds {name!r}, which is no weight of a gate")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if set(layers) != set(range(model.num_layers)):
        raise ValueError(
            f"gates: {path} has gates of {len(layers)} layers; {model.name} has {model.num_layers}, 0 to "
            f"{model.num_layers - 1}, and each needs one"
        )
    return [layers[layer] for layer in range(model.num_layers)]


def check_layer(
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    layer: int,
    path: Path,
    model: ModelInfo,
) -> None:
    """A layer has each of these weights in the shape that the model needs, and all are numbers."""
    for name, shape in shapes.items():
        found = weights.get(name)
        if found is None or tuple(found.shape) != shape:
            raise ValueError(
                f"gates: {path}: layer {layer} has {name} of shape "
                f"{None if found is None else list(found.shape)}; {model.name} needs {list(shape)}"
            )
        if not found.isfinite().all():
            raise ValueError(f"gates: {path}: layer {layer} has {name} with values that are no numbers")


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
