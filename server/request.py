"""Request: what chat and text completions share."""

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from server.answer_form import ResponseFormat, StructuredOutputs
from server.bounds import (
    INT31,
    INT64,
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    MAX_TIMEOUT,
)
from server.checking import Body

TokenId = Annotated[int, Field(ge=0)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]

# Parameters of OpenAI and vLLM that are not served, and the values that ask for nothing. Null always does.
NOTHING: dict[str, tuple[Any, ...]] = {
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


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class Asked(Body):
    """The field `farspan`: what to tell beside the answer. It changes nothing of the answer."""

    progress: bool = False  # of the prompt, in a stream
    per_head: bool = False  # the cost by layer and KV head


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
