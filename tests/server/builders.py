"""A tiny tokenizer, a fake engine, and a real HTTP server around them."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.schema import ServerConfig
from engine.errors import EngineDead
from engine.messages import (
    CacheCleared,
    Cost,
    FinishReason,
    LayerRun,
    Loading,
    Logprobs,
    ModelCard,
    PlanCard,
    Stats,
    Submit,
    TokenOutput,
)
from server import serve
from server.app import build_app
from server.auth import Keys
from server.metrics import Metrics
from server.tokenizer import Tokenizer

MODEL = "tiny"
CONTEXT = 256
LAYERS = (LayerRun(0, 1, "dense", {}), LayerRun(2, 3, "minference", {"query_window": 64}))
PATIENCE = 30.0  # seconds until a test gives up
TEMPLATE = """{% for message in messages %}{% if message['role'] not in ('system', 'user', 'assistant') %}{{
raise_exception('no role ' + message['role']) }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A byte-level tokenizer of some 300 tokens, as HuggingFace's files."""
    tokens = tokenizers.Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def cost(**changes: Any) -> Cost:
    values: dict[str, Any] = dict(
        plan="sparse",
        prefill_read_fraction=0.25,
        attention_recall=0.97,
        attention_recall_p5=0.9,
        attention_recall_samples=48,
        kv_tokens_total=20,
        kv_tokens_kept=10.0,
        kv_bytes=4096,
        cached_tokens=4,
        queue_seconds=0.5,
        prefill_seconds=2.0,
    )
    return Cost(**values | changes)


Step = TokenOutput | Exception | None  # None: silence until the client leaves
Script = Callable[[Submit], Sequence[Step]]


def say(*tokens: int, reason: FinishReason = FinishReason.LENGTH) -> Script:
    """An engine that answers with these tokens, one per step."""

    def script(submit: Submit) -> Sequence[Step]:
        last = len(tokens) - 1
        return [
            TokenOutput(
                submit.request_id,
                (token,),
                finish_reason=reason if index == last else None,
                cost=cost() if index == 0 else None,
                logprobs=(likely(token, submit.sampling.logprobs),)
                if submit.sampling.logprobs is not None
                else (),
                prompt_logprobs=of_prompt(submit) if index == 0 else (),
            )
            for index, token in enumerate(tokens)
        ]

    return script


def likely(token: int, count: int) -> Logprobs:
    """Made-up logprobs of a token that is the second most likely: -token/1000 after the one before it."""
    top = ((token - 1, -0.001), (token, -token / 1000), *((other, -9.0) for other in range(40)))
    return Logprobs(-token / 1000, 2, top[:count])


def of_prompt(submit: Submit) -> tuple[Logprobs, ...]:
    count = submit.sampling.prompt_logprobs
    return () if count is None else tuple(likely(token, count) for token in submit.tokens[1:])


def then(script: Script, *more: Step) -> Script:
    """The steps of a script without its end, and then others."""

    def extended(submit: Submit) -> Sequence[Step]:
        steps = [
            msgspec.structs.replace(step, finish_reason=None)
            for step in script(submit)
            if isinstance(step, TokenOutput)
        ]
        return [*steps, *more]

    return extended


class FakeEngine:
    """Does what its script says; remembers what it was told."""

    def __init__(self, script: Script) -> None:
        self.script = script
        plans = tuple(
            PlanCard(name, f"{name}-digest", "dense", "snapkv", "full", 8, layers=LAYERS)
            for name in ("sparse", "dense")
        )
        self.card = ModelCard(MODEL, CONTEXT, 300, 8, plans, "cpu", "float32", num_pages=100, page_bytes=64)
        self.stats = Stats(
            running=2,
            waiting=1,
            pages_free=60,
            pages_cached=10,
            pages_borrowed=5,
            pages_private=25,
            kv_bytes=1920,
        )
        self.is_ready = True
        self.loading = Loading("weights", 0.25)
        self.death: str | None = None
        self.restarts, self.replays = 2, 5
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.abort_heard = threading.Event()
        self.ended_choices: list[int] = []

    async def end_choice(self, request_id: str, choice: int) -> None:
        self.ended_choices.append(choice)

    async def clear_cache(self) -> CacheCleared:
        if not self.is_ready:
            raise EngineDead("not ready")
        return CacheCleared(10, 3, self.stats)

    async def generate(self, submit: Submit) -> AsyncGenerator[TokenOutput, None]:
        if not self.is_ready:
            raise EngineDead("not ready")
        self.submitted.append(submit)
        ended = False
        try:
            for step in self.script(submit):
                if isinstance(step, Exception):
                    ended = True
                    raise step
                if step is None:
                    await asyncio.Event().wait()
                else:
                    ended = step.finish_reason is not None
                    yield step
        finally:
            if not ended:
                self.aborted.append(submit.request_id)
                self.abort_heard.set()


@contextmanager
def http_server(
    engine: FakeEngine, folder: Path, metrics: Metrics | None = None, **config: Any
) -> Iterator[str]:
    """A real server on a free port, in a thread of its own; its base URL."""
    settings = ServerConfig(**{"shutdown_timeout": 5.0, **config})
    keys = Keys.of(settings)
    app = build_app(engine, Tokenizer(folder), settings, metrics or Metrics(MODEL, engine), keys)
    listener = socket.create_server(("127.0.0.1", 0))
    server = serve.http_server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()
    assert app.limits.is_idle, "a request was never closed"


def routes(engine: FakeEngine, folder: Path) -> list[tuple[str, str]]:
    """Paths and methods of the application."""
    settings = ServerConfig()
    inner: Any = build_app(engine, Tokenizer(folder), settings, Metrics(MODEL, engine))._app
    return [(route.path, method) for route in inner.routes for method in sorted(route.methods - {"HEAD"})]


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition, and fail if it never comes."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def chat_body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "the fox"}]} | changes


def text_body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "the fox"} | changes


def events(text: str) -> list[Any]:
    """The JSON of a stream's events; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]", data[-1]
    return [json.loads(item) for item in data[:-1]]
