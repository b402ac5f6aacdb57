"""ChatReply: the JSON of /v1/chat/completions, whole or in chunks, for every choice."""

from asyncio import to_thread
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from engine.messages import Cost, FinishReason
from server.calls_in_text import ToolCall
from server.chat_request import ChatCompletionRequest
from server.completion import Piece
from server.logprobs import chat_logprobs, joined, prompt_logprobs
from server.prepare import Job
from server.responses import Head, chunk_usage, cost_json, cost_of, progress_json, usage_json
from server.speech import Said, Speech
from server.tokenizer import Tokenizer
from server.toolcalls import ForcedCalls, HermesCalls, LlamaCalls, NoCalls, ToolParser


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One message of the assistant."""

    head: Head
    job: Job
    request: ChatCompletionRequest
    tokenizer: Tokenizer

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        messages = self._messages()
        of_prompt: dict[str, Any] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                messages[piece.choice].take(piece, self.tokenizer)
                of_prompt |= await self._of_prompt(piece)
        if self.request.return_token_ids:
            of_prompt["prompt_token_ids"] = list(self.job.submit.tokens)
        last = [message.last for message in messages]
        return {
            **self.head.json("chat.completion"),
            "choices": [self._choice(index, message) for index, message in enumerate(messages)],
            "usage": usage_json(self.job, *last),
            "farspan": cost_json(cost_of(*last)),
            **of_prompt,
        }

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[dict[str, Any], None]:
        ids = self.request.return_token_ids
        of_prompt = {"prompt_token_ids": list(self.job.submit.tokens)} if ids else {}
        messages = self._messages()
        cost: Cost | None = None
        latest: dict[int, Piece] = {}  # of each choice
        usage = chunk_usage(self.request, self.job, ())
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.computed is not None:
                    progress = progress_json(self.job, piece.computed)
                    yield self.head.json("chat.completion.chunk") | progress | usage
                    continue
                index, message = piece.choice, messages[piece.choice]
                cost = piece.cost or cost
                latest[index] = piece
                usage = chunk_usage(self.request, self.job, latest.values())
                if not message.pieces:
                    yield self._chunk(index, {"role": "assistant", "content": ""}) | of_prompt | usage
                deltas = message.take(piece, self.tokenizer)
                if not deltas and (piece.logprobs or (ids and piece.tokens)):
                    deltas = [{"content": ""}]  # tokens without text of their own yet
                for number, delta in enumerate(deltas):
                    yield self._chunk(index, delta, piece if number == 0 else None) | usage
                if piece.finish_reason is not None:
                    reason = self._finish_reason(piece, message.num_calls > 0)
                    last = self._chunk(index, {}, finish_reason=reason)
                    yield last | {"farspan": cost_json(cost)} | usage
        if self.request.include_usage:
            total = usage_json(self.job, *latest.values())
            yield self.head.json("chat.completion.chunk") | {"choices": [], "usage": total}

    def _messages(self) -> list["_Message"]:
        choices = range(self.job.submit.choices)
        return [_Message(speech_of(self.request, self.job, self.tokenizer)) for _ in choices]

    def _choice(self, index: int, message: "_Message") -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": self._message(message.said),
            "logprobs": joined(message.logprobs),
            "finish_reason": self._finish_reason(message.last, message.num_calls > 0),
        }
        if self.request.return_token_ids:
            choice["token_ids"] = [token for piece in message.pieces for token in piece.tokens]
        return choice

    def _finish_reason(self, piece: Piece, called: bool) -> str:
        """As OpenAI has it: a call of the one function that was named is an ordinary end."""
        assert piece.finish_reason is not None
        if called and piece.finish_reason is FinishReason.STOP and self.request.named_tool is None:
            return "tool_calls"
        return piece.finish_reason.value

    def _message(self, said: list[Said]) -> dict[str, Any]:
        content = "".join(part.text for part in said if part.kind == "content")
        calls = _calls(said)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
        if self.job.reasoning != "none":
            thoughts = "".join(part.text for part in said if part.kind == "reasoning")
            message["reasoning_content"] = thoughts.strip() or None
        return message

    async def _of_prompt(self, piece: Piece) -> dict[str, Any]:
        count = self.request.prompt_logprobs
        if count is None or not piece.prompt_logprobs:
            return {}
        tokens, found = self.job.submit.tokens, piece.prompt_logprobs
        # A long prompt's would hold the loop for seconds.
        shown = await to_thread(prompt_logprobs, tokens, found, count, self.tokenizer)
        return {"prompt_logprobs": shown}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        piece: Piece | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        if piece is not None and piece.logprobs:
            choice["logprobs"] = chat_logprobs(piece.tokens, piece.logprobs, self.tokenizer)
        if piece is not None and self.request.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        return self.head.json("chat.completion.chunk") | {"choices": [choice]}


@dataclass(slots=True)
class _Message:
    """One choice so far."""

    speech: Speech
    pieces: list[Piece] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    num_calls: int = 0

    @property
    def last(self) -> Piece:
        return self.pieces[-1]

    def take(self, piece: Piece, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """What this piece adds, as deltas."""
        self.pieces.append(piece)
        said = self.speech.feed(piece.text)
        if piece.finish_reason is not None:
            said += self.speech.flush()
        self.said += said
        if piece.logprobs:
            self.logprobs.append(chat_logprobs(piece.tokens, piece.logprobs, tokenizer))
        deltas = []
        for part in said:
            self.num_calls += part.call is not None
            deltas.append(_delta(part, self.num_calls - 1))
        return deltas


def speech_of(request: ChatCompletionRequest, job: Job, tokenizer: Tokenizer) -> Speech:
    """What takes the answer to this request apart."""
    parser: ToolParser = NoCalls()
    if request.must_call:
        parser = ForcedCalls(request.tool_names, request.named_tool)
    elif request.may_call:
        hermes = tokenizer.tool_format == "hermes"
        parser = HermesCalls(request.tool_names) if hermes else LlamaCalls(request.tool_names)
    return Speech(parser, job.reasoning)


def _delta(part: Said, call: int) -> dict[str, Any]:
    """What one part adds to the message, or to this call of it."""
    if part.call is not None:
        return {"tool_calls": [{"index": call, **_call_json(part.call)}]}
    if part.kind == "arguments":
        return {"tool_calls": [{"index": call, "function": {"arguments": part.text}}]}
    return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


def _calls(said: list[Said]) -> list[dict[str, Any]]:
    """The calls of a message, each with all of its arguments."""
    calls: list[dict[str, Any]] = []
    for part in said:
        if part.call is not None:
            calls.append(_call_json(part.call))
        elif part.kind == "arguments":
            calls[-1]["function"]["arguments"] += part.text
    return calls


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
