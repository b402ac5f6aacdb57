"""One answer, from the engine's tokens to pieces of text: detokenised, cut at stop strings, ended once."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import msgspec

from engine.client import Engine
from engine.errors import ServeError, StepFailed
from engine.messages import Cost, FinishReason, Logprobs, TokenOutput
from server.errors import TimedOut
from server.metrics import Metrics
from server.prepare import Job
from server.stopping import StopStrings
from server.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer, and the tokens it came with. The last piece carries why the answer ended."""

    text: str
    num_tokens: int  # of the answer so far
    finish_reason: FinishReason | None = None  # STOP or LENGTH
    cost: Cost | None = None  # known from the first piece on
    tokens: tuple[int, ...] = ()  # end tokens and those behind a stop string's cut included
    logprobs: tuple[Logprobs, ...] = ()  # one per token, where asked for
    prompt_logprobs: tuple[Logprobs, ...] = ()  # of the prompt from its second token on, in the first piece
    choice: int = 0  # each has a last piece of its own
    computed: int | None = None  # tokens of the prompt so far; such a piece has nothing of the answer


async def answer(
    job: Job,
    engine: Engine,
    tokenizer: Tokenizer,
    metrics: Metrics,
    on_first: Callable[[], None] = lambda: None,
) -> AsyncGenerator[Piece, None]:
    """Pieces of the answer, or of all choices as they come; `on_first` is called once, before the first.

    Closing the generator aborts the request. Raises as `Engine.generate`, or TimedOut.
    """
    meter = metrics.open(job)
    texts = {choice: _text_of(job, tokenizer) for choice in range(job.submit.choices)}  # that go on
    ended = FinishReason.ABORT  # unless something else happens first
    failure: str | None = None
    begun = False
    try:
        outputs = engine.generate(job.submit)
        assert isinstance(outputs, AsyncGenerator), "closing it is how a request is aborted"
        async with aclosing(outputs):
            while (output := await _next(outputs, job)) is not None:
                if output.computed is not None:
                    yield Piece("", 0, computed=output.computed)
                    continue
                if output.choice not in texts:
                    continue  # a stop string ended it, and the engine has yet to hear of that
                if not begun:
                    begun = True
                    on_first()
                meter.tokens(len(output.tokens), output.cost, output.choice)
                piece = replace(texts[output.choice].take(output), choice=output.choice)
                if job.echo_only:
                    piece = replace(
                        piece,
                        text="",
                        num_tokens=0,
                        tokens=(),
                        logprobs=(),
                        finish_reason=FinishReason.LENGTH,
                    )
                if piece.finish_reason is not None:
                    ended = piece.finish_reason
                    del texts[piece.choice]
                    if not texts:
                        break
                    if output.finish_reason is None:
                        await engine.end_choice(job.submit.request_id, piece.choice)
                yield piece
            else:
                raise StepFailed("the engine ended this request without a reason")
        yield piece  # the engine has let go of the request by now, however slowly the client reads
    except ServeError as error:
        ended, failure = FinishReason.ERROR, error.code
        raise
    finally:
        meter.close(ended, failure)


def _text_of(job: Job, tokenizer: Tokenizer) -> "_AnswerText":
    stops = StopStrings(job.stop)
    return _AnswerText(tokenizer.detokenizer(job.submit.tokens), stops, job.submit.sampling.min_tokens)


async def _next(outputs: AsyncGenerator[TokenOutput, None], job: Job) -> TokenOutput | None:
    """The next output, None behind the last; TimedOut when the request has taken too long."""
    if job.deadline is None:
        return await anext(outputs, None)
    try:
        async with asyncio.timeout(max(0.0, job.deadline - time.monotonic())):
            return await anext(outputs, None)
    except TimeoutError as error:
        words = f"The request did not end within its 'timeout' of {job.timeout} seconds."
        raise TimedOut(words, param="timeout") from error


class _AnswerText:
    """The text of one answer so far."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens  # before so many, stop strings are text like any other
        self._num_tokens = 0
        self._cost: Cost | None = None

    def take(self, output: TokenOutput) -> Piece:
        """What this output adds."""
        if output.finish_reason is FinishReason.ABORT:
            raise StepFailed("the request was aborted")
        self._cost = self._cost or output.cost
        if self._cost is not None and output.decode_read_fraction is not None:
            fraction = output.decode_read_fraction
            self._cost = msgspec.structs.replace(self._cost, decode_read_fraction=fraction)
        # The token that made the engine stop is counted, but no part of the text.
        spoken = output.tokens[:-1] if output.finish_reason is FinishReason.STOP else output.tokens
        text = ""
        for count, token in enumerate(spoken, start=1):
            self._num_tokens += 1
            new = self._detokenizer.feed(token)
            text += new if self._num_tokens <= self._min_tokens else self._stops.feed(new)
            if self._stops.found:
                return self._piece(output, count, text, FinishReason.STOP)
        self._num_tokens += len(output.tokens) - len(spoken)
        if output.finish_reason is None:
            return self._piece(output, len(spoken), text, None)
        text += self._stops.feed(self._detokenizer.flush())
        if self._stops.found:
            return self._piece(output, len(output.tokens), text, FinishReason.STOP)
        return self._piece(output, len(output.tokens), text + self._stops.flush(), output.finish_reason)

    def _piece(
        self, output: TokenOutput, num_tokens: int, text: str, finish_reason: FinishReason | None
    ) -> Piece:
        """A piece with the first `num_tokens` tokens of this output."""
        return Piece(
            text,
            self._num_tokens,
            finish_reason,
            self._cost,
            tokens=output.tokens[:num_tokens],
            logprobs=output.logprobs[:num_tokens],
            prompt_logprobs=output.prompt_logprobs,
        )
