"""ModelRunner: one forward of the model over a batch, and the tokens sampled from it. Owns the model."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.grammars import BadGrammar
from engine.attention import ChunkRun, DecodeRun, ForwardBatch, whole_step
from engine.graphs import DecodeGraphs, Graph, StepTokens
from engine.kernels import Kernels
from engine.messages import Logprobs
from engine.rope import Rope
from engine.sampler import SampledRow, TokenCounts, has_penalties, logprobs_of, sample
from engine.scheduler import Batch, ChunkPlan
from engine.scoring import Heard, Scorer
from engine.sequence import Sequence, slot_of
from kvcache.cache import KVCache
from kvcache.decode import Full
from sparse.base import Chunk


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens by sequence, for those whose computed tokens caught up, and what the prompts' chunks found
    out."""

    tokens: dict[Sequence, int]
    runs: list[tuple[ChunkPlan, ChunkRun]]
    logprobs: dict[Sequence, Logprobs] = field(default_factory=dict)  # of those tokens, where asked for
    prompt_logprobs: dict[Sequence, list[Logprobs]] = field(default_factory=dict)  # of these chunks
    read: dict[Sequence, tuple[int, int]] = field(
        default_factory=dict
    )  # tokens read of those held, if chosen
    broken: dict[Sequence, str] = field(default_factory=dict)  # whose constraint cannot be followed, and why


