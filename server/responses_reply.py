"""ResponsesReply: the JSON of /v1/responses, whole or as events. Nothing of it is kept on the server."""

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from engine.messages import FinishReason
from server.calls_in_text import ToolCall
from server.chat_reply import speech_of
from server.chat_request import ChatCompletionRequest
from server.completion import Piece
from server.prepare import Job
from server.responses import Head, cost_json, usage_json
from server.responses_request import FlatChoice, ResponsesRequest
from server.speech import Said
from server.tokenizer import Tokenizer


@dataclass(slots=True)
class ResponsesReply:
    """One response. Its items are made as the answer comes; the whole reply is what the events add up to."""

    head: Head
    job: Job
    request: ResponsesRequest
    chat: ChatCompletionRequest
    tokenizer: Tokenizer
    _items: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0  # of the next event
    _thought_tokens: int = 0

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        async with aclosing(self.chunks(pieces)) as chunks:
            async for chunk in chunks:
                last = chunk
        response: dict[str, Any] = last["response"]
        return response

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[dict[str, Any], None]:
        speech = speech_of(self.chat, self.job, self.tokenizer)
        opened = False
        async with aclosing(pieces):
            async for piece in pieces:
                if not opened:
                    yield self._event("response.created", response=self._response("in_progress", None))
                    yield self._event("response.in_progress", response=self._response("in_progress", None))
                    opened = True
                said = speech.feed(piece.text)
                self._thought_tokens += len(piece.tokens) if speech.reasoning == "open" else 0
                if piece.finish_reason is not None:
                    said += speech.flush()
                for part in said:
                    for event in self._say(part):
                        yield event
        for event in self._close():
            yield event
        status = "incomplete" if piece.finish_reason is FinishReason.LENGTH else "completed"
        yield self._event(f"response.{status}", response=self._response(status, piece))

    def _say(self, part: Said) -> Iterator[dict[str, Any]]:
        """The events of one part: a new item if it is of another kind than the one that is open."""
        if part.call is not None:
            yield from self._close()
            yield from self._open_call(part.call)
            return
        if part.kind == "arguments":
            yield self._more_arguments(part.text)
            return
        kind = "reasoning" if part.kind == "reasoning" else "message"
        if not (self._is_open and self._items[-1]["type"] == kind):
            yield from self._close()
            yield from self._open(kind)
        item = self._items[-1]
        item["content"][0]["text"] += part.text
        name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
        yield self._event(name, **self._place(item), content_index=0, delta=part.text, **_logprobs(kind))

    @property
    def _is_open(self) -> bool:
        return bool(self._items) and self._items[-1]["status"] == "in_progress"

    def _open(self, kind: str) -> Iterator[dict[str, Any]]:
        if kind == "message":
            item: dict[str, Any] = {"id": _name("msg"), "type": kind, "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": _name("rs"), "type": kind, "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        item["status"] = "in_progress"
        added = {**item, "content": []}
        self._items.append({**item, "content": [part]})
        index = len(self._items) - 1
        yield self._event("response.output_item.added", output_index=index, item=added)
        place = self._place(self._items[-1])
        yield self._event("response.content_part.added", **place, content_index=0, part=dict(part))

    def _close(self) -> Iterator[dict[str, Any]]:
        """The end of the item that is open, if one is."""
        if not self._is_open:
            return
        item = self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._place(item), **said)
            yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
            return
        part = item["content"][0]
        kind = "output_text" if item["type"] == "message" else "reasoning_text"
        place = {**self._place(item), "content_index": 0}
        yield self._event(f"response.{kind}.done", **place, text=part["text"], **_logprobs(item["type"]))
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _open_call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        item = {
            "id": _name("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))
        yield self._more_arguments(call.arguments)

    def _more_arguments(self, text: str) -> dict[str, Any]:
        item = self._items[-1]
        item["arguments"] += text
        return self._event("response.function_call_arguments.delta", **self._place(item), delta=text)

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **content}

    def _response(self, status: str, piece: Piece | None) -> dict[str, Any]:
        request = self.request
        text = request.text.format
        response: dict[str, Any] = {
            "id": self.head.request_id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "model": self.head.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": self.chat.temperature,
            "text": {"format": {"type": "text"} if text is None else text.model_dump(by_alias=True)},
            "tool_choice": _flat(request.tool_choice),
            "tools": [tool.model_dump() for tool in request.tools],
            "top_p": self.chat.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if piece is None:
            return response
        usage = usage_json(self.job, piece)
        return response | {
            "output": list(self._items),
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                # Writing to the prefix cache costs nobody anything, and is not counted.
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
                "total_tokens": usage["total_tokens"],
            },
            "farspan": cost_json(piece.cost),
        }


def _flat(choice: FlatChoice) -> Any:
    return choice.type if choice.name is None else {"type": choice.type, "name": choice.name}


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}


def _name(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
