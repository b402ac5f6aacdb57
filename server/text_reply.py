"""TextReply: the JSON of /v1/completions, whole or in chunks, after an echo of the prompt where asked for."""

from asyncio import to_thread
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from engine.messages import Cost
from server.completion import Piece
from server.logprobs import TextLogprobs, joined, prompt_logprobs
from server.prepare import Job
from server.responses import Head, chunk_usage, cost_json, cost_of, progress_json, usage_json
from server.text_request import CompletionRequest
from server.tokenizer import Tokenizer


@dataclass(slots=True)
class TextReply:
    """One continuation of a text."""

    head: Head
    job: Job
    request: CompletionRequest
    tokenizer: Tokenizer
    _columns: TextLogprobs = field(init=False)

    def __post_init__(self) -> None:
        self._columns = TextLogprobs(self.tokenizer, self.request.logprobs or 0)

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        texts = [_Text() for _ in range(self.job.submit.choices)]
        async with aclosing(pieces):
            async for piece in pieces:
                one = texts[piece.choice]
                one.of_prompt |= await self._of_prompt(piece)
                text, columns = await self._parts(piece, first=not one.pieces)
                one.pieces.append(piece)
                one.texts.append(text)
                one.logprobs += columns
        last = [one.last for one in texts]
        return {
            **self.head.json("text_completion"),
            "choices": [self._choice(index, one) for index, one in enumerate(texts)],
            "usage": usage_json(self.job, *last),
            "farspan": cost_json(cost_of(*last)),
        }

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[dict[str, Any], None]:
        ids = self.request.return_token_ids
        last: dict[int, Piece] = {}  # of each choice so far
        cost: Cost | None = None
        usage = chunk_usage(self.request, self.job, ())
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.computed is not None:
                    progress = progress_json(self.job, piece.computed)
                    yield self.head.json("text_completion") | progress | usage
                    continue
                index, first = piece.choice, piece.choice not in last
                cost = piece.cost or cost
                text, columns = await self._parts(piece, first=first)
                more: dict[str, Any] = {"token_ids": list(piece.tokens)} if ids else {}
                if ids and first:
                    more["prompt_token_ids"] = list(self.job.submit.tokens)
                last[index] = piece
                usage = chunk_usage(self.request, self.job, last.values())
                if text or columns or any(more.values()):
                    yield self._chunk(index, text, joined(columns), more) | usage
                if piece.finish_reason is not None:
                    end = self._chunk(index, "", None, {"finish_reason": piece.finish_reason.value})
                    yield end | {"farspan": cost_json(cost)} | usage
        if self.request.include_usage:
            total = usage_json(self.job, *last.values())
            yield self.head.json("text_completion") | {"choices": [], "usage": total}

    def _choice(self, index: int, one: "_Text") -> dict[str, Any]:
        assert one.last.finish_reason is not None
        choice = {
            "index": index,
            "text": "".join(one.texts),
            "logprobs": joined(one.logprobs),
            "finish_reason": one.last.finish_reason.value,
            **one.of_prompt,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = [token for piece in one.pieces for token in piece.tokens]
            choice["prompt_token_ids"] = list(self.job.submit.tokens)
        return choice

    async def _parts(self, piece: Piece, *, first: bool) -> tuple[str, list[dict[str, Any]]]:
        """Text and columns of a piece; the first begins with the prompt where it is echoed."""
        asked = self.request.logprobs is not None
        text, columns = piece.text, []
        if first and self.job.echo is not None:
            text = self.job.echo + text
            if asked:
                prompt = self.job.submit.tokens
                # A long prompt's would hold the loop for seconds.
                columns.append(await to_thread(self._columns.prompt, prompt, piece.prompt_logprobs))
        if asked and piece.tokens:
            columns.append(self._columns.answer(piece.tokens, piece.logprobs))
        return text, columns

    async def _of_prompt(self, piece: Piece) -> dict[str, Any]:
        count = self.request.prompt_logprobs
        if count is None or not piece.prompt_logprobs:
            return {}
        tokens, found = self.job.submit.tokens, piece.prompt_logprobs
        shown = await to_thread(prompt_logprobs, tokens, found, count, self.tokenizer)
        return {"prompt_logprobs": shown}

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, more: dict[str, Any]
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None} | more
        return self.head.json("text_completion") | {"choices": [choice]}


@dataclass(slots=True)
class _Text:
    """One choice so far."""

    pieces: list[Piece] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    of_prompt: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]
