"""What clients may send to /v1/completions."""

from typing import Any, cast

from pydantic import Field, field_validator, model_validator

from server.bounds import INT64, MAX_PROMPTS
from server.checking import check, decode_object
from server.request import NOTHING, LogprobCount, Request

TEXT_NOTHING = NOTHING | {
    "best_of": (1,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "add_special_tokens": (True,),
}


class CompletionRequest(Request):
    """POST /v1/completions. One prompt, a text or token ids, or a list of them."""

    prompt: str | list[int] | list[str] | list[list[int]]
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

    @property
    def prompts(self) -> list[str | list[int]]:
        """All of them, in the order of their choices."""
        return cast(list[str | list[int]], self.prompt if _is_list_of_prompts(self.prompt) else [self.prompt])

    @field_validator("prompt", mode="plain")
    @classmethod
    def _texts_or_ids(cls, prompt: Any) -> Any:
        """As sent, or refused in one sentence, however long the list."""
        prompts = prompt if _is_list_of_prompts(prompt) else [prompt]
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, this has {len(prompts)}")
        for one in prompts:
            if not isinstance(one, str | list):
                raise ValueError("must be a text or a list of token ids, or a list of either")
            if one == []:  # an empty text may still become a token: some models open every text with one
                raise ValueError("must not be empty")
            if isinstance(one, list) and not all(type(token) is int for token in one):
                raise ValueError("must be a text or a list of token ids, which are whole numbers")
        return prompt


def _is_list_of_prompts(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def parse_completion(body: bytes) -> CompletionRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(CompletionRequest, decode_object(body), TEXT_NOTHING)
