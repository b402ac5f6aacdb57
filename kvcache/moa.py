"""MoA: every head reads a sink and a span of its own, which grows with the text. https://arxiv.org/abs/2406.14909"""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.pool import pages_for
from kvcache.reach import FOREVER
from kvcache.state import StateRegistry
from kvcache.static_policy import StaticPolicy, by_kv_head, density

SINK_PAGES = 1  # the first 64 tokens, as published
LEAST_SPAN = 2 * PAGE_SIZE  # tokens, the sink included, as published

log = logging.getLogger(__name__)


@dataclass
class MoA(StaticPolicy):
    """A head's span is alpha + beta * N tokens, sink included; N = prompt and the most that may be generated.

    Published plans give a span to every query head. A KV head keeps the longest of its group.
    """

    spans: Path | None = None  # JSON of alphas and betas, per layer and query (or KV) head
    alpha: float = 0.0  # tokens, of every head if there is no file
    beta: float = 0.5  # tokens per token of the whole text, of every head if there is no file
    _alphas: NDArray[np.float64] = field(init=False, repr=False, compare=False)  # [L, Hq or Hkv]
    _betas: NDArray[np.float64] = field(init=False, repr=False, compare=False)  # [L, Hq or Hkv]

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha ({self.alpha}) must be a number of tokens")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta ({self.beta}) must be 0 to 1: a part of the whole text")
        if self.spans is not None and (self.alpha, self.beta) != (MoA.alpha, MoA.beta):
            raise ValueError("alpha and beta have no effect beside spans: the file decides; leave them out")

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        super().attach(model, files, states)
        if self.spans is None:
            shape = (model.num_layers, model.num_kv_heads)
            self._alphas, self._betas = np.full(shape, self.alpha), np.full(shape, self.beta)
        else:
            self._alphas, self._betas = read_spans(files / self.spans, model)
        self._warn_of_groups()

    def prefill_key(self, total_length: int) -> bytes:
        """Texts of other lengths whose spans round to the same pages share."""
        return b"moa " + by_group(self._pages_of_spans(total_length), self.model).astype("<i4").tobytes()

    def page_reach(self, total_length: int) -> NDArray[np.int32]:
        return by_group(self._by_head(total_length), self.model)

    def _by_head(self, total_length: int) -> NDArray[np.int32]:
        """[L, Hq or Hkv, P]."""
        spans = self._pages_of_spans(total_length)
        reach = np.repeat(spans[..., None], pages_for(total_length), axis=-1)
        reach[..., :SINK_PAGES] = FOREVER
        return reach

    def _pages_of_spans(self, total_length: int) -> NDArray[np.int32]:
        """The span of every head without its sink, the page of the query included: [L, Hq or Hkv] pages."""
        span = np.trunc(self._alphas + self._betas * total_length)
        span = np.maximum(np.minimum(span, total_length), LEAST_SPAN)
        pages: NDArray[np.int32] = np.ceil(span / PAGE_SIZE).astype(np.int32) - SINK_PAGES
        return pages

    def _warn_of_groups(self) -> None:
        """Heads of a group share their keys: if their spans differ, the longest is paid for."""
        length = self.model.max_length
        published = density(self._by_head(length), length)
        kept = density(self.page_reach(length), length)
        if kept > 1.01 * published:
            log.warning(
                "moa: of query heads that share a KV head, the longest span is kept: %.0f%% of %d tokens"
                " instead of %.0f%%",
                100 * kept,
                length,
                100 * published,
            )


def by_group(per_head: NDArray[np.int32], model: ModelInfo) -> NDArray[np.int32]:
    """[L, Hq or Hkv, ...] -> [L, Hkv, ...], the longest of each group."""
    return per_head if per_head.shape[1] == model.num_kv_heads else by_kv_head(per_head, model)


def read_spans(path: Path, model: ModelInfo) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """alphas and betas, [L, Hq or Hkv] each. Published: {"alphas": layers of heads, "betas": the same}."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"spans: {path.name} is not JSON: {error}") from error
    if not isinstance(content, dict) or not {"alphas", "betas"} <= content.keys():
        raise ValueError(f"spans: {path.name} must hold the keys alphas and betas")
    alphas, betas = (
        _table(content[name], f"spans: {path.name}: {name}", model) for name in ("alphas", "betas")
    )
    if alphas.shape != betas.shape:
        raise ValueError(
            f"spans: {path.name}: alphas are {alphas.shape} and betas {betas.shape} layers x heads"
        )
    if ((betas < 0) | (betas > 1)).any():
        raise ValueError(
            f"spans: {path.name}: betas go from {betas.min()} to {betas.max()}, not within 0 to 1"
        )
    return alphas, betas


def _table(rows: Any, where: str, model: ModelInfo) -> NDArray[np.float64]:
    try:
        table = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not numbers by layer and head") from error
    heads = (model.num_query_heads, model.num_kv_heads)
    if table.ndim != 2 or table.shape[0] != model.num_layers or table.shape[1] not in heads:
        raise ValueError(
            f"{where} has the shape {table.shape}; {model.name} has {model.num_layers} layers of"
            f" {heads[0]} query heads and {heads[1]} KV heads"
        )
    if not np.isfinite(table).all():
        raise ValueError(f"{where}: every entry must be a finite number")
    return table
