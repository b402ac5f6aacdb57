"""The turns of a chat as clients send them, and as templates read them."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from server.bounds import MAX_TOOLS
from server.checking import Body
from server.tools import FunctionName


class TextPart(Body):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class PastFunction(Body):
    name: FunctionName
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _json_object(cls, arguments: str) -> str:
        try:
            if isinstance(msgspec.json.decode(arguments or "{}"), dict):
                return arguments or "{}"
        except (msgspec.MsgspecError, RecursionError):
            pass
        raise ValueError("must be a JSON object as text")


class PastCall(Body):
    """A tool call of an earlier turn."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: PastFunction

    def for_template(self) -> dict[str, Any]:
        """Templates want the arguments as an object."""
        arguments = msgspec.json.decode(self.function.arguments)
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class ChatMessage(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[PastCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    content: Annotated[list[TextPart], Field(min_length=1)] | None
    name: str | None = None
    # What replies carry and SDKs send back with them: accepted while empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_may_stand_alone(cls, message: Any) -> Any:
        """An assistant that called tools need not have said anything."""
        if isinstance(message, dict) and message.get("tool_calls"):
            return {"content": None, **message}
        return message

    @model_validator(mode="after")
    def _calls_and_results_are_in_their_places(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant has 'tool_calls'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of role 'tool' needs 'tool_call_id', and no other may have it")
        return self

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_parts(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("tool_calls"):
            return None
        if not isinstance(content, str | list):
            raise ValueError("must be a text or a list of text parts")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        content = "\n".join(part.text for part in self.content or [])
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer word for the same
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message
