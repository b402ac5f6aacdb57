"""What clients may send to /tokenize and /detokenize."""

from typing import Annotated

from pydantic import Field, model_validator

from server.bounds import MAX_DETOKENIZED, MAX_MESSAGES
from server.chat_messages import ChatMessage
from server.checking import Body, check, decode_object
from server.request import TokenId


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


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(TokenizeRequest, decode_object(body), {})


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """The checked request, or BadRequest with the field to blame."""
    return check(DetokenizeRequest, decode_object(body), {})
