"""EngineClient: keeps an engine process running, sends it requests, and gives each its stream of outputs,
ended exactly once. Requests survive their engine: another process goes on where the last one died."""

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Protocol

import zmq.asyncio

from configs.errors import ConfigError
from configs.schema import ServeConfig
from engine.child import Child
from engine.errors import EngineDead, PromptTooLong, StepFailed
from engine.messages import (
    Abort,
    CacheCleared,
    ClearCache,
    FinishReason,
    Loading,
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
)
from engine.open_request import OpenRequest
from engine.suspects import Suspects

SHUTDOWN_SECONDS = 10.0  # then the engine process is killed
BACKOFF_SECONDS = 1.0  # the pause before another process starts: 0 times this, then 1, 3, 7, ...
RESTART_WINDOW = 600.0  # seconds in which `server.engine_restarts` deaths are forgiven

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the server needs of an engine: this client, or a fake one in tests."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def loading(self) -> Loading:
        """How far the engine has come, while it is not ready."""

    @property
    def death(self) -> str | None:
        """Why the engine will serve nothing any more, in words; None while it may."""

    @property
    def restarts(self) -> int:
        """How often the engine process died and was started again."""

    @property
    def replays(self) -> int:
        """Requests that went on in another process."""

    def generate(self, submit: Submit) -> AsyncGenerator[TokenOutput]:
        """Outputs of one request, the last of each choice with a finish reason. Closing it early aborts the
        request.

        Raises PromptTooLong if the cache can never hold it, StepFailed if a step failed with it, EngineDead
        if the engine is not ready or will not be any more.
        """

    async def end_choice(self, request_id: str, choice: int) -> None:
        """Nobody reads this choice any more: it ends with ABORT, the others of its request go on."""

    async def clear_cache(self) -> CacheCleared:
        """Forget the beginnings of prompts that no live sequence counts on. Raises EngineDead."""


