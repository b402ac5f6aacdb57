"""ChatReply: the JSON of /v1/chat/completions, whole or in chunks."""

from asyncio import to_thread
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from engine.messages import FinishReason
from server.completion import Piece
from server.logprobs import chat_logprobs, joined, prompt_logprobs
from server.prepare import Job
from server.protocol import ChatCompletionRequest
from server.responses import Head, cost_json, usage_json
from server.speech import Said, Speech
from server.tokenizer import Tokenizer
from server.toolcalls import ForcedCalls, HermesCalls, LlamaCalls, NoCalls, ToolCall, ToolParser


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One message of the assistant."""

    head: Head
    job: Job
    request: ChatCompletionRequest
    tokenizer: Tokenizer

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        speech = speech_of(self.request, self.job, self.tokenizer)
        said: list[Said] = []
        logprobs: list[dict[str, Any]] = []
        tokens: list[int] = []
        of_prompt: dict[str, Any] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                said += speech.feed(piece.text)
                tokens += piece.tokens
                if piece.logprobs:
                    logprobs.append(chat_logprobs(piece.tokens, piece.logprobs, self.tokenizer))
                of_prompt |= await self._of_prompt(piece)
        said += speech.flush()
        choice: dict[str, Any] = {
            "index": 0,
            "message": self._message(said),
            "logprobs": joined(logprobs),
            "finish_reason": self._finish_reason(piece, any(part.call for part in said)),
        }
        if self.request.return_token_ids:
            choice["token_ids"] = tokens
            of_prompt["prompt_token_ids"] = list(self.job.submit.tokens)
        return {
            **self.head.json("chat.completion"),
            "choices": [choice],
            "usage": usage_json(self.job, piece),
            "farspan": cost_json(piece.cost),
            **of_prompt,
        }

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[dict[str, Any], None]:
        no_usage = {"usage": None} if self.request.include_usage else {}
        ids = self.request.return_token_ids
        of_prompt = {"prompt_token_ids": list(self.job.submit.tokens)} if ids else {}
        opening: dict[str, Any] | None = self._chunk({"role": "assistant", "content": ""}) | of_prompt
        speech, num_calls = speech_of(self.request, self.job, self.tokenizer), 0
        async with aclosing(pieces):
            async for piece in pieces:
                if opening is not None:
                    yield opening | no_usage
                    opening = None
                said = speech.feed(piece.text)
                if piece.finish_reason is not None:
                    said += speech.flush()
                deltas = []
                for part in said:
                    deltas.append(_delta(part, num_calls))
                    num_calls += part.call is not None
                if not deltas and (piece.logprobs or (ids and piece.tokens)):
                    deltas = [{"content": ""}]  # tokens without text of their own yet
                for number, delta in enumerate(deltas):
                    yield self._chunk(delta, piece if number == 0 else None) | no_usage
        last = self._chunk({}, finish_reason=self._finish_reason(piece, num_calls > 0))
        yield last | {"farspan": cost_json(piece.cost)} | no_usage
        if self.request.include_usage:
            yield self.head.json("chat.completion.chunk") | {
                "choices": [],
                "usage": usage_json(self.job, piece),
            }

    def _finish_reason(self, piece: Piece, called: bool) -> str:
        """As OpenAI has it: a call of the one function that was named is an ordinary end."""
        assert piece.finish_reason is not None
        if called and piece.finish_reason is FinishReason.STOP and self.request.named_tool is None:
            return "tool_calls"
        return piece.finish_reason.value

    def _message(self, said: list[Said]) -> dict[str, Any]:
        content = "".join(part.text for part in said if part.kind == "content")
        calls = [part.call for part in said if part.call is not None]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [_call_json(call) for call in calls]
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
        self, delta: dict[str, Any], piece: Piece | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        if piece is not None and piece.logprobs:
            choice["logprobs"] = chat_logprobs(piece.tokens, piece.logprobs, self.tokenizer)
        if piece is not None and self.request.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        return self.head.json("chat.completion.chunk") | {"choices": [choice]}


def speech_of(request: ChatCompletionRequest, job: Job, tokenizer: Tokenizer) -> Speech:
    """What takes the answer to this request apart."""
    parser: ToolParser = NoCalls()
    if request.must_call:
        parser = ForcedCalls(request.tool_names, request.named_tool)
    elif request.may_call:
        hermes = tokenizer.tool_format == "hermes"
        parser = HermesCalls(request.tool_names) if hermes else LlamaCalls(request.tool_names)
    return Speech(parser, job.reasoning)


def _delta(part: Said, num_calls: int) -> dict[str, Any]:
    """What one part adds to the message; a call comes as a whole."""
    if part.call is not None:
        return {"tool_calls": [{"index": num_calls, **_call_json(part.call)}]}
    return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
