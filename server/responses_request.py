"""What clients may send to /v1/responses, said again as a chat: it is the same request in other words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from engine.errors import BadRequest
from server.bounds import INT64, MAX_MESSAGES, MAX_TOOLS
from server.chat_request import ChatCompletionRequest
from server.checking import Body, check, decode_object
from server.tools import FunctionName

# Of OpenAI's parameters, those that are not served, and the values that ask for nothing.
RESPONSES_NOTHING: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),  # nothing is kept, so true would be a promise
    "stream_options": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# What the fields of a chat are called here, for errors.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class TextItem(Body):
    type: Literal["input_text", "output_text", "reasoning_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    logprobs: list[Any] | None = None  # of an earlier answer


class Item(Body):
    """A message, a call that the model made, what the call brought, or what the model thought."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: list[TextItem] | None = None
    call_id: CallId | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: str | None = None
    summary: list[Any] | None = None
    id: str | None = None  # as the answer had it; nothing is looked up
    status: Literal["completed", "incomplete", "in_progress"] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_parts(cls, content: Any) -> Any:
        return [{"type": "input_text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def _complete(self) -> "Item":
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"an item of type '{self.type}' needs '{missing[0]}'")
        return self

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or [])


class FlatTool(Body):
    """A function; other tools are run by OpenAI's servers."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Body):
    """A word, or `function` and the name of one."""

    type: Literal["none", "auto", "required", "function"]
    name: FunctionName | None = None

    def for_chat(self) -> Any:
        return self.type if self.name is None else {"type": self.type, "function": {"name": self.name}}


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "TextFormat":
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise ValueError("'schema' goes with type 'json_schema', and only with it")
        return self


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: None = None


class ResponsesRequest(Body):
    """POST /v1/responses"""

    model: str
    input: Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=INT64)
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: FlatChoice = FlatChoice(type="auto")
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    stream: bool = False
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # As in a chat, and checked there.
    plan: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    seed: Any = None
    user: Any = None
    cache_salt: Any = None
    timeout: Any = None
    chat_template_kwargs: Any = None

    @field_validator("input", mode="before")
    @classmethod
    def _text_or_items(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _a_word_or_a_name(cls, choice: Any) -> Any:
        return {"type": choice} if isinstance(choice, str) else choice

    def as_chat(self) -> ChatCompletionRequest:
        """The same as a chat. Raises BadRequest."""
        same = ("model", "stream", "plan", "temperature", "top_p", "top_k", "seed", "user", "cache_salt")
        asked: dict[str, Any] = {name: getattr(self, name) for name in same}
        asked |= {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self._format(),
            "tools": [{"type": "function", "function": _function(tool)} for tool in self.tools],
            "tool_choice": self.tool_choice.for_chat(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "timeout": self.timeout,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return check(ChatCompletionRequest, asked, {})

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if item.type == "message":
                messages.append({"role": item.role, "content": item.text})
            elif item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            elif item.type == "function_call":
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                last = messages[-1] if messages else {}
                if last.get("role") != "assistant":  # calls of one turn belong to one message
                    last = {"role": "assistant", "content": "", "tool_calls": []}
                    messages.append(last)
                last.setdefault("tool_calls", []).append(call)
        return messages  # templates leave out what a model thought in earlier turns, and so does this

    def _format(self) -> dict[str, Any] | None:
        form = self.text.format
        if form is None or form.type != "json_schema":
            return None if form is None else {"type": form.type}
        return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}


@contextmanager
def own_words() -> Iterator[None]:
    """What is refused as a chat meanwhile is refused by the names that the fields have here."""
    try:
        yield
    except BadRequest as error:
        if error.param is not None:
            first, dot, rest = error.param.partition(".")
            error.param = _NAMES.get(first, first) + dot + rest
        raise


def parse_responses(body: bytes) -> ResponsesRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(ResponsesRequest, decode_object(body), RESPONSES_NOTHING)


def _function(tool: FlatTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {name: value for name, value in function.items() if value is not None}
