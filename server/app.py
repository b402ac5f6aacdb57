"""The HTTP application: which URL does what. Nothing is computed here, and nothing but JSON is read."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from configs.schema import ServerConfig
from engine.client import Engine
from engine.errors import EngineDead, NotFound
from server import errors
from server.completion import Piece, answer
from server.disconnect import unless_disconnected
from server.metrics import Metrics
from server.prepare import Job, prepare_chat, prepare_completion
from server.protocol import SHOWN, parse_chat, parse_completion
from server.protocol import Request as CheckedRequest
from server.responses import Reply, Usage
from server.streaming import DONE, EventStream, event
from server.tokenizer import Tokenizer
from server.version import farspan_version


def build_app(engine: Engine, tokenizer: Tokenizer, config: ServerConfig, metrics: Metrics) -> FastAPI:
    """The application over one engine. `metrics` knows the name that clients use for the model."""
    # Interactive docs would load scripts from elsewhere; a slash too many is a wrong URL.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    api = _Api(engine, tokenizer, config, metrics)
    errors.install(app)
    for path, endpoint in {"/v1/chat/completions": api.chat, "/v1/completions": api.completion}.items():
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
    for path, look in {
        "/v1/models": api.models,
        "/health": api.ready,
        "/readyz": api.ready,
        "/livez": api.live,
        "/metrics": api.exposition,
    }.items():
        app.add_api_route(path, look, methods=["GET"], response_model=None)
    return app


@dataclass(frozen=True)
class _Api:
    """The endpoints."""

    engine: Engine
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        checked = parse_chat(await self._body(request))
        self._expect(checked)
        job = await prepare_chat(checked, self.engine.card, self.tokenizer)
        return await self._answer(request, checked, job)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions"""
        checked = parse_completion(await self._body(request))
        self._expect(checked)
        job = await prepare_completion(checked, self.engine.card, self.tokenizer)
        return await self._answer(request, checked, job)

    async def models(self) -> Response:
        """GET /v1/models: the one model, with what it takes and under which plans."""
        card = self.engine.card
        plans = [msgspec.to_builtins(plan) | {"default": plan is card.plans[0]} for plan in card.plans]
        model = {
            "id": self.metrics.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "farspan",
            "root": card.name,
            "parent": None,
            "max_model_len": card.max_model_len,
            "plans": plans,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def live(self) -> Response:
        """GET /livez: the serving process runs."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> Response:
        """GET /readyz, /health: requests would be served now."""
        self._expect_engine()
        return JSONResponse({"status": "ready"})

    async def exposition(self) -> Response:
        """GET /metrics"""
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: Request, checked: CheckedRequest, job: Job) -> Response:
        reply = self._reply(job)
        pieces = answer(job, self.engine, self.tokenizer, self.metrics)
        if checked.stream:
            events = _events(pieces, reply, job, include_usage=checked.include_usage)
            return EventStream(events, self.config.sse_keep_alive_interval)
        return JSONResponse(await unless_disconnected(request.receive, _whole(pieces, reply, job)))

    def _reply(self, job: Job) -> Reply:
        return Reply(
            kind="chat" if job.submit.request_id.startswith("chatcmpl-") else "text",
            request_id=job.submit.request_id,
            created=int(time.time()),
            model=self.metrics.model_name,
            fingerprint=f"farspan-{farspan_version()}-{job.plan.digest}",
        )

    def _expect(self, checked: CheckedRequest) -> None:
        if checked.model != self.metrics.model_name:
            known = self.metrics.model_name
            words = f"The model {checked.model[:SHOWN]!r} does not exist; this server has {known!r}."
            raise NotFound(words, param="model")
        self._expect_engine()

    def _expect_engine(self) -> None:
        if not self.engine.is_ready:
            raise EngineDead(self.engine.death or "The model is still loading.")

    async def _body(self, request: Request) -> bytes:
        """The body of a JSON request, within the limit."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise errors.WrongContentType("Send the request as JSON, with 'Content-Type: application/json'.")
        limit = self.config.max_body_bytes
        too_large = errors.BodyTooLarge(f"The request body is larger than the limit of {limit} bytes.")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:  # clients may declare nothing, or less than they send
                raise too_large
        return bytes(body)


async def _whole(pieces: AsyncGenerator[Piece, None], reply: Reply, job: Job) -> dict[str, Any]:
    """The reply to a request that does not stream."""
    text = []
    async with aclosing(pieces):
        async for piece in pieces:
            text.append(piece.text)
    assert piece.finish_reason is not None
    return reply.whole("".join(text), piece.finish_reason.value, _usage(job, piece), piece.cost)


async def _events(
    pieces: AsyncGenerator[Piece, None], reply: Reply, job: Job, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed reply. The status is sent by now, so an error is an event, too."""
    no_usage = {"usage": None} if include_usage else {}
    opening = reply.first_chunk()
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if opening is not None:
                    yield event(opening | no_usage)
                    opening = None
                if piece.text:
                    yield event(reply.text_chunk(piece.text) | no_usage)
                if piece.finish_reason is not None:
                    yield event(reply.last_chunk(piece.finish_reason.value, piece.cost) | no_usage)
                    if include_usage:
                        yield event(reply.usage_chunk(_usage(job, piece)))
    except Exception as error:  # whatever it is, the stream must end as a stream
        yield event(errors.in_stream(error))
    yield DONE


def _usage(job: Job, piece: Piece) -> Usage:
    cached = piece.cost.cached_tokens if piece.cost is not None else 0
    return Usage(job.submit.prompt_length, piece.num_tokens, cached)
