"""Constraint: which tokens the grammar of one request lets follow, worked out beside the forward."""

import logging
from concurrent.futures import Executor, Future, TimeoutError

import llguidance
import numpy as np
import torch
from torch import Tensor

from configs.grammars import BadGrammar, Grammars, refuse_errors

log = logging.getLogger(__name__)

# What one request may hold up a step for. Masks take well under a millisecond, and llguidance counts its own
# work so that the worst take half a second: this is for a machine with no time left for its threads.
MASK_SECONDS = 5.0


class Constraint:
    """The grammar of one answer and how far the answer has come. Everything slow runs in `workers`.

    A mask is asked for as soon as the token before it is known, so it is there when the next forward ends.
    """

    def __init__(self, grammars: Grammars, grammar: str, answer: list[int], workers: Executor) -> None:
        self._workers = workers
        self._vocab = grammars.vocab
        self._matcher: llguidance.LLMatcher | None = None  # the worker's
        self._next: Future[Tensor] = workers.submit(self._start, grammars, grammar, list(answer))

    @property
    def is_prepared(self) -> bool:
        """Is the grammar compiled and its first mask there, or has it failed?"""
        return self._next.done()

    def wait(self, seconds: float) -> None:
        """Give the preparation a moment when there is nothing else to do."""
        try:
            self._next.exception(seconds)
        except TimeoutError:
            return

    def accept(self, token: int) -> None:
        """This token has joined the answer."""
        self._next = self._workers.submit(self._advance, token)

    def allowed(self) -> Tensor:
        """bool [V]: the tokens that may follow. Raises BadGrammar if they cannot be worked out, or not in
        time."""
        try:
            failure = self._next.exception(MASK_SECONDS)
        except TimeoutError as error:
            raise BadGrammar(f"the next token could not be worked out in {MASK_SECONDS} seconds") from error
        if failure is None or isinstance(failure, BadGrammar):
            return self._next.result()
        # A mistake in the compiler, a panic even, costs this answer and none of the others in the step.
        log.error("a grammar failed", exc_info=failure)
        raise BadGrammar("the next token could not be worked out") from failure

    def _start(self, grammars: Grammars, grammar: str, answer: list[int]) -> Tensor:
        self._matcher = grammars.matcher(grammar)
        self._matcher.consume_tokens(answer)  # of a replayed request
        return self._mask(self._matcher)

    def _advance(self, token: int) -> Tensor:
        assert self._matcher is not None
        self._matcher.consume_token(token)
        return self._mask(self._matcher)

    def _mask(self, matcher: llguidance.LLMatcher) -> Tensor:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        refuse_errors(matcher)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab].view(np.bool_))
