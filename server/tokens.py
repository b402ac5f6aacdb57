"""Tokens: /tokenize, /detokenize and /tokenizer_info, as vLLM has them. Text and token ids, no answer."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from engine.client import Engine
from engine.errors import BadRequest
from server.prepare import expect_model
from server.tokenizer import Tokenizer
from server.tokens_request import TokenizeRequest, parse_detokenize, parse_tokenize


@dataclass(frozen=True)
class Tokens:
    """The endpoints."""

    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    body: Callable[[Request], Awaitable[bytes]]  # of a JSON request, within the limit

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the token ids of a text, or of a chat as it would be sent to the model."""
        checked = parse_tokenize(await self.body(request))
        self._expect(checked.model)
        body = await asyncio.to_thread(self._tokenized, checked)
        return Response(body, media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids."""
        checked = parse_detokenize(await self.body(request))
        self._expect(checked.model)
        vocab = self.engine.card.vocab_size
        if any(token >= vocab for token in checked.tokens):
            raise BadRequest(f"Invalid value for 'tokens': token ids are 0 to {vocab - 1}.", param="tokens")
        text = await asyncio.to_thread(self.tokenizer.decode, checked.tokens)
        return JSONResponse({"prompt": text})

    async def info(self) -> Response:
        """GET /tokenizer_info: what evaluation tools ask, so that they need no tokenizer of their own."""
        return JSONResponse(
            {
                "tokenizer_class": self.tokenizer.kind,
                "chat_template": self.tokenizer.template_source,
                "model_max_length": self.engine.card.max_model_len,
                **self.tokenizer.special_tokens,
            }
        )

    def _expect(self, model: str | None) -> None:
        if model is not None:
            expect_model(model, self.model_name)

    def _tokenized(self, checked: TokenizeRequest) -> bytes:
        """The reply as JSON, which is slow for a long text: not for the event loop."""
        tokens = self._encode(checked)
        strings = map(self.tokenizer.token_string, tokens)
        reply: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self.engine.card.max_model_len,
            "tokens": tokens,
            "token_strs": list(strings) if checked.return_token_strs else None,
        }
        return msgspec.json.encode(reply)

    def _encode(self, checked: TokenizeRequest) -> list[int]:
        text, is_chat = checked.prompt or "", checked.messages is not None
        if checked.messages is not None:
            messages = [message.for_template() for message in checked.messages]
            text = self.tokenizer.render_chat(messages, add_generation_prompt=checked.add_generation_prompt)
        special = checked.add_special_tokens
        return self.tokenizer.encode(text, add_special_tokens=not is_chat if special is None else special)
