"""The seam into HuggingFace: one attention callable for every model, and the place where selection and
cache meet.

    model.forward(input_ids (1, T), batch=ForwardBatch) -> ... module -> attention(query (1, Hq, T, D), ...)
    -> batch.attend

The tokens of a forward are packed: one token of every decoding sequence first, then the chunks of prompts.
Keys and values are those of the new tokens only; the callable writes them into pages, then reads what plan
and policy say.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from engine.kernels import Kernels
from engine.plans import ResolvedPlan
from engine.rope import Rope
from kvcache.cache import KVCache
from kvcache.decode import Rows
from sparse.base import Chunk, PrefillMethod
from sparse.dense import Dense
from sparse.recall import causal_cells, raise_to_floor, read_cells, recall

IMPLEMENTATION = "farspan"  # the name transformers knows our attention by
RECALL_LAYERS = 4  # recall is sampled on every fourth layer, another quarter with every chunk

DENSE = Dense()


@dataclass(slots=True, eq=False)
class ChunkRun:
    """One prompt chunk in this forward, and what its layers find out."""

    chunk: Chunk
    plan: ResolvedPlan
    span: slice  # its part of the packed tokens
    destinations: Tensor  # [L, Hkv, Tq] int64 into the flattened pool
    dense: bool  # the plan's outcome for this prompt
    read_cells: list[Tensor] = field(default_factory=list)  # one scalar a layer, on the device
    causal_cells: int = 0
    recalls: list[Tensor] = field(default_factory=list)  # [Hq, rows] each
    keep: list[Tensor | None] = field(default_factory=list)  # bool [Hkv, N] by layer, once the prompt ends

    def method(self, layer: int) -> PrefillMethod:
        return DENSE if self.dense else self.plan.methods[layer]

    def samples_recall(self, layer: int) -> bool:
        if self.plan.recall_floor is not None:
            return True  # the floor is a promise about every layer
        turn = self.chunk.start // self.plan.chunk
        return (layer + turn) % RECALL_LAYERS == 0


@dataclass(slots=True, eq=False)
class ForwardBatch:
    """All that one forward's attention needs, travelling through HuggingFace's modules as one keyword
    argument."""

    cache: KVCache
    kernels: Kernels
    rope: Rope
    positions: Tensor  # [T] int64, of the packed tokens
    num_decodes: int = 0
    decode_destinations: Tensor | None = None  # [L, B, Hkv] int64 into the flattened pool
    rows: Rows | None = None
    decode_plan: ResolvedPlan | None = None  # its decode method serves every decode of this forward
    runs: list[ChunkRun] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [Hq, T, D], k and v [Hkv, T, D] of the new tokens, after RoPE -> out [T, Hq, D]."""
        num_heads, num_tokens, head_dim = q.shape
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
        if self.num_decodes:
            self._attend_decodes(layer, q, k, v, scale, out[: self.num_decodes])
        for run in self.runs:
            self._attend_chunk(
                run, layer, q[:, run.span], k[:, run.span], v[:, run.span], scale, out[run.span]
            )
        return out

    def _attend_decodes(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """One token of each decoding sequence: q [Hq, T, D], k and v [Hkv, T, D] -> out [B, Hq, D]."""
        assert self.rows is not None and self.decode_destinations is not None and self.decode_plan is not None
        cache, rows, new = self.cache, self.rows, slice(0, self.num_decodes)
        cache.write(k[:, new].transpose(0, 1), v[:, new].transpose(0, 1), self.decode_destinations[layer])
        queries = q[:, new].transpose(0, 1)

        def pre_rope() -> Tensor:
            return self.rope.unrotate(q[:, new], self.positions[new]).transpose(0, 1)

        read = self.decode_plan.decode.select(layer, queries, pre_rope, rows, cache.states)
        assert read is None, (
            "attention over a part of what rows hold comes with the first method that selects"
        )
        pages, held = rows.pages[layer], rows.held[layer]
        pool = cache.pool
        out.copy_(
            self.kernels.attend_rows(
                queries, pool.k, pool.v, pages, held, scale=scale, max_held=rows.max_held
            )
        )

    def _attend_chunk(
        self, run: ChunkRun, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor
    ) -> None:
        """One chunk of a prompt: q [Hq, Tq, D], k and v [Hkv, Tq, D] -> out [Tq, Hq, D]."""

        def pre_rope() -> tuple[Tensor, Tensor]:
            positions = self.positions[run.span]
            return self.rope.unrotate(q, positions), self.rope.unrotate(k, positions)

        chunk = replace(run.chunk, pre_rope=pre_rope)
        self.cache.write(k, v, run.destinations[layer])
        keys = self.cache.view(chunk.slot, layer, chunk.start + chunk.length)
        selection = run.method(layer).select(layer, q, keys, chunk, scale=scale)
        if not selection.is_dense and run.samples_recall(layer):
            found = recall(q, keys, chunk, selection, scale=scale)
            run.recalls.append(found)
            if run.plan.recall_floor is not None:
                selection = raise_to_floor(selection, found, run.plan.recall_floor)
        out.copy_(self.kernels.attend(q, keys, chunk, selection, scale=scale).out.transpose(0, 1))
        run.read_cells.append(read_cells(selection, chunk, q.shape[0]))
        run.causal_cells += causal_cells(chunk, q.shape[0])
        if chunk.is_last:
            window = min(run.plan.policy.query_window, chunk.length)
            tail = q[:, chunk.length - window :]
            run.keep.append(run.plan.policy.after_prefill(layer, tail, keys, scale=scale))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    batch: ForwardBatch,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer. query (1, Hq, T, D), key and value (1, Hkv, T, D) -> (1, T,
    Hq, D).

    Source of the protocol: transformers' AttentionInterface. `kwargs` holds what dense attention has no use
    for.
    """
    for name, feature in {"softcap": softcap, "attention sinks": s_aux}.items():
        if feature is not None:
            raise ConfigError(f"model: {type(module).__name__} uses {name}, which our attention does not")
    # sliding_window: engine/models.py has made sure that no context is longer than the window.
    out = batch.attend(module.layer_idx, query[0], key[0], value[0], scaling)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


def register() -> None:
    """Make our attention known to transformers. No mask function: masks are ours, and theirs would
    synchronise."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
