"""Cards of plans: a resolved plan as clients may see it, layer by layer, without the server's paths."""

import dataclasses
from typing import Any

from engine.messages import LayerRun, Option
from kvcache.decode import DecodeMethod
from kvcache.policy import KVPolicy
from sparse.base import PrefillMethod
from sparse.methods import PREFILL_METHODS


def layer_runs(methods: tuple[PrefillMethod, ...]) -> tuple[LayerRun, ...]:
    """Neighbouring layers with the same method are one run."""
    runs: list[LayerRun] = []
    first = 0
    for layer, method in enumerate(methods):
        if layer + 1 == len(methods) or methods[layer + 1] != method:
            runs.append(LayerRun(first, layer, _name(method), options_of(method)))
            first = layer + 1
    return tuple(runs)


def options_of(plugin: PrefillMethod | KVPolicy | DecodeMethod) -> dict[str, Option]:
    """Its options with plain values; files are the server's own."""
    plain: Any = plugin  # every plug-in is a dataclass whose fields are its options
    values = {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plain) if field.init}
    return {
        name: value
        for name, value in values.items()
        if value is None or type(value) in (str, int, float, bool)
    }


def _name(method: PrefillMethod) -> str:
    return PREFILL_METHODS.name_of(type(method))
