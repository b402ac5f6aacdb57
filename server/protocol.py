"""What clients may send: OpenAI's request bodies, checked strictly; what is not served is refused."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from configs.errors import nearest
from engine.errors import BadRequest

INT64 = 2**63
INT31 = 2**31
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024  # what may be held back of a stream
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20  # OpenAI's and vLLM's most
MAX_CHOICES = 1024
MAX_TOOLS = 128
MAX_TOOL_BYTES = 512 * 1024  # of JSON, all together
MAX_DETOKENIZED = 2**21  # token ids
MAX_N = 128  # choices of one request, as OpenAI has it
MAX_TEMPLATE_KEYS = 32
MAX_TEMPLATE_BYTES = 16 * 1024  # of JSON
MAX_TIMEOUT = 86_400.0  # seconds
MAX_MESSAGES = 4096
SHOWN = 200  # characters of the caller's own input in an error

TokenId = Annotated[int, Field(ge=0)]
FunctionName = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
ChoiceText = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]

# Parameters of OpenAI and vLLM that are not served, and the values that ask for nothing. Null always does.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "vllm_xargs": ({},),
}
# What the server or transformers says to a template; some versions of theirs take more than they render.
RESERVED_TEMPLATE_KEYS = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "padding", "truncation", "max_length", "self"),
    }
)

CHAT_NOTHING = _NOTHING | {
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
TEXT_NOTHING = _NOTHING | {
    "best_of": (1,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "add_special_tokens": (True,),
}


class Body(BaseModel):
    """What all that clients send has in common."""

    # Strict: no "1" for 1, no true for 1, no 1.0 for 1. Inputs stay out of pydantic's own messages.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class Asked(Body):
    """The field `farspan`: what to tell beside the answer. It changes nothing of the answer."""

    progress: bool = False  # of the prompt, in a stream
    per_head: bool = False  # the cost by layer and KV head


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


class FunctionTool(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}  # JSON schema
    strict: bool | None = None


class Tool(Body):
    """OpenAI has other types, which its own servers run."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: FunctionName


class ToolChoice(Body):
    """A word, or `function` and the name of one."""

    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None

    @model_validator(mode="after")
    def _name_where_it_belongs(self) -> "ToolChoice":
        if (self.function is not None) != (self.type == "function"):
            raise ValueError("a 'function' goes with type 'function', and only with it")
        return self


class JsonSchema(Body):
    """What OpenAI's SDKs send for a class of the caller's. It is obeyed whether `strict` or not."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("'json_schema' goes with type 'json_schema', and only with it")
        return self


class StructuredOutputs(Body):
    """vLLM's ways to say what an answer must look like: exactly one of them."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, StringConstraints(min_length=1)] | None = None
    choice: Annotated[list[ChoiceText], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1)] | None = None
    json_object: Literal[True] | None = None

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, schema: Any) -> Any:
        """A schema may come as JSON inside a string."""
        if not isinstance(schema, str):
            return schema
        try:
            return msgspec.json.decode(schema)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError("must be a JSON schema") from error

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        given = [name for name in StructuredOutputs.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("must have exactly one of json, regex, choice, grammar and json_object")
        return self


class Request(Body):
    """What chat and text completions share."""

    model: str
    plan: str | None = None  # of the loaded ones; the server's default if none is named
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=INT64)  # -1 and 0: off
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] = []
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, lt=INT64)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    prompt_logprobs: LogprobCount | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=INT64)  # keep the last; -1: what fits
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT)  # seconds from arrival to the end
    priority: int = Field(0, ge=-INT31, lt=INT31)  # lower ones are admitted first
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    user: str | None = None  # who asks: changes no answer
    farspan: Asked = Asked()

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _ids_as_keys(cls, bias: Any) -> Any:
        """JSON has only strings as keys; token ids are decimal."""
        if not isinstance(bias, dict):
            return bias
        if len(bias) > MAX_BIASES:
            raise ValueError(f"must have at most {MAX_BIASES} entries")
        if not all(key.isascii() and key.isdecimal() and len(key) < 20 for key in bias):
            raise ValueError("must have token ids as keys")
        return {int(key): value for key, value in bias.items()}

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _something_stays(cls, count: int | None) -> int | None:
        if count == 0:
            raise ValueError("must leave at least one token; -1 keeps what fits")
        return count

    @model_validator(mode="after")
    def _options_that_belong_together(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("'prompt_logprobs' is not available when 'stream' is true")
        if self.farspan.progress and not self.stream:
            raise ValueError("'farspan.progress' is only allowed when 'stream' is true")
        form = self.response_format
        if self.structured_outputs is not None or (form is not None and form.type != "text"):
            if self.structured_outputs is not None and form is not None:
                raise ValueError("'response_format' and 'structured_outputs' cannot both be set")
            if self.ignore_eos or self.min_tokens:
                raise ValueError("structured outputs end themselves: no 'ignore_eos', no 'min_tokens'")
        if self.answer_limit is not None and self.min_tokens > self.answer_limit:
            raise ValueError("'min_tokens' must not exceed the limit of the answer")
        return self

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report beside each of the answer; None = no logprobs."""

    @property
    def answer_limit(self) -> int | None:
        """Tokens of the answer that were asked for; None = what the context leaves."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Does every chunk say the usage so far?"""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


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

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

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
    max_tokens: int = Field(16, ge=0, lt=INT64)  # OpenAI's default
    logprobs: LogprobCount | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _something_to_answer(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' must be at least 1 unless 'echo' is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

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


class TokenizeRequest(Body):
    """POST /tokenize: a text as `prompt`, or a chat as `messages`; in vLLM's words."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # default: for a text, as its template writes them for a chat
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_DETOKENIZED)]


_Request = TypeVar("_Request", bound=Body)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(ChatCompletionRequest, decode_object(body), CHAT_NOTHING)


def parse_completion(body: bytes) -> CompletionRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(CompletionRequest, decode_object(body), TEXT_NOTHING)


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(TokenizeRequest, decode_object(body), {})


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(DetokenizeRequest, decode_object(body), {})


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object. msgspec is strict where Python's json is not: no NaN, no lone surrogates."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        words = f"We could not parse the JSON body of your request: {str(error)[:SHOWN]}"
        raise BadRequest(words, code="invalid_json") from error
    if not isinstance(content, dict):
        raise BadRequest(f"The JSON body must be an object, not {_kind(content)}.", code="invalid_json")
    return content


def check(model: type[_Request], content: dict[str, Any], nothing: Mapping[str, tuple[Any, ...]]) -> _Request:
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
