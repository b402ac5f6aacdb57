"""Files of head patterns as MInference publishes them: a pattern and two numbers per layer and query head."""

import json
from pathlib import Path
from typing import Any

from configs.model import ModelInfo
from sparse.head_patterns import NUMBERS, HeadPattern, head_pattern


def read_heads(path: Path, model: ModelInfo) -> list[list[HeadPattern]]:
    """The pattern of every layer and query head. ValueError names the key at fault and what would fit.

    A list of layers, each an object by query head: {"0": ["vertical_and_slash", 1000, 6096, 0.61], ...}. The
    last number says how well the pattern did when it was searched, and is not used.
    """
    try:
        layers = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"heads: cannot read {path}: {error}") from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"heads: {path} must be a list of layers, each an object by query head")
    if len(layers) != model.num_layers:
        raise ValueError(f"heads: {path} has {len(layers)} layers, {model.name} has {model.num_layers}")
    wanted = [str(head) for head in range(model.num_query_heads)]
    for index, layer in enumerate(layers):
        if set(layer) != set(wanted):
            raise ValueError(
                f"heads: {path}[{index}] has {len(layer)} heads ({', '.join(list(layer)[:3])}, ...), "
                f'{model.name} has {len(wanted)} query heads ("0" to "{wanted[-1]}")'
            )
    return [
        [_pattern(layer[head], f'{path}[{index}]["{head}"]') for head in wanted]
        for index, layer in enumerate(layers)
    ]


def _pattern(entry: Any, where: str) -> HeadPattern:
    if not isinstance(entry, list) or len(entry) not in (3, 4):
        raise ValueError(
            f'heads: {where} must be [pattern, number, number, score], like ["vertical_and_slash", 1000, '
            f"6096, 0.61], not {entry!r}"
        )
    name = entry[0]
    if not isinstance(name, str) or name not in NUMBERS:
        raise ValueError(f"heads: {where}[0] is {name!r}; it must be one of {', '.join(NUMBERS)}")
    for place, (number, least) in enumerate(NUMBERS[name], start=1):
        if type(entry[place]) is not int or entry[place] < least:
            raise ValueError(
                f"heads: {where}[{place}], {number}, must be an integer of at least {least}, "
                f"not {entry[place]!r}"
            )
    return head_pattern(name, entry[1], entry[2])
