"""EngineClient: starts the engine process, sends it requests, and gives each its stream of outputs, ended
exactly once."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from configs.errors import ConfigError
from configs.schema import ServeConfig
from engine.errors import EngineDead, PromptTooLong, StepFailed
from engine.messages import (
    Abort,
    FinishReason,
    ModelCard,
    Outputs,
    Ready,
    Refused,
    Resolved,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    TokenOutput,
    decode_from_engine,
    encode,
)

SHUTDOWN_SECONDS = 10.0  # then the engine process is killed


class Engine(Protocol):
    """What the server needs of an engine: this client, or a fake one in tests."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def death(self) -> str | None:
        """Why the engine will serve nothing any more, in words; None while it may."""

    def generate(self, submit: Submit) -> AsyncGenerator[TokenOutput]:
        """Outputs of one request, the last of each choice with a finish reason. Closing it early aborts the
        request.

        Raises PromptTooLong if the cache can never hold it, StepFailed if a step failed with it, EngineDead
        if the engine is not ready or ended meanwhile.
        """

    async def end_choice(self, request_id: str, choice: int) -> None:
        """Nobody reads this choice any more: it ends with ABORT, the others of its request go on."""


@dataclass(slots=True)
class _OpenRequest:
    """What the engine said of a request that its reader has not read, and how many choices go on."""

    choices: int
    outputs: asyncio.Queue[TokenOutput] = field(default_factory=asyncio.Queue)


class EngineClient:
    """Owns the engine process, the socket to it, and one queue per open request."""

    def __init__(
        self, config: ServeConfig, on_step: Callable[[Outputs], None] = lambda outputs: None
    ) -> None:
        self._config = config
        self._on_step = on_step
        self._open: dict[str, _OpenRequest] = {}
        self._card: ModelCard | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="farspan-"))  # mode 0700: no one else can connect
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the engine reads between steps: a long step must not block senders
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._resolved = _milestone()
        self._ready = _milestone()
        self.stats = Stats()
        self.death: str | None = None

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "the engine has not resolved its plans yet"
        return self._card

    @property
    def is_ready(self) -> bool:
        return self._ready.done() and self.death is None

    async def start(self) -> ModelCard:
        """Start the process and wait until plans and model are resolved, before weights load.

        Raises ConfigError if something configured is refused, EngineDead if the process ends.
        """
        address = f"ipc://{self._folder}/engine"
        self._socket.bind(address)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.process", address],
            stdin=subprocess.PIPE,
            env={
                "OMP_WAIT_POLICY": "passive",
                **os.environ,
            },  # idle threads must not take cores from the server
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._config.model_dump_json().encode())
        self._process.stdin.close()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
        return await asyncio.shield(self._resolved)

    async def wait_ready(self) -> ModelCard:
        """Wait until requests are served. Raises as `start` does: some refusals need the weights."""
        return await asyncio.shield(self._ready)

    async def generate(self, submit: Submit) -> AsyncGenerator[TokenOutput]:
        if not self.is_ready:
            raise EngineDead(self.death or "the engine is still loading the model")
        request = self._open[submit.request_id] = _OpenRequest(submit.choices)
        try:
            await self._send(submit)
            choices = submit.choices
            while choices:
                output = await request.outputs.get()
                if output.refused:
                    raise PromptTooLong(output.error or "the cache can never hold this request")
                if output.finish_reason is FinishReason.ERROR:
                    raise (EngineDead if self.death else StepFailed)(output.error or "the engine failed")
                yield output
                choices -= output.finish_reason is not None
        finally:
            # Still there: the caller left before the end, and the engine must hear of it.
            if self._open.pop(submit.request_id, None) is not None and self.death is None:
                with contextlib.suppress(EngineDead):
                    await self._send(Abort(submit.request_id))

    async def end_choice(self, request_id: str, choice: int) -> None:
        with contextlib.suppress(EngineDead):
            await self._send(Abort(request_id, choice))

    async def stop(self) -> None:
        """End the process and everything of this client."""
        if self._process is not None:
            if self.is_ready:
                with contextlib.suppress(EngineDead):
                    await self._send(Shutdown())
                await asyncio.wait([self._tasks[1]], timeout=SHUTDOWN_SECONDS)
            if self._process.poll() is None:  # loading weights, or deep in a step
                self._process.kill()
            await self._tasks[1]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _send(self, message: ToEngine) -> None:
        try:
            await self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again as error:  # no queue is ever full: there is no one at the other end
            raise EngineDead("the engine process has gone") from error

    async def _receive(self) -> None:
        while True:
            message = decode_from_engine(await self._socket.recv())
            match message:
                case Outputs():
                    self._deliver(message)
                case Resolved(card=card):
                    self._card = card
                    self._resolved.set_result(card)
                case Ready(card=card):
                    self._card = card
                    self._ready.set_result(card)
                case Refused(message=words):
                    self._give_up(ConfigError(words))

    def _deliver(self, message: Outputs) -> None:
        self.stats = message.stats
        self._on_step(message)
        for output in message.outputs:
            request = self._open.get(output.request_id)
            if request is None:
                continue  # its reader left; the abort is on its way
            request.outputs.put_nowait(output)
            request.choices -= output.finish_reason is not None
            if not request.choices:
                del self._open[output.request_id]

    async def _watch(self) -> None:
        """Wait for the process to end, however it ends, and end every open request."""
        assert self._process is not None
        code = await asyncio.to_thread(self._process.wait)
        # A refusal may still be on its way to the receiver; no request waits for an engine not ready.
        await asyncio.wait([self._ready], timeout=1.0)
        self.death = f"the engine process ended with code {code}"
        counts = self.stats  # of what was done; nothing runs, waits or is held any more
        self.stats = Stats(
            prompt_tokens=counts.prompt_tokens, generation_tokens=counts.generation_tokens, steps=counts.steps
        )
        self._give_up(EngineDead(self.death))
        for request_id, request in self._open.items():
            request.outputs.put_nowait(
                TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=self.death)
            )
        self._open.clear()

    def _give_up(self, error: ConfigError | EngineDead) -> None:
        for milestone in (self._resolved, self._ready):
            if not milestone.done():
                milestone.set_exception(error)


def _milestone() -> asyncio.Future[ModelCard]:
    """A future that nobody has to wait for."""
    future: asyncio.Future[ModelCard] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