class ModelRunner:
    """Packs sequences into one row of tokens, runs HuggingFace's own module code over it, and samples."""

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        kernels: Kernels,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._rope = Rope.of(model)
        self._scorer = Scorer(model)
        self._cache = cache
        self._kernels = kernels
        self._device = device
        self._graphs = graphs or DecodeGraphs([])

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        groups = by_method(batch.decodes)
        batch = replace(batch, decodes=[one for group in groups for one in group])
        self._reserve(batch)
        last_rows, sampled = self._rows_to_sample(batch)
        graphs = [] if batch.chunks else self._graphs_for(groups)
        if graphs:
            logits, result = self._replay(groups, graphs)
            if len(last_rows) < len(logits):
                logits = logits[torch.tensor(last_rows, dtype=torch.int64, device=self._device)]
        else:
            logits, result = self._compute(batch, groups, last_rows)
        if sampled:
            chosen = sample(logits, [self._sampled_row(sequence, result) for sequence in sampled])
            result.tokens.update(zip(sampled, chosen, strict=True))
            result.logprobs.update(self._logprobs(logits, sampled, chosen))
        return result

    def _graphs_for(self, groups: list[list[Sequence]]) -> list[Graph]:
        """One for each group, or none: a step is replayed as a whole."""
        found = []
        for group in groups:
            longest = int(self._cache.held.host[slots_of(group)].max()) + 1
            graph = self._graphs.find(group[0].plan.decode, len(group), longest)
            if graph is None:
                return []
            found.append(graph)
        return found

    @staticmethod
    def _replay(groups: list[list[Sequence]], graphs: list[Graph]) -> tuple[Tensor, StepResult]:
        """Logits [B, V] of all decodes, from graphs."""
        logits, result = [], StepResult({}, [])
        for group, graph in zip(groups, graphs, strict=True):
            outputs = graph(StepTokens(*_new_tokens(group), slots_of(group)))
            # Graphs share their memory: the next one may overwrite what this one gave.
            logits.append(outputs.logits if len(graphs) == 1 else outputs.logits.clone())
            if outputs.read is not None:
                result.read.update(_read_by(group, outputs.read))
        return logits[0] if len(logits) == 1 else torch.cat(logits), result

    def _compute(
        self, batch: Batch, groups: list[list[Sequence]], last_rows: list[int]
    ) -> tuple[Tensor, StepResult]:
        """Logits [rows, V] of these packed rows, from one forward of all decodes and chunks."""
        tokens, positions = (torch.from_numpy(part).to(self._device) for part in self._pack(batch))
        forward, runs = self._prepare(batch, groups, positions)
        scored = [run for run in runs if run[0].sequence.sampling.prompt_logprobs is not None]
        with self._scorer.listening() if scored else nullcontext(Heard()) as heard:
            logits = self._model(
                input_ids=tokens[None],
                position_ids=positions[None],
                logits_to_keep=torch.tensor(last_rows, dtype=torch.int64, device=self._device),
                use_cache=False,
                batch=forward,
            ).logits[0]
        result = StepResult({}, runs, prompt_logprobs=self._score(heard, scored))
        for group, step in zip(groups, forward.decodes, strict=True):
            if not isinstance(step.method, Full):
                result.read.update(_read_by(group, step.read_counts()))
        return logits, result

    def _sampled_row(self, sequence: Sequence, result: StepResult) -> SampledRow:
        allowed = None
        if sequence.constraint is not None:
            try:
                allowed = sequence.constraint.allowed().to(self._device)
            except BadGrammar as error:
                result.broken[sequence] = str(error)
        if has_penalties(sequence.sampling):
            if sequence.counts is None:
                sequence.counts = TokenCounts(self._model.config.get_text_config().vocab_size, self._device)
            sequence.counts.catch_up(sequence.tokens, sequence.prompt_length)
        return SampledRow(
            sequence.sampling,
            len(sequence.tokens),
            choice=sequence.choice,
            num_generated=sequence.num_generated,
            counts=sequence.counts,
            allowed=allowed,
        )

    @staticmethod
    def _logprobs(logits: Tensor, sampled: list[Sequence], chosen: list[int]) -> dict[Sequence, Logprobs]:
        """Of the tokens chosen for those who asked. logits [B, V]."""
        asked = [i for i, sequence in enumerate(sampled) if sequence.sampling.logprobs is not None]
        if not asked:
            return {}
        counts = [sampled[i].sampling.logprobs or 0 for i in asked]
        found = logprobs_of(logits[asked], [chosen[i] for i in asked], counts)
        return dict(zip((sampled[i] for i in asked), found, strict=True))

    def _score(
        self, heard: Heard, scored: list[tuple[ChunkPlan, ChunkRun]]
    ) -> dict[Sequence, list[Logprobs]]:
        """Of the prompt tokens that follow each row of these chunks."""
        found = {}
        for part, run in scored:
            sequence = part.sequence
            targets = sequence.tokens[part.start + 1 : min(part.end + 1, sequence.prompt_length)]
            count = sequence.sampling.prompt_logprobs or 0
            found[sequence] = self._scorer.score(heard, run.span.start, targets, count)
        return found

    def _reserve(self, batch: Batch) -> None:
        """Pages for what this step writes, in tables that the device has."""
        if batch.decodes:
            self._cache.reserve_next(slots_of(batch.decodes))
        for part in batch.chunks:
            self._cache.reserve(slot_of(part.sequence), part.end)
        self._cache.sync()

    def _prepare(
        self, batch: Batch, groups: list[list[Sequence]], positions: Tensor
    ) -> tuple[ForwardBatch, list[tuple[ChunkPlan, ChunkRun]]]:
        """Where each part of this forward goes."""
        cache = self._cache
        forward = ForwardBatch(cache, self._kernels, self._rope, positions)
        first = 0
        for group in groups:
            slots, span = slots_of(group), slice(first, first + len(group))
            destinations, rows = cache.decode_destinations(slots), cache.decode_rows(slots)
            method = group[0].plan.decode
            whole = whole_step(self._kernels, cache, method, destinations, rows)
            forward.decodes.append(DecodeRun(method, span, destinations, rows, whole=whole))
            first = span.stop
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
        reach = sequence.plan.policy.reach(sequence.total_length)
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
            reach=None if reach is None else reach.to(self._device),
        )

    @staticmethod
    def _pack(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and positions of the packed row, int64 [T] each."""
        first, at = _new_tokens(batch.decodes)
        tokens, positions = [first], [at]
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
                rows += [end - 1] * len(part.sequence.choices)
                sampled += part.sequence.choices
        return rows, sampled


def by_method(decodes: list[Sequence]) -> list[list[Sequence]]:
    """Sequences with the same decode method together, methods in the order of their first sequence."""
    groups: list[list[Sequence]] = []
    for sequence in decodes:
        group = next((group for group in groups if group[0].plan.decode == sequence.plan.decode), None)
        if group is None:
            groups.append([sequence])
        else:
            group.append(sequence)
    return groups


def _new_tokens(decodes: list[Sequence]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The token that each of these computes next, and its position: int64 [n] both."""
    tokens = np.array([sequence.tokens[sequence.computed] for sequence in decodes], dtype=np.int64)
    return tokens, np.array([sequence.computed for sequence in decodes], dtype=np.int64)


def _read_by(group: list[Sequence], counts: Tensor) -> dict[Sequence, tuple[int, int]]:
    """By sequence: tokens read and readable. counts [2, n] on the device, which is waited for."""
    return dict(zip(group, zip(*counts.tolist(), strict=True), strict=True))


def slots_of(sequences: list[Sequence]) -> NDArray[np.int64]:
    """The slots of admitted sequences."""
    return np.array([slot_of(sequence) for sequence in sequences], dtype=np.int64)
