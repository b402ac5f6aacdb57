"""What clients may send to /v1/chat/completions."""

from typing import Annotated, Any

import msgspec
from pydantic import Field, field_validator, model_validator

from server.bounds import (
    INT64,
    MAX_MESSAGES,
    MAX_TEMPLATE_BYTES,
    MAX_TEMPLATE_KEYS,
    MAX_TOOL_BYTES,
    MAX_TOOLS,
)
from server.chat_messages import ChatMessage
from server.checking import check, decode_object
from server.request import NOTHING, LogprobCount, Request
from server.tools import Tool, ToolChoice

# What the server or transformers says to a template; some versions of theirs take more than they render.
RESERVED_TEMPLATE_KEYS = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "padding", "truncation", "max_length", "self"),
    }
)
CHAT_NOTHING = NOTHING | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
}


class ChatCompletionRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool = False
    top_logprobs: LogprobCount | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: ToolChoice = ToolChoice(type="auto")
    parallel_tool_calls: bool = True
    add_generation_prompt: bool | None = None  # true, unless the final message is continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)
    safety_identifier: str | None = None  # as `user`

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_the_templates_own(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """A client may set what a template asks, not what we or transformers tell it."""
        if len(keys) > MAX_TEMPLATE_KEYS or len(msgspec.json.encode(keys)) > MAX_TEMPLATE_BYTES:
            raise ValueError(
                f"must have at most {MAX_TEMPLATE_KEYS} keys and {MAX_TEMPLATE_BYTES} bytes of JSON"
            )
        for key in keys:
            if key in RESERVED_TEMPLATE_KEYS or key.endswith("_token") or not key.isidentifier():
                raise ValueError(f"must not set {key[:40]!r}")
        return keys

    @model_validator(mode="after")
    def _one_end_of_the_prompt(self) -> "ChatCompletionRequest":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("'continue_final_message' and 'add_generation_prompt' cannot both be true")
        return self

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _a_word_or_a_name(cls, choice: Any) -> Any:
        if isinstance(choice, str) and choice not in ("none", "auto", "required"):
            raise ValueError("must be 'none', 'auto', 'required' or a function in an object")
        return {"type": choice} if isinstance(choice, str) else choice

    @field_validator("tools")
    @classmethod
    def _tools_with_names_of_their_own(cls, tools: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError("must have different names")
        if len(msgspec.json.encode([tool.function.parameters for tool in tools])) > MAX_TOOL_BYTES:
            raise ValueError(f"must have at most {MAX_TOOL_BYTES} bytes of parameters")
        return tools

    @model_validator(mode="after")
    def _choices_that_are_there(self) -> "ChatCompletionRequest":
        if self.tool_choice.type == "required" and not self.tools:
            raise ValueError("'tool_choice' is 'required', and there are no 'tools'")
        if self.named_tool is not None and self.named_tool not in self.tool_names:
            raise ValueError(f"'tool_choice' names {self.named_tool!r}, which is not among the 'tools'")
        structured = self.structured_outputs is not None or (
            self.response_format is not None and self.response_format.type != "text"
        )
        if self.may_call and structured:
            raise ValueError("'tools' and structured outputs cannot be asked for together")
        if self.must_call and (self.ignore_eos or self.min_tokens):
            raise ValueError("forced tool calls end themselves: no 'ignore_eos', no 'min_tokens'")
        return self

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionRequest":
        if self.max_completion_tokens is not None and self.max_tokens not in (
            None,
            self.max_completion_tokens,
        ):
            raise ValueError(
                "'max_tokens' and 'max_completion_tokens' cannot both be set to different values"
            )
        return self

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools]

    @property
    def named_tool(self) -> str | None:
        """The one function that must be called."""
        return None if self.tool_choice.function is None else self.tool_choice.function.name

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice.type != "none"

    @property
    def must_call(self) -> bool:
        return self.may_call and self.tool_choice.type != "auto"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(ChatCompletionRequest, decode_object(body), CHAT_NOTHING)
