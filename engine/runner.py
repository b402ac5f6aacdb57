"""ModelRunner: one forward of the model over a batch, and the tokens sampled from it. Owns the model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import ChunkRun, ForwardBatch
from engine.kernels import Kernels
from engine.rope import Rope
from engine.sampler import SampledRow, sample
from engine.scheduler import Batch, ChunkPlan
from engine.sequence import Sequence
from kvcache.cache import KVCache
from sparse.base import Chunk


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens by sequence, for those whose computed tokens caught up, and what the prompts' chunks found
    out."""

    tokens: dict[Sequence, int]
    runs: list[tuple[ChunkPlan, ChunkRun]]


class ModelRunner:
    """Packs sequences into one row of tokens, runs HuggingFace's own module code over it, and samples."""

    def __init__(self, model: Any, cache: KVCache, kernels: Kernels, device: torch.device) -> None:
        self._model = model
        self._rope = Rope.of(model)
        self._cache = cache
        self._kernels = kernels
        self._device = device

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        tokens, positions = (torch.from_numpy(part).to(self._device) for part in self._pack(batch))
        forward, runs = self._prepare(batch, positions)
        last_rows, sampled = self._rows_to_sample(batch)
        logits = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            logits_to_keep=torch.tensor(last_rows, dtype=torch.int64, device=self._device),
            use_cache=False,
            batch=forward,
        ).logits[0]
        if not sampled:
            return StepResult({}, runs)
        rows = [SampledRow(sequence.sampling, len(sequence.tokens)) for sequence in sampled]
        return StepResult(dict(zip(sampled, sample(logits, rows), strict=True)), runs)

    def _prepare(
        self, batch: Batch, positions: Tensor
    ) -> tuple[ForwardBatch, list[tuple[ChunkPlan, ChunkRun]]]:
        """Pages for what this forward writes, and where each part of it goes."""
        cache = self._cache
        slots = np.array([slot_of(sequence) for sequence in batch.decodes], dtype=np.int64)
        if slots.size:
            cache.reserve_next(slots)
        for part in batch.chunks:
            cache.reserve(slot_of(part.sequence), part.end)
        cache.sync()
        forward = ForwardBatch(cache, self._kernels, self._rope, positions, num_decodes=slots.size)
        if slots.size:
            forward.decode_destinations = cache.decode_destinations(slots)
            forward.rows = cache.decode_rows(slots)
            forward.decode_plan = batch.decodes[0].plan
        first = slots.size
        runs = []
        for part in batch.chunks:
            run = self._chunk_run(part, slice(first, first + part.length))
            forward.runs.append(run)
            runs.append((part, run))
            first += part.length
        return forward, runs

    def _chunk_run(self, part: ChunkPlan, span: slice) -> ChunkRun:
        sequence = part.sequence
        slot = slot_of(sequence)
        return ChunkRun(
            chunk=Chunk(
                start=part.start,
                length=part.length,
                prompt_length=sequence.prompt_length,
                total_length=sequence.total_length,
                slot=slot,
            ),
            plan=sequence.plan,
            span=span,
            destinations=self._cache.prefill_destinations(slot, part.start, part.length),
            dense=sequence.plan.is_dense(sequence.prompt_length),
        )

    @staticmethod
    def _pack(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and positions of the packed row, int64 [T] each."""
        tokens = [np.array([s.tokens[s.computed] for s in batch.decodes], dtype=np.int64)]
        positions = [np.array([s.computed for s in batch.decodes], dtype=np.int64)]
        for part in batch.chunks:
            tokens.append(np.array(part.sequence.tokens[part.start : part.end], dtype=np.int64))
            positions.append(np.arange(part.start, part.end, dtype=np.int64))
        return np.concatenate(tokens), np.concatenate(positions)

    @staticmethod
    def _rows_to_sample(batch: Batch) -> tuple[list[int], list[Sequence]]:
        """Packed rows whose next token is not known yet: replayed tokens are fed, not sampled."""
        rows, sampled = [], []
        end = 0
        for sequence in batch.decodes:
            end += 1
            if sequence.computed + 1 == len(sequence.tokens):
                rows.append(end - 1)
                sampled.append(sequence)
        for part in batch.chunks:
            end += part.length
            if part.end == len(part.sequence.tokens):
                rows.append(end - 1)
                sampled.append(part.sequence)
        return rows, sampled


def slot_of(sequence: Sequence) -> int:
    """The slot of an admitted sequence."""
    assert sequence.slot is not None, f"{sequence.request_id} is not admitted"
    return sequence.slot