class EngineClient:
    """Owns the engine process and the open requests, each with a queue of what its reader has not read."""

    def __init__(
        self, config: ServeConfig, on_step: Callable[[Outputs], None] = lambda outputs: None
    ) -> None:
        self._config = config
        self._on_step = on_step
        self._open: dict[str, OpenRequest] = {}
        self._suspects = Suspects()
        self._clearing: deque[asyncio.Future[CacheCleared]] = deque()  # answered in the order they were asked
        self._card: ModelCard | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="farspan-"))  # mode 0700: no one else can connect
        self._context = zmq.asyncio.Context()
        self._child: Child | None = None
        self._life: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()
        self._deaths: list[float] = []  # time.monotonic() of each
        self._refusal: str | None = None  # what the engine refuses to serve, in words
        self._resolved = _milestone()
        self._ready = _milestone()
        self.is_ready = False
        self.loading = Loading("starting", 0.0)
        self.stats = Stats()
        self.death: str | None = None
        self.restarts = 0
        self.replays = 0

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "the engine has not resolved its plans yet"
        return self._card

    @property
    def pid(self) -> int:
        """Of the engine process."""
        assert self._child is not None, "the engine has not been started"
        return self._child.pid

    async def start(self) -> ModelCard:
        """Start the process and wait until plans and model are resolved, before weights load.

        Raises ConfigError if something configured is refused, EngineDead if the process ends.
        """
        self._life = asyncio.create_task(self._live())
        return await asyncio.shield(self._resolved)

    async def wait_ready(self) -> ModelCard:
        """Wait until requests are served. Raises as `start` does: some refusals need the weights."""
        return await asyncio.shield(self._ready)

    async def generate(self, submit: Submit) -> AsyncGenerator[TokenOutput]:
        if not self.is_ready:
            raise EngineDead(self.death or self.loading.words)
        request = self._open[submit.request_id] = OpenRequest(submit)
        try:
            with contextlib.suppress(EngineDead):  # it has just died: the next one will hear of this request
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
            if self._open.pop(submit.request_id, None) is not None:
                await self._tell(Abort(submit.request_id))
                await self._clear(submit.request_id)

    async def end_choice(self, request_id: str, choice: int) -> None:
        if request_id in self._open:
            self._open[request_id].unread.add(choice)
        await self._tell(Abort(request_id, choice))

    async def clear_cache(self) -> CacheCleared:
        if not self.is_ready:
            raise EngineDead(self.death or self.loading.words)
        cleared: asyncio.Future[CacheCleared] = asyncio.get_running_loop().create_future()
        self._clearing.append(cleared)
        with contextlib.suppress(EngineDead):  # it has just died: `_run_once` says so to all that wait
            await self._send(ClearCache())
        return await cleared

    async def stop(self) -> None:
        """End the process and everything of this client."""
        self._leaving.set()
        if self._life is not None:
            if self.is_ready:
                await self._tell(Shutdown())
                await asyncio.wait({self._life}, timeout=SHUTDOWN_SECONDS)
            if self._child is not None:
                self._child.kill()  # loading weights, or deep in a step
            await self._life
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _send(self, message: ToEngine) -> None:
        assert self._child is not None
        await self._child.send(message)

    async def _tell(self, message: ToEngine) -> None:
        """What matters only to a process that lives and knows the open requests."""
        if self.is_ready:
            with contextlib.suppress(EngineDead):
                await self._send(message)

    async def _live(self) -> None:
        """Run one process after the other, until there shall be no other."""
        while (words := await self._run_once()) is None:
            self.restarts += 1
        self.death = words
        error = EngineDead(words) if self._refusal is None else ConfigError(self._refusal)
        for milestone in (self._resolved, self._ready):
            if not milestone.done():
                milestone.set_exception(error)
        for request in self._open.values():
            request.fail(words)
        self._open.clear()

    async def _run_once(self) -> str | None:
        """One process, to its end and the pause behind it: None if another shall follow, else why not."""
        try:
            self._child = Child(self._config, self._context, f"ipc://{self._folder}/engine{self.restarts}")
        except OSError as error:
            return f"the engine process cannot be started: {error.strerror}"
        hearing = asyncio.create_task(self._hear(self._child))
        code = await self._child.ended()
        words = f"the engine process ended with code {code}"
        has_served, self.is_ready = self.is_ready, False
        self.loading = Loading("starting again", 0.0, words)
        if not has_served:  # a refusal may still be on its way
            await asyncio.wait({hearing}, timeout=1.0)
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        has_served, self.is_ready = has_served or self.is_ready, False  # its last word may have been Ready
        self._child.close()
        self.stats = self.stats.at_rest()
        while self._clearing:
            _settle(self._clearing.popleft(), EngineDead(words))
        if self._refusal is not None:
            return f"{words}: {self._refusal}"
        return await self._after_death(words, has_served=has_served)

    async def _after_death(self, words: str, *, has_served: bool) -> str | None:
        """As `_run_once`, once nothing more is heard of the process."""
        if self._leaving.is_set() or not self._ready.done():
            return words
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < RESTART_WINDOW] + [now]
        count, most = len(self._deaths), self._config.server.engine_restarts
        if count > most:
            return (
                words if count == 1 else f"{words}; it has died {count} times in {RESTART_WINDOW:.0f} seconds"
            )
        culprit = self._suspects.after_death(self._open) if has_served else None
        if culprit is not None and culprit in self._open:
            self._open.pop(culprit).fail(f"{words} twice with this request, which is given up")
        log.warning("%s; it is started again, with %d open requests", words, len(self._open))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), BACKOFF_SECONDS * (2 ** (count - 1) - 1))
        # `stop` may have come as the pause ended: it waits for this life, which must not begin anew.
        return words if self._leaving.is_set() else None

    async def _hear(self, child: Child) -> None:
        """Everything that a process says, until it refuses to go on. One that cannot be understood ends."""
        try:
            while self._refusal is None:
                match await child.hear():
                    case Outputs() as message:
                        await self._deliver(message)
                    case CacheCleared() as message:
                        self.stats = message.stats
                        _settle(self._clearing.popleft(), message)
                    case Loading(phase=phase, fraction=fraction):
                        self.loading = Loading(phase, fraction, self.loading.reason)
                    case Resolved(card=card):
                        if not self._resolved.done():
                            self._card = card
                            self._resolved.set_result(card)
                    case Ready(card=card):
                        self._card = card
                        await self._take_up()
                    case Refused(message=words):
                        self._refusal = words
        except Exception:
            log.exception("what the engine process said could not be heard")
            child.kill()

    async def _take_up(self) -> None:
        """A process is ready: it hears of the requests that the last one left open."""
        self.is_ready = True  # first: whoever leaves from here on must be heard
        if not self._ready.done():
            self._ready.set_result(self.card)
        with contextlib.suppress(EngineDead):  # the next one will hear of the rest
            for request_id in list(self._open):
                if not self._suspects.holds(request_id):
                    await self._replay(request_id)
            await self._try_next()

    async def _replay(self, request_id: str) -> None:
        request = self._open.get(request_id)
        if request is None:  # its reader left meanwhile
            return
        self.replays += 1
        for submit in request.replay():
            await self._send(submit)
        if not request.goes_on:
            del self._open[request_id]

    async def _try_next(self) -> None:
        while (request_id := self._suspects.next_trial()) is not None:
            if request_id in self._open:
                await self._replay(request_id)
            else:
                self._suspects.clear(request_id)

    async def _clear(self, request_id: str) -> None:
        self._suspects.clear(request_id)
        if self.is_ready:
            with contextlib.suppress(EngineDead):
                await self._try_next()

    async def _deliver(self, message: Outputs) -> None:
        self.stats = message.stats
        self._on_step(message)
        for output in message.outputs:
            request = self._open.get(output.request_id)
            if request is None:
                continue  # its reader left; the abort is on its way
            request.take(output)
            if not request.goes_on:
                del self._open[output.request_id]
            if output.tokens or output.finish_reason is not None:
                await self._clear(output.request_id)


def _settle(waiting: asyncio.Future[CacheCleared], found: CacheCleared | EngineDead) -> None:
    """Tell who waits, if anybody still does."""
    if waiting.done():
        return
    if isinstance(found, EngineDead):
        waiting.set_exception(found)
    else:
        waiting.set_result(found)


def _milestone() -> asyncio.Future[ModelCard]:
    """A future that nobody has to wait for."""
    future: asyncio.Future[ModelCard] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
