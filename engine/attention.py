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

import kvcache.moves
from configs.features import Features
from engine.kernels import Kernels
from engine.plans import ResolvedPlan
from engine.rope import Rope
from kvcache.decode import DecodeMethod, Full, Queries, Rows, RowSelection
from kvcache.holdings import Holdings
from kvcache.kernels import cpu, cpu_store
from kvcache.kernels.cpu_step import WholeStep, serves
from kvcache.reach import Reach
from kvcache.state import NewKeys
from sparse.base import Chunk, KeyView, PrefillMethod
from sparse.delta import with_delta
from sparse.dense import Dense
from sparse.masks import intersect
from sparse.recall import causal_cells, raise_to_floor, read_cells_by_head, recall
from sparse.selection import ExactRows, Selection, dense

IMPLEMENTATION = "farspan"  # the name transformers knows our attention by
RECALL_LAYERS = 4  # recall is sampled on every fourth layer, another quarter with every chunk

DENSE = Dense()


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What a layer's own module says of its attention."""

    index: int
    scale: float
    features: Features


@dataclass(slots=True, eq=False)
class DecodeRun:
    """The sequences of one decode method in this forward: one new token of each."""

    method: DecodeMethod
    span: slice  # their part of the packed tokens
    destinations: Tensor  # [L, B, Hkv] int64 into the flattened pool
    rows: Rows
    selections: dict[int, RowSelection] = field(default_factory=dict)  # by layer, where not all is read
    windows: dict[int, int] = field(default_factory=dict)  # by layer, where there is one
    whole: WholeStep | None = None  # where storing and attending need no step between them

    def read_counts(self) -> Tensor:
        """By sequence: tokens read and readable, over layers and KV heads. int64 [2, B]."""
        held = self.rows.held.clone()  # [L, B, Hkv]
        for layer, window in self.windows.items():
            held[layer].clamp_max_(window)
        readable = read = held.sum((0, 2))
        if self.selections:
            chosen = self.selections.values()
            ids, counts = (
                torch.cat(parts) for parts in zip(*((s.ids, s.counts) for s in chosen), strict=True)
            )
            whole = torch.stack([held[layer] for layer in self.selections])
            lengths = RowSelection(ids, counts, next(iter(chosen)).unit).lengths(whole.flatten(0, 1))
            read = readable + (lengths.view_as(whole) - whole).sum((0, 2))
        return torch.stack((read, readable))


def whole_step(
    kernels: Kernels, cache: Holdings, method: DecodeMethod, destinations: Tensor, rows: Rows
) -> WholeStep | None:
    """Where all that is held is read, nothing follows new keys, and both kernels are those of the CPU."""
    is_plain = isinstance(method, Full) and not cache.states.is_kept_up and cache.dtype in cpu_store.DTYPES
    store = kvcache.moves.store if cache.pool.k_scales is None else cpu_store.store
    if not is_plain or kernels.attend_rows is not cpu.attend_rows or cache.moves.store is not store:
        return None
    return WholeStep(cache.pool, rows, destinations) if serves(cache.pool) else None


