"""What clients may send: OpenAI's request bodies, checked strictly; what is not served is refused."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from configs.errors import nearest
from engine.errors import BadRequest

INT64 = 2**63
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024  # what may be held back of a stream
MAX_STOP_TOKENS = 128
MAX_MESSAGES = 4096
SHOWN = 200  # characters of the caller's own input in an error

TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]

# Parameters of OpenAI and vLLM that are not served, and the values that ask for nothing. Null always does.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "structured_outputs": (),
    "priority": (0,),
    "cache_salt": (),
    "vllm_xargs": ({},),
}
CHAT_NOTHING = _NOTHING | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
}
TEXT_NOTHING = _NOTHING | {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "add_special_tokens": (True,),
}


class _Body(BaseModel):
    # Strict: no "1" for 1, no true for 1, no 1.0 for 1. Inputs stay out of pydantic's own messages.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(_Body):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    # What replies carry and SDKs send back with them: accepted while empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[None], Field(max_length=0)] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_parts(cls, content: Any) -> Any:
        if not isinstance(content, str | list):
            raise ValueError("must be a text or a list of text parts")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        content = "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer word for the same
        message = {"role": role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class Request(_Body):
    """What chat and text completions share."""

    model: str
    plan: str | None = None  # of the loaded ones; the server's default if none is named
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=INT64)  # -1 and 0: off
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] = []
    ignore_eos: bool = False
    user: str | None = None  # who asks: changes no answer

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def answer_limit(self) -> int | None:
        """Tokens of the answer that were asked for; None = what the context leaves."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)
    safety_identifier: str | None = None  # as `user`

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
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions. One prompt: a text, or token ids."""

    prompt: str | list[int]
    max_tokens: int = Field(16, ge=1, lt=INT64)  # OpenAI's default

    @field_validator("prompt", mode="plain")
    @classmethod
    def _single_prompt(cls, prompt: Any) -> Any:
        """Unwrap a list of one prompt; anything else is refused in one sentence, however long the list."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ValueError(
                    f"{len(prompt)} prompts in one request are not served; send one request each"
                )
            prompt = prompt[0]
        if not isinstance(prompt, str | list):
            raise ValueError("must be a text or a list of token ids")
        if prompt == []:  # an empty text may still become a token: some models open every text with one
            raise ValueError("must not be empty")
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            raise ValueError("must be a text or a list of token ids, which are whole numbers")
        return prompt


_Request = TypeVar("_Request", bound=Request)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """The checked request, or BadRequest with the field to blame."""
    return _check(ChatCompletionRequest, _decode(body), CHAT_NOTHING)


def parse_completion(body: bytes) -> CompletionRequest:
    """The checked request, or BadRequest with the field to blame."""
    return _check(CompletionRequest, _decode(body), TEXT_NOTHING)


def _decode(body: bytes) -> dict[str, Any]:
    """A JSON object. msgspec is strict where Python's json is not: no NaN, no lone surrogates."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        words = f"We could not parse the JSON body of your request: {str(error)[:SHOWN]}"
        raise BadRequest(words, code="invalid_json") from error
    if not isinstance(content, dict):
        raise BadRequest(f"The JSON body must be an object, not {_kind(content)}.", code="invalid_json")
    return content


def _check(
    model: type[_Request], content: dict[str, Any], nothing: Mapping[str, tuple[Any, ...]]
) -> _Request:
    asked = {}
    for name, value in content.items():
        if name in model.model_fields:
            if value is not None:  # null is OpenAI's "as if I had not said it"
                asked[name] = value
        elif name not in nothing:
            hint = nearest(name[:SHOWN], model.model_fields)
            raise _unsupported(name, f"Unrecognized request argument supplied: {name[:SHOWN]!r}; {hint}")
        elif value is not None and not any(_same(value, neutral) for neutral in nothing[name]):
            raise _unsupported(name, f"Unsupported parameter: {name!r} with this value is not served.")
    try:
        return model.model_validate(asked)
    except ValidationError as error:
        raise _bad_field(error) from error


def _unsupported(name: str, words: str) -> BadRequest:
    return BadRequest(words, param=name[:SHOWN], code="unsupported_parameter")


def _bad_field(error: ValidationError) -> BadRequest:
    """The first complaint of pydantic in OpenAI's form."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(map(str, first["loc"]))[:SHOWN]
    words = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "missing":
            return BadRequest(
                f"Missing required parameter: {path!r}.", param=path, code="missing_required_parameter"
            )
        case "extra_forbidden":
            return BadRequest(f"Unsupported parameter: {path!r}.", param=path, code="unsupported_parameter")
        case "value_error" if not path:
            return BadRequest(f"{words}.", code="invalid_value")
        case kind:
            code = "invalid_type" if kind.endswith("_type") else "invalid_value"
            return BadRequest(
                f"Invalid value for {path!r}: {words} (got {_shown(first['input'])}).", param=path, code=code
            )


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: 0 and 0.0 are, 0 and false are not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _kind(value: Any) -> str:
    return {str: "a string", list: "an array", dict: "an object", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


def _shown(value: Any) -> str:
    """A short echo of what was sent: numbers and short strings as they are, the rest by kind."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**64:
        return repr(value)
    return repr(value) if isinstance(value, str) and len(value) <= 40 else _kind(value)
