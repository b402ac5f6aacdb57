"""The HTTP application: which URL does what. Nothing is computed here, and nothing but JSON is read."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from configs.schema import ServerConfig
from engine.client import Engine
from engine.errors import EngineDead, Overloaded
from server import errors
from server.admin import Admin
from server.auth import Keys
from server.chat_reply import ChatReply
from server.chat_request import parse_chat
from server.completion import Piece, answer
from server.disconnect import unless_disconnected
from server.docs_page import docs_endpoints
from server.gate import Gate
from server.limits import Limits, Visit
from server.metrics import Metrics
from server.openapi import openapi
from server.page import page_endpoints
from server.prepare import Job, expect_model, prepare_chat, prepare_completion, salted
from server.request import Request as CheckedRequest
from server.responses import Head, Reply
from server.responses_reply import ResponsesReply
from server.responses_request import own_words, parse_responses
from server.several import interleaved, together
from server.streaming import DONE, EventStream, event
from server.structured import StructuredOutputs
from server.text_reply import TextReply
from server.text_request import parse_completion
from server.tokenizer import Tokenizer
from server.tokens import Tokens
from server.version import farspan_version

Endpoint = Callable[..., Awaitable[Response]]


def build_app(
    engine: Engine, tokenizer: Tokenizer, config: ServerConfig, metrics: Metrics, keys: Keys | None = None
) -> Gate:
    """The application over one engine. `metrics` knows the name that clients use for the model."""
    # FastAPI's own pages load scripts from elsewhere; a slash too many is a wrong URL.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    limits = Limits(config, metrics.refused)
    outputs = StructuredOutputs(tokenizer.grammars)
    api = _Api(engine, tokenizer, config, metrics, outputs, limits, Admin(limits, engine))
    errors.install(app)
    keys = keys or Keys()
    plans = [plan.name for plan in engine.card.plans]
    document = openapi(metrics.model_name, plans, locked=keys.are_needed, has_admins=keys.has_admins)
    admin = api.admin.endpoints() if keys.has_admins else {}
    texts = Tokens(engine, tokenizer, metrics.model_name, api.body)
    posts: dict[str, Endpoint] = {
        "/v1/chat/completions": api.chat,
        "/v1/completions": api.completion,
        "/v1/responses": api.responses,
        "/tokenize": texts.tokenize,
        "/detokenize": texts.detokenize,
        **admin,
    }
    gets: dict[str, Endpoint] = {
        "/v1/models": api.models,
        "/v1/models/{name:path}": api.model,
        "/v1/plans": api.plans,
        "/version": api.version,
        "/tokenizer_info": texts.info,
        "/health": api.ready,
        "/readyz": api.ready,
        "/livez": api.live,
        "/metrics": api.exposition,
        "/stats": api.stats,
        **page_endpoints(),
        **docs_endpoints(document),
    }
    for method, endpoints in {"POST": posts, "GET": gets}.items():
        for path, endpoint in endpoints.items():
            app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return Gate(app, keys, limits)


@dataclass(frozen=True)
class _Api:
    """The endpoints."""

    engine: Engine
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: Metrics
    outputs: StructuredOutputs
    limits: Limits
    admin: Admin
    started: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        checked = parse_chat(await self.body(request))
        self._expect(checked)
        job = await prepare_chat(checked, self.engine.card, self.tokenizer, self.outputs)
        reply = ChatReply(self._head(job), job, checked, self.tokenizer)
        return await self._answer(request, checked, [(job, reply)])

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions"""
        checked = parse_completion(await self.body(request))
        self._expect(checked)
        jobs = await prepare_completion(checked, self.engine.card, self.tokenizer, self.outputs)
        head = self._head(jobs[0])
        parts = [(job, TextReply(head, job, checked, self.tokenizer)) for job in jobs]
        return await self._answer(request, checked, parts)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses"""
        asked = parse_responses(await self.body(request))
        with own_words():
            checked = asked.as_chat()
            self._expect(checked)
            job = await prepare_chat(checked, self.engine.card, self.tokenizer, self.outputs, kind="resp_")
        reply = ResponsesReply(self._head(job), job, asked, checked, self.tokenizer)
        return await self._answer(request, checked, [(job, reply)])

    async def models(self) -> Response:
        """GET /v1/models: the one model, with what it takes and under which plans."""
        return JSONResponse({"object": "list", "data": [self._model_json()]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/{name}"""
        self._expect_model(name)
        return JSONResponse(self._model_json())

    async def plans(self) -> Response:
        """GET /v1/plans: what each loaded plan does in each layer. The first is the default."""
        data = [
            {"id": plan.name, "object": "plan", **msgspec.to_builtins(plan)}
            for plan in self.engine.card.plans
        ]
        return JSONResponse({"object": "list", "data": data})

    async def version(self) -> Response:
        """GET /version"""
        return JSONResponse({"version": farspan_version()})

    def _model_json(self) -> dict[str, Any]:
        card = self.engine.card
        names = ("name", "digest", "prefill", "policy", "decode", "budget")
        plans = [
            {name: getattr(plan, name) for name in names} | {"default": plan is card.plans[0]}
            for plan in card.plans
        ]
        return {
            "id": self.metrics.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "farspan",
            "root": card.name,
            "parent": None,
            "max_model_len": card.max_model_len,
            "plans": plans,
        }

    async def live(self) -> Response:
        """GET /livez: the serving process runs."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> Response:
        """GET /readyz, /health: requests would be served now; else why not, and how far the engine is."""
        if self.engine.is_ready:
            self._expect_engine()
            return JSONResponse({"status": "ready"})
        loading = self.engine.loading
        progress = {"phase": loading.phase, "fraction": loading.fraction, "reason": loading.reason}
        return errors.reply(EngineDead(self._trouble), loading=None if self.engine.death else progress)

    async def exposition(self) -> Response:
        """GET /metrics"""
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def stats(self) -> Response:
        """GET /stats: the engine at this moment, for the page."""
        card = self.engine.card
        pool = {"num_pages": card.num_pages, "page_bytes": card.page_bytes}
        trouble = None if self.engine.is_ready else self._trouble
        return JSONResponse({**msgspec.to_builtins(self.engine.stats), **pool, "trouble": trouble})

    async def _answer(
        self, request: Request, checked: CheckedRequest, parts: Sequence[tuple[Job, Reply]]
    ) -> Response:
        """The reply to one request: to its prompt, or to several."""
        visit: Visit = request.state.visit
        card = self.engine.card
        tokens = sum(job.submit.prompt_length for job, _ in parts)
        self.limits.queue(visit, tokens, card.max_model_len * card.max_num_seqs)
        trace = request.headers.get("traceparent", "")
        answers = [
            (reply, self._pieces(replace(job, client_id=visit.request_id, traceparent=trace), checked, visit))
            for job, reply in parts
        ]
        if checked.stream:
            streams = [reply.chunks(pieces) for reply, pieces in answers]
            chunks = streams[0] if len(streams) == 1 else interleaved(streams, checked.n)
            events = _events(chunks, typed=isinstance(parts[0][1], ResponsesReply))
            return EventStream(events, self.config.sse_keep_alive_interval)
        replies = [reply.whole(pieces) for reply, pieces in answers]
        content = replies[0] if len(replies) == 1 else together(replies, checked.n)
        return await unless_disconnected(request.receive, _whole(content))

    def _pieces(self, job: Job, checked: CheckedRequest, visit: Visit) -> AsyncGenerator[Piece, None]:
        begun = partial(self.limits.answered, visit, job.submit.prompt_length)
        return answer(salted(job, checked, visit.key), self.engine, self.tokenizer, self.metrics, begun)

    def _head(self, job: Job) -> Head:
        return Head(
            request_id=job.submit.request_id,
            created=int(time.time()),
            model=self.metrics.model_name,
            fingerprint=f"farspan-{farspan_version()}-{job.plan.digest}",
        )

    def _expect(self, checked: CheckedRequest) -> None:
        self._expect_model(checked.model)
        self._expect_engine()

    def _expect_model(self, name: str) -> None:
        expect_model(name, self.metrics.model_name)

    @property
    def _trouble(self) -> str:
        """Why nothing is served, where that is so."""
        return self.engine.death or self.engine.loading.words

    def _expect_engine(self) -> None:
        if not self.engine.is_ready:
            raise EngineDead(self._trouble)
        if self.admin.is_draining:
            raise Overloaded("The server is being drained: it takes no new requests.", code="draining")

    async def body(self, request: Request) -> bytes:
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


async def _whole(content: Awaitable[dict[str, Any]]) -> Response:
    """The reply to a request that does not stream. With a prompt's logprobs it may be many megabytes."""
    body = await asyncio.to_thread(msgspec.json.encode, await content)
    return Response(body, media_type="application/json")


async def _events(
    chunks: AsyncGenerator[dict[str, Any], None], *, typed: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed reply. The status is sent by now, so an error is an event, too. Streams of
    events with types know their own end; others need [DONE]."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield event(chunk)
    except Exception as error:  # whatever it is, the stream must end as a stream
        failure = errors.in_stream(error)
        yield event({**failure["error"], **failure, "type": "error"} if typed else failure)
    if not typed:
        yield DONE