@dataclass(slots=True, eq=False)
class ChunkRun:
    """One prompt chunk in this forward, and what its layers find out."""

    chunk: Chunk
    plan: ResolvedPlan
    span: slice  # its part of the packed tokens
    destinations: Tensor  # [L, Hkv, Tq] int64 into the flattened pool
    dense: bool  # the plan's outcome for this prompt
    reach: Reach | None = None  # on the device: how long pages are read, where the policy knows in advance
    read_cells: list[Tensor] = field(default_factory=list)  # [Hq] a layer, on the device
    causal_cells: list[int] = field(default_factory=list)  # of one head, by layer
    recalls: list[Tensor] = field(default_factory=list)  # [Hq, rows] each
    below_floor: list[Tensor] = field(default_factory=list)  # bool: did this layer have to read more?
    knows_recall: bool = True  # not once keys have left that full attention would read
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

    cache: Holdings
    kernels: Kernels
    rope: Rope
    positions: Tensor  # [T] int64, of the packed tokens
    decodes: list[DecodeRun] = field(default_factory=list)  # one for each decode method
    runs: list[ChunkRun] = field(default_factory=list)

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [Hq, T, D], k and v [Hkv, T, D] of the new tokens, after RoPE -> out [T, Hq, D].

        A model may compute in float32 around keys and values of fewer bits.
        """
        kept = self.cache.dtype
        return self._attend(layer, q.to(kept), k.to(kept), v.to(kept)).to(q.dtype)

    def _attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(self.decodes) == 1 and not self.runs:
            return self._attend_decodes(self.decodes[0], layer, q, k, v)
        num_heads, num_tokens, head_dim = q.shape
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
        for step in self.decodes:
            new = (x[:, step.span] for x in (q, k, v))
            out[step.span] = self._attend_decodes(step, layer, *new)
        for run in self.runs:
            self._attend_chunk(run, layer, q[:, run.span], k[:, run.span], v[:, run.span], out[run.span])
        return out

    def attend_by_token(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same of q [T, Hq, D], k and v [T, Hkv, D], as few tokens come on a CPU."""
        if len(self.decodes) == 1 and not self.runs and self.decodes[0].whole is not None:
            return self.decodes[0].whole.attend(
                layer.index, q, k, v, scale=layer.scale, features=layer.features
            )
        return self.attend(layer, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))

    def _attend_decodes(self, step: DecodeRun, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token of each of B sequences: q [Hq, B, D], k and v [Hkv, B, D] -> [B, Hq, D]."""
        cache, rows, index = self.cache, step.rows, layer.index
        if step.whole is not None:
            new = (x.transpose(0, 1) for x in (q, k, v))
            return step.whole.attend(index, *new, scale=layer.scale, features=layer.features)
        destinations, positions = step.destinations[index], self.positions[step.span]
        rotation, keys = self.rope.rotations[index], k.transpose(0, 1)
        cache.write(keys, v.transpose(0, 1), destinations)
        cache.keep_up(NewKeys(index, keys, destinations, positions, rotation, is_chunk=False))
        queries = q.transpose(0, 1)
        read = None
        if layer.features.window is None:
            asked = Queries(queries, positions, rotation, self.kernels.best_units)
            read = step.method.select(index, asked, rows, cache.states)
        else:
            step.windows[index] = layer.features.window
        if read is not None:
            step.selections[index] = read
        pages, held = rows.pages[index], rows.held[index]
        pool = cache.pool
        return self.kernels.attend_rows(
            queries,
            pool.k,
            pool.v,
            pages,
            held,
            scale=layer.scale,
            max_held=rows.max_held,
            features=layer.features,
            selection=read,
            k_scales=pool.k_scales,
            v_scales=pool.v_scales,
        )

    def _attend_chunk(
        self, run: ChunkRun, layer: Layer, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> None:
        """One chunk of a prompt: q [Hq, Tq, D], k and v [Hkv, Tq, D] -> out [Tq, Hq, D]."""
        index, scale, features = layer.index, layer.scale, layer.features

        def pre_rope() -> tuple[Tensor, Tensor]:
            positions = self.positions[run.span]
            return self.rope.unrotate(q, positions, index), self.rope.unrotate(k, positions, index)

        chunk = replace(
            run.chunk,
            pre_rope=pre_rope,
            index=self.kernels.index,
            rotation=self.rope.rotations[index],
        )
        self.cache.write(k, v, run.destinations[index])
        new = NewKeys(
            index, k, run.destinations[index], self.positions[run.span], chunk.rotation, is_chunk=True
        )
        self.cache.keep_up(new)
        keys = self.cache.view(chunk.slot, index, chunk.start + chunk.length)
        selection = run.method(index).select(index, q, keys, chunk, scale=scale)
        if run.reach is not None and run.reach.masks[index]:
            selection = intersect(selection, run.reach.read_by(index, chunk.start, chunk.length), chunk)
            run.knows_recall &= not keys.has_holes
        if not selection.is_dense and run.knows_recall and run.samples_recall(index):
            found = recall(q, keys, chunk, selection, scale=scale, softcap=features.softcap)
            run.recalls.append(found)
            if run.plan.recall_floor is not None:
                run.below_floor.append((found.mean(-1) < run.plan.recall_floor).any())
                selection = raise_to_floor(selection, found, run.plan.recall_floor)
        if selection.exact is not None and (features.softcap is not None or features.sinks is not None):
            selection = self._exact_again(q, keys, chunk, selection, layer)
        rows = self.kernels.attend(q, keys, chunk, selection, scale=scale, features=features).out
        delta = None if selection.is_dense else run.plan.delta
        if delta is not None:
            rows = with_delta(rows, q, keys, chunk, selection, delta, scale=scale, features=features)
        out.copy_(rows.transpose(0, 1))
        run.read_cells.append(read_cells_by_head(selection, chunk, q.shape[0], features.window, delta))
        run.causal_cells.append(causal_cells(chunk, 1, features.window))
        if chunk.is_last:
            window = min(run.plan.policy.query_window, chunk.length)
            tail = q[:, chunk.length - window :]
            run.keep.append(run.plan.policy.after_prefill(index, tail, keys, scale=scale))

    def _exact_again(
        self, q: Tensor, keys: KeyView, chunk: Chunk, selection: Selection, layer: Layer
    ) -> Selection:
        """The rows that an estimator gave, with the softcap and sinks that estimators do not know."""
        assert selection.exact is not None
        num_rows = selection.exact.lse.shape[1]
        tail = replace(chunk, start=chunk.start + chunk.length - num_rows, length=num_rows)
        rows = self.kernels.attend(
            q[:, chunk.length - num_rows :],
            keys,
            tail,
            dense(q.device),
            scale=layer.scale,
            features=layer.features,
        )
        return replace(selection, exact=ExactRows(rows.out, rows.lse))


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
    sinks = None if s_aux is None else s_aux.detach().float()
    layer = Layer(module.layer_idx, scaling, Features(sliding_window, softcap, sinks))  # type: ignore[arg-type]
    return batch.attend(layer, query[0], key[0], value[0]).unsqueeze(0), None


def register() -> None:
    """Make our attention known to transformers. No mask function: masks are ours, and theirs would
    synchronise."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
