"""TextReply: the JSON of /v1/completions, whole or in chunks, after an echo of the prompt where asked for."""

from asyncio import to_thread
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from server.completion import Piece
from server.logprobs import TextLogprobs, joined, prompt_logprobs
from server.prepare import Job
from server.protocol import CompletionRequest
from server.responses import Head, cost_json, usage_json
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
        texts: list[str] = []
        logprobs: list[dict[str, Any]] = []
        tokens: list[int] = []
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
        async with aclosing(pieces):
            async for piece in pieces:
                choice |= await self._of_prompt(piece)
                text, columns = await self._parts(piece, first=not texts)
                texts.append(text)
                logprobs += columns
                tokens += piece.tokens
        assert piece.finish_reason is not None
        choice |= {
            "text": "".join(texts),
            "logprobs": joined(logprobs),
            "finish_reason": piece.finish_reason.value,
        }
        if self.request.return_token_ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": list(self.job.submit.tokens)}
        return {
            **self.head.json("text_completion"),
            "choices": [choice],
            "usage": usage_json(self.job, piece),
            "farspan": cost_json(piece.cost),
        }

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[dict[str, Any], None]:
        no_usage = {"usage": None} if self.request.include_usage else {}
        ids = self.request.return_token_ids
        first = True
        async with aclosing(pieces):
            async for piece in pieces:
                text, columns = await self._parts(piece, first=first)
                more: dict[str, Any] = {"token_ids": list(piece.tokens)} if ids else {}
                if ids and first:
                    more["prompt_token_ids"] = list(self.job.submit.tokens)
                first = False
                if text or columns or any(more.values()):
                    yield self._chunk(text, joined(columns), more) | no_usage
        assert piece.finish_reason is not None
        last = self._chunk("", None, {"finish_reason": piece.finish_reason.value})
        yield last | {"farspan": cost_json(piece.cost)} | no_usage
        if self.request.include_usage:
            yield self.head.json("text_completion") | {"choices": [], "usage": usage_json(self.job, piece)}

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

    def _chunk(self, text: str, logprobs: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None} | more
        return self.head.json("text_completion") | {"choices": [choice]}
