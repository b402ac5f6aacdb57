"""Engine: the loop. Admit, schedule, run, update the cache, commit; every sequence ends exactly once."""

import logging
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from configs.grammars import Grammars
from configs.model import PAGE_SIZE
from engine.constraints import Constraints
from engine.messages import (
    CacheCleared,
    Cost,
    FinishReason,
    HeadCosts,
    Outputs,
    Stats,
    Submit,
    TokenOutput,
)
from engine.plans import ResolvedPlan
from engine.runner import ModelRunner, StepResult
from engine.scheduler import Batch, Scheduler
from engine.sequence import Sequence, slot_of
from kvcache.cache import KVCache
from kvcache.prefix import chain_keys

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
        *,
        share_prefixes: bool = True,
        grammars: Grammars | None = None,
    ) -> None:
        self._plans = plans
        self._scheduler = scheduler
        self._runner = runner
        self._cache = cache
        self._end_tokens = end_tokens
        self._share_prefixes = share_prefixes
        self._constraints = Constraints(grammars)
        self._ended: list[TokenOutput] = []  # ends that no step brought: aborts and refusals
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._steps = 0
        self._step_tokens = 0
        self._step_seconds = 0.0
        self._step_context = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._constraints.has_work or bool(self._ended)

    def submit(self, request: Submit) -> None:
        """Queue a request. One that can never be served ends at once, with the reason."""
        sampling = request.sampling
        stops = () if sampling.ignore_eos else self._end_tokens
        if sampling.grammar is not None:
            stops += self._constraints.end_tokens
        if stops:  # from here on, end tokens are stop tokens like any other
            sampling = msgspec.structs.replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *stops))
            request = msgspec.structs.replace(request, sampling=sampling)
        if not self._share_prefixes:
            request = msgspec.structs.replace(request, share=False)
        sequence = Sequence.from_submit(request, self._plans[request.plan])
        pages = sequence.pages_needed(sharing=False)
        pages += len(sequence.siblings) * sequence.pages_of_fork(self._cache.num_rows)
        if pages > self._cache.pool.num_pages:
            times = f", of {request.choices} answers," if request.choices > 1 else ""
            words = (
                f"{sequence.total_length} tokens{times} need {pages} pages under plan"
                f" {sequence.plan.name!r}; the cache has {self._cache.pool.num_pages}"
            )
            self._end(sequence, FinishReason.ERROR, words, refused=True)
            return
        if sampling.grammar is None:
            self._scheduler.add(sequence)
        else:
            self._constraints.prepare(sequence, sampling.grammar)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice, now and free its pages. What has ended already is left alone."""
        for sequence in self._scheduler.find(request_id):
            if choice in (None, sequence.choice):
                self._scheduler.remove(sequence)
                self._end(sequence, FinishReason.ABORT)
        for sequence in self._constraints.forget(request_id, choice):
            self._end(sequence, FinishReason.ABORT)

    def clear_cache(self) -> CacheCleared:
        """Forget the beginnings of prompts that no live sequence counts on."""
        before = self.stats()
        self._cache.clear_prefixes()
        now = self.stats()
        return CacheCleared(now.pages_free - before.pages_free, before.pages_host - now.pages_host, now)

    def step(self) -> Outputs:
        """One forward for all that can run, and what came of it."""
        outputs, self._ended = self._ended, []
        for sequence in self._constraints.prepared(wait=not self._scheduler.has_work and not outputs):
            self._scheduler.add(sequence)
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
            waiting=len(self._scheduler.waiting) + self._constraints.num_waiting,
            pages_free=usage.free,
            pages_cached=usage.cached,
            pages_borrowed=usage.borrowed,
            pages_private=usage.private,
            kv_bytes=usage.held_bytes,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            steps=self._steps,
            step_tokens=self._step_tokens,
            step_seconds=self._step_seconds,
            step_context=self._step_context,
            swapped=len(self._scheduler.swapped),
            swaps_out=self._scheduler.swaps_out,
            swaps_in=self._scheduler.swaps_in,
            pages_host=self._cache.pages_on_host,
            host_hits=self._cache.columns_restored * PAGE_SIZE,
        )

    def _run(self, batch: Batch) -> list[TokenOutput]:
        began = time.perf_counter()
        outputs: list[TokenOutput] = []
        try:
            result = self._runner.run(batch)
            self._update_cache(batch, result)
            for output in self._commit(result):
                outputs.append(output)  # at once: who has ended is told so, whatever happens to the next
            outputs += self._progress(batch)
        except Exception:  # whatever went wrong, the requests of this step are lost and all others are not
            log.exception("a step failed with %d sequences", len(batch.sequences))
            return outputs + self._fail(batch)
        self._steps += 1
        self._step_tokens = batch.num_tokens
        self._step_context = max((chunk.end for chunk in batch.chunks), default=0)
        self._step_seconds = time.perf_counter() - began
        self._scheduler.account(batch, self._step_seconds)
        return outputs

    def _update_cache(self, batch: Batch, result: StepResult) -> None:
        """Tables change only here, between forwards: rows grow, and what a policy forgets leaves."""
        if batch.decodes:
            self._cache.advance([slot_of(sequence) for sequence in batch.decodes], 1)
            for sequence, (read, held) in result.read.items():
                sequence.decode_read += read
                sequence.decode_held += held
            for sequence in batch.decodes:
                sequence.computed += 1
                if sequence.computed % PAGE_SIZE == 0:
                    self._drop(sequence)
        for part, run in result.runs:
            sequence = part.sequence
            slot = slot_of(sequence)
            self._cache.advance(slot, part.length)
            sequence.computed = part.end
            # By the rows of this chunk alone.
            below_floor = bool(run.below_floor) and bool(torch.stack(run.below_floor).any())
            sequence.cost.floored_chunks += below_floor
            self._publish_prompt(sequence, run.chunk.start if below_floor else None)
            self._drop(sequence)
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence, [])
            cost = sequence.cost
            cost.add(torch.stack(run.read_cells), run.causal_cells)
            cost.recalls += [found.flatten().cpu().numpy() for found in run.recalls]
            cost.knows_recall &= run.knows_recall
            if sequence.in_prefill:
                continue
            keep = [mask for mask in run.keep if mask is not None]
            if keep:
                assert len(keep) == len(run.keep), "a policy compresses all layers or none"
                self._cache.compact(slot, torch.stack(keep))
            self._cache.promise(
                slot, sequence.plan.policy.pages_after_prefill(sequence.prompt_length, sequence.total_length)
            )
            self._count_prompt(sequence)
            sequence.prompt_cost = self._cost(sequence, slot)
            if sequence.siblings:
                self._scheduler.fork(sequence)

    def _publish_prompt(self, sequence: Sequence, read_more_from: int | None) -> None:
        """Others may borrow what was computed, up to where this prompt is like no longer one.

        read_more_from: where a chunk starts that a floor made read more than its plan would have.
        """
        shareable = sequence.shareable
        if shareable is None:
            return
        if read_more_from is not None:
            sequence.may_publish = min(sequence.may_publish, read_more_from // PAGE_SIZE)
        blocks = min(sequence.computed // PAGE_SIZE // shareable.unit * shareable.unit, sequence.may_publish)
        self._publish(sequence, shareable.keys[:blocks], shareable.tokens)

    def _publish_answer(self, sequence: Sequence) -> None:
        """The next turn of a chat starts where this one ended, if its tokens' keys and values are exact."""
        shareable, plan = sequence.shareable, sequence.plan
        exact = plan.is_dense(sequence.prompt_length) and plan.keeps_everything and sequence.pins
        if shareable is not None and exact and not sequence.in_prefill:
            tokens = np.array(sequence.tokens[: sequence.computed], dtype=np.int32)
            self._publish(sequence, chain_keys(shareable.seed, tokens), tokens)

    def _publish(self, sequence: Sequence, keys: list[bytes], tokens: NDArray[np.int32]) -> None:
        if len(keys) > sequence.published:
            self._cache.publish(slot_of(sequence), keys, tokens, pin=sequence.pins)
            sequence.published = len(keys)

    def _count_prompt(self, sequence: Sequence) -> None:
        self._prompt_tokens += sequence.prompt_length
        if sequence.shareable is not None:
            self._prefix_queries += sequence.prompt_length
            self._prefix_hits += sequence.cached

    def _drop(self, sequence: Sequence) -> None:
        """The pages that no later query reads leave, where the policy knows them."""
        reach = sequence.plan.policy.reach(sequence.total_length)
        if reach is None:
            return
        slot = slot_of(sequence)
        self._cache.drop(slot, torch.from_numpy(reach.left(sequence.computed // PAGE_SIZE)))
        if not sequence.in_prefill:
            self._cache.pack(slot)

    def _commit(self, result: StepResult) -> Iterator[TokenOutput]:
        """New tokens join their sequences; those that are done leave."""
        for sequence, token in result.tokens.items():
            if sequence in result.broken:
                self._scheduler.remove(sequence)
                self._end(
                    sequence, FinishReason.ERROR, f"structured output failed: {result.broken[sequence]}"
                )
                continue
            sequence.tokens.append(token)
            self._generation_tokens += 1
            reason = sequence.should_stop()
            if reason is not None:
                self._publish_answer(sequence)
                self._scheduler.remove(sequence)
                sequence.finish_reason = reason
            elif sequence.constraint is not None:
                sequence.constraint.accept(token)
            cost, sequence.prompt_cost = sequence.prompt_cost, None
            of_prompt, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
            logprobs = (result.logprobs[sequence],) if sequence in result.logprobs else ()
            yield TokenOutput(
                sequence.request_id,
                (token,),
                reason,
                cost,
                logprobs=logprobs,
                prompt_logprobs=of_prompt,
                choice=sequence.choice,
                decode_read_fraction=sequence.decode_read_fraction,
            )

    @staticmethod
    def _progress(batch: Batch) -> list[TokenOutput]:
        """How far the prompts of this step are, for clients that asked."""
        asked = [chunk.sequence for chunk in batch.chunks if chunk.sequence.reports.progress]
        return [
            TokenOutput(sequence.request_id, computed=sequence.computed)
            for sequence in asked
            if sequence.in_prefill
        ]

    def _cost(self, sequence: Sequence, slot: int) -> Cost:
        assert sequence.admitted is not None
        known = sequence.cost.recalls if sequence.cost.knows_recall else []
        recalls = np.concatenate(known) if known else np.empty(0)
        return Cost(
            plan=sequence.plan.name,
            prefill_read_fraction=sequence.cost.read_fraction,
            attention_recall=float(recalls.mean()) if recalls.size else None,
            attention_recall_p5=float(np.percentile(recalls, 5)) if recalls.size else None,
            attention_recall_samples=recalls.size,
            kv_tokens_total=sequence.prompt_length,
            kv_tokens_kept=self._cache.kept_tokens(slot),
            kv_bytes=self._cache.bytes_of(slot),
            cached_tokens=sequence.cached,
            queue_seconds=sequence.admitted - sequence.arrived,
            prefill_seconds=time.monotonic() - sequence.admitted,
            heads=self._head_costs(sequence, slot) if sequence.reports.per_head else None,
            floored_chunks=sequence.cost.floored_chunks,
        )

    def _head_costs(self, sequence: Sequence, slot: int) -> HeadCosts:
        kept = self._cache.held_by_head(slot)
        read = sequence.cost.read_fractions(kept.shape[1])
        return HeadCosts(tuple(map(tuple, read.tolist())), tuple(map(tuple, kept.tolist())))

    def _fail(self, batch: Batch) -> list[TokenOutput]:
        """End what is left of every request in a step that raised, choices included that it was about to
        fork. Rows may be half written, so nothing of them is kept."""
        for request_id in dict.fromkeys(sequence.request_id for sequence in batch.sequences):
            for sequence in self._scheduler.find(request_id):
                self._scheduler.remove(sequence)
                self._end(sequence, FinishReason.ERROR, "the engine failed while computing this request")
        outputs, self._ended = self._ended, []
        return outputs

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, *, refused: bool = False
    ) -> None:
        """Of a sequence, and of the choices that were to be forked off it."""
        for choice in sequence.choices:
            choice.finish_reason = reason
            self._ended.append(
                TokenOutput(
                    choice.request_id,
                    finish_reason=reason,
                    error=error,
                    refused=refused,
                    choice=choice.choice,
                )
            )
