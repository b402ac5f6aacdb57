"""One answer, from the engine's tokens to pieces of text: detokenised, cut at stop strings, ended once."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from engine.client import Engine
from engine.errors import ServeError, StepFailed
from engine.messages import Cost, FinishReason, TokenOutput
from server.metrics import Metrics
from server.prepare import Job
from server.stopping import StopStrings
from server.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer. The last piece carries why it ended."""

    text: str
    num_tokens: int  # of the answer so far
    finish_reason: FinishReason | None = None  # STOP or LENGTH
    cost: Cost | None = None  # known from the first piece on


async def answer(
    job: Job, engine: Engine, tokenizer: Tokenizer, metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    """Pieces of one answer. Closing the generator aborts the request. Raises as `Engine.generate`."""
    meter = metrics.open(job)
    text = _AnswerText(tokenizer.detokenizer(job.submit.tokens), StopStrings(job.stop))
    ended = FinishReason.ABORT  # unless something else happens first
    try:
        outputs = engine.generate(job.submit)
        assert isinstance(outputs, AsyncGenerator), "closing it is how a request is aborted"
        async with aclosing(outputs):
            async for output in outputs:
                meter.tokens(len(output.tokens), output.cost)
                piece = text.take(output)
                if piece.finish_reason is not None:
                    ended = piece.finish_reason
                    break
                yield piece
            else:
                raise StepFailed("the engine ended this request without a reason")
        yield piece  # the engine has let go of the request by now, however slowly the client reads
    except ServeError:
        ended = FinishReason.ERROR
        raise
    finally:
        meter.close(ended)


class _AnswerText:
    """The text of one answer so far."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._num_tokens = 0
        self._cost: Cost | None = None

    def take(self, output: TokenOutput) -> Piece:
        """What this output adds."""
        if output.finish_reason is FinishReason.ABORT:
            raise StepFailed("the request was aborted")
        self._cost = self._cost or output.cost
        # The token that made the engine stop is counted, but no part of the text.
        spoken = output.tokens[:-1] if output.finish_reason is FinishReason.STOP else output.tokens
        text = ""
        for token in spoken:
            self._num_tokens += 1
            text += self._stops.feed(self._detokenizer.feed(token))
            if self._stops.found:
                return self._piece(text, FinishReason.STOP)
        self._num_tokens += len(output.tokens) - len(spoken)
        if output.finish_reason is None:
            return self._piece(text, None)
        text += self._stops.feed(self._detokenizer.flush())
        if self._stops.found:
            return self._piece(text, FinishReason.STOP)
        return self._piece(text + self._stops.flush(), output.finish_reason)

    def _piece(self, text: str, finish_reason: FinishReason | None) -> Piece:
        return Piece(text, self._num_tokens, finish_reason, self._cost)
