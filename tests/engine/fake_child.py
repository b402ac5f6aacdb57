"""A client whose engine processes do what a test says."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from configs.loading import load_config
from configs.schema import ServeConfig
from engine import client as engine_client
from engine.client import EngineClient
from engine.errors import EngineDead
from engine.messages import (
    FinishReason,
    FromEngine,
    ModelCard,
    Outputs,
    Ready,
    Resolved,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    TokenOutput,
)
from tests.engine.readers import Heard, read, until
from tests.tiny import greedy

SECONDS = 120.0
CARD = ModelCard("tiny", 1024, 256, 8, (), "cpu", "float32", num_pages=10)


class FakeChild:
    """A process that says what a test makes it say, and remembers what it was told."""

    born: list["FakeChild"]
    loads = True  # by itself, at once
    pid = 1

    def __init__(self, config: ServeConfig, context: Any, address: str) -> None:
        self.told: list[ToEngine] = []
        self._said: asyncio.Queue[FromEngine] = asyncio.Queue()
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.born.append(self)
        if self.loads:
            self.say(Resolved(CARD), Ready(CARD))

    async def send(self, message: ToEngine) -> None:
        if self._code.done():
            raise EngineDead("gone")
        self.told.append(message)
        if isinstance(message, Shutdown):
            self.die(0)

    def say(self, *messages: FromEngine) -> None:
        for message in messages:
            self._said.put_nowait(message)

    def answer(self, request_id: str, *tokens: int, choice: int = 0, end: bool = False) -> None:
        reason = FinishReason.LENGTH if end else None
        self.say(Outputs((TokenOutput(request_id, tokens, reason, choice=choice),), Stats()))

    def die(self, code: int = -9) -> None:
        if not self._code.done():
            self._code.set_result(code)

    async def hear(self) -> FromEngine:
        return await self._said.get()

    async def ended(self) -> int:
        return await self._code

    def kill(self) -> None:
        self.die()

    def close(self) -> None: ...

    @property
    def submitted(self) -> list[Submit]:
        return [message for message in self.told if isinstance(message, Submit)]


@dataclass
class Served:
    """A client, and every engine process that it had."""

    client: EngineClient
    children: list[FakeChild]  # oldest first

    @property
    def engine(self) -> FakeChild:
        return self.children[-1]

    async def ask(self, name: str, choices: int = 1, **options: Any) -> tuple[Heard, "asyncio.Task[Heard]"]:
        """What the reader of a new request hears, from when the engine knows of the request."""
        heard, known = Heard(), len(self.engine.submitted)
        submit = Submit(name, (1, 2, 3), 3, "dense", greedy(9), choices=choices, **options)
        task = asyncio.create_task(read(self.client, submit, heard))
        await until(lambda: len(self.engine.submitted) > known or task.done())
        return heard, task

    async def die(self) -> FakeChild:
        """The next engine, once it serves."""
        count = len(self.children)
        self.engine.die()
        await until(lambda: len(self.children) > count and self.client.is_ready)
        return self.engine

    async def fall(self) -> FakeChild:
        """The next engine, which has not loaded and will not by itself."""
        count, FakeChild.loads = len(self.children), False
        self.engine.die()
        await until(lambda: len(self.children) > count)
        return self.engine


Body = Callable[[Served], Awaitable[None]]
Test = Callable[[pytest.MonkeyPatch], None]


def with_client(restarts: int = 3) -> Callable[[Body], Test]:
    """A test in a loop of its own, with a client whose first engine serves."""

    def as_test(body: Body) -> Test:
        async def run() -> None:
            client = EngineClient(load_config(None, {"server.engine_restarts": restarts}))
            try:
                async with asyncio.timeout(SECONDS):
                    await client.start()
                    await client.wait_ready()
                    await body(Served(client, FakeChild.born))
            finally:
                await client.stop()

        def test(monkeypatch: pytest.MonkeyPatch) -> None:
            with_fake_children(monkeypatch)
            asyncio.run(run())

        return test

    return as_test


def with_fake_children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    """From now on clients start these, at once after one died."""
    FakeChild.born, FakeChild.loads = [], True
    monkeypatch.setattr(engine_client, "Child", FakeChild)
    monkeypatch.setattr(engine_client, "BACKOFF_SECONDS", 0.001)
    return FakeChild.born
