"""Engine: the loop. Admit, schedule, run, update the cache, commit; every sequence ends exactly once."""

import logging
import time

import numpy as np
import torch

from engine.messages import Cost, FinishReason, Outputs, Stats, Submit, TokenOutput
from engine.plans import ResolvedPlan
from engine.runner import ModelRunner, StepResult, slot_of
from engine.scheduler import Batch, Scheduler
from engine.sequence import Sequence
from kvcache.cache import KVCache

log = logging.getLogger(__name__)


class Engine:
    """Owns the scheduler; runs steps. Everything is synchronous, in one thread."""

    def __init__(
        self,
        plans: dict[str, ResolvedPlan],
        scheduler: Scheduler,
        runner: ModelRunner,
        cache: KVCache,
        end_tokens: tuple[int, ...],
    ) -> None:
        self._plans = plans
        self._scheduler = scheduler
        self._runner = runner
        self._cache = cache
        self._end_tokens = end_tokens
        self._ended: list[TokenOutput] = []  # ends that no step brought: aborts and refusals
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0
        self._step_tokens = 0
        self._step_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._ended)

    def submit(self, request: Submit) -> None:
        """Queue a request. One that can never be served ends at once, with the reason."""
        sequence = Sequence.from_submit(request, self._plans[request.plan])
        if sequence.pages_needed > self._cache.pool.num_pages:
            self._end(
                sequence,
                FinishReason.ERROR,
                f"{sequence.total_length} tokens need {sequence.pages_needed} pages under plan"
                f" {sequence.plan.name!r}; the cache has {self._cache.pool.num_pages}",
            )
            return
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request now and free its pages. One that has ended already is left alone."""
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._scheduler.remove(sequence)
            self._end(sequence, FinishReason.ABORT)

    def step(self) -> Outputs:
        """One forward for all that can run, and what came of it."""
        outputs, self._ended = self._ended, []
        batch = self._scheduler.next_batch()
        if batch.num_tokens:
            outputs += self._run(batch)
        if not self._scheduler.has_work:
            self._cache.check()  # idle: the cheapest moment to prove that nothing leaks
        return Outputs(tuple(outputs), self.stats())

    def stats(self) -> Stats:
        usage = self._cache.usage()
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_free=usage.free,
            pages_cached=usage.cached,
            pages_borrowed=usage.borrowed,
            pages_private=usage.private,
            kv_bytes=usage.held_bytes,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            step_tokens=self._step_tokens,
            step_seconds=self._step_seconds,
        )

    def _run(self, batch: Batch) -> list[TokenOutput]:
        began = time.perf_counter()
        try:
            result = self._runner.run(batch)
            self._update_cache(batch, result)
            outputs = self._commit(batch, result)
        except Exception:  # whatever went wrong, the sequences of this step are lost and all others are not
            log.exception("a step failed with %d sequences", len(batch.sequences))
            return self._fail(batch)
        self._steps += 1
        self._step_tokens = batch.num_tokens
        self._step_seconds = time.perf_counter() - began
        self._scheduler.account(batch, self._step_seconds)
        return outputs

    def _update_cache(self, batch: Batch, result: StepResult) -> None:
        """Tables change only here, between forwards: rows grow, and what a policy forgets leaves."""
        if batch.decodes:
            self._cache.advance([slot_of(sequence) for sequence in batch.decodes], 1)
            for sequence in batch.decodes:
                sequence.computed += 1
        for part, run in result.runs:
            sequence = part.sequence
            slot = slot_of(sequence)
            self._cache.advance(slot, part.length)
            sequence.computed = part.end
            cost = sequence.cost
            cost.read_cells += float(torch.stack(run.read_cells).sum())
            cost.causal_cells += run.causal_cells
            cost.recalls += [found.flatten().cpu().numpy() for found in run.recalls]
            if sequence.in_prefill:
                continue
            keep = [mask for mask in run.keep if mask is not None]
            if keep:
                assert len(keep) == len(run.keep), "a policy compresses all layers or none"
                self._cache.compact(slot, torch.stack(keep))
            self._cache.promise(
                slot, sequence.plan.policy.pages_after_prefill(sequence.prompt_length, sequence.total_length)
            )
            self._prompt_tokens += sequence.prompt_length
            sequence.prompt_cost = self._cost(sequence, slot)

    def _commit(self, batch: Batch, result: StepResult) -> list[TokenOutput]:
        """New tokens join their sequences; those that are done leave."""
        outputs = []
        for sequence, token in result.tokens.items():
            sequence.tokens.append(token)
            self._generation_tokens += 1
            reason = sequence.should_stop(self._end_tokens)
            if reason is not None:
                self._scheduler.remove(sequence)
                sequence.finish_reason = reason
            cost, sequence.prompt_cost = sequence.prompt_cost, None
            outputs.append(TokenOutput(sequence.request_id, (token,), reason, cost))
        return outputs

    def _cost(self, sequence: Sequence, slot: int) -> Cost:
        assert sequence.admitted is not None
        recalls = np.concatenate(sequence.cost.recalls) if sequence.cost.recalls else np.empty(0)
        return Cost(
            plan=sequence.plan.name,
            prefill_read_fraction=sequence.cost.read_fraction,
            attention_recall=float(recalls.mean()) if recalls.size else None,
            attention_recall_p5=float(np.percentile(recalls, 5)) if recalls.size else None,
            attention_recall_samples=recalls.size,
            kv_tokens_total=sequence.prompt_length,
            kv_tokens_kept=self._cache.kept_tokens(slot),
            kv_bytes=self._cache.bytes_of(slot),
            cached_tokens=0,
            queue_seconds=sequence.admitted - sequence.arrived,
            prefill_seconds=time.monotonic() - sequence.admitted,
        )

    def _fail(self, batch: Batch) -> list[TokenOutput]:
        """End every sequence of a step that raised. Its rows may be half written, so nothing of them is
        kept."""
        for sequence in batch.sequences:
            if sequence.finish_reason is None:
                self._scheduler.remove(sequence)
                self._end(sequence, FinishReason.ERROR, "the engine failed while computing this request")
        outputs, self._ended = self._ended, []
        return outputs

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        sequence.finish_reason = reason
        self._ended.append(TokenOutput(sequence.request_id, finish_reason=reason, error=error))
