"""Running a server: model, engine process, HTTP, in this order, and an end that leaves nothing behind."""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from configs.errors import ConfigError
from configs.logs import configure_logs
from configs.schema import EngineConfig, ServeConfig, ServerConfig
from engine.client import EngineClient
from engine.errors import EngineDead
from engine.messages import ModelCard
from server.app import build_app
from server.auth import Keys
from server.http import BoundedHeads
from server.loading_bar import show_loading
from server.metrics import Metrics
from server.record import RequestRecord, log_request
from server.tokenizer import Tokenizer
from server.tracing import Tracer, check_tracing

BACKLOG = 2048  # connections that wait to be accepted


class StartFailed(Exception):
    """The server never got ready. `code` is the exit code of the command."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def serve(config: ServeConfig) -> None:
    """Serve until a signal comes. Raises StartFailed, or ConfigError if the configuration is refused."""
    configure_logs(config.server.log_format, "server", requests=config.server.log_requests)
    listener = _bind(config)
    with contextlib.closing(listener), contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_serve(config, listener))


async def _serve(config: ServeConfig, listener: socket.socket) -> None:
    interruption = _Interruption()
    ending = contextlib.ExitStack()
    keys = Keys.of(config.server)
    check_tracing(config.server)
    folder = await _prepare_model(config.engine)
    tokenizer = _load_tokenizer(folder)
    client = EngineClient(config, on_step=lambda outputs: metrics.on_step(outputs))
    try:
        card = await client.start()
        name = config.server.served_model_name or card.name
        metrics = Metrics(name, client, config.server.metrics_prefix, _listeners(config.server, name, ending))
        server = http_server(build_app(client, tokenizer, config.server, metrics, keys), config.server)
        # Parsing a large body need not look at all that was loaded: 17 ms, not 61, for 100,000 lists.
        gc.freeze()
        interruption.stop_gracefully(server)
        announcing = asyncio.create_task(_announce(client, server, metrics.model_name, listener))
        await server.serve(sockets=[listener])
        if announcing.done():
            announcing.result()
        announcing.cancel()
    except EngineDead as error:  # before it was ever ready; later, the server says so and stays
        raise StartFailed(error.message, 1) from error
    finally:
        await client.stop()
        await asyncio.to_thread(ending.close)  # the last spans leave


def _listeners(
    config: ServerConfig, model_name: str, ending: contextlib.ExitStack
) -> list[Callable[[RequestRecord], None]]:
    """Who hears of every ended request; `ending` is when they must have passed it on."""
    listeners: list[Callable[[RequestRecord], None]] = [log_request] if config.log_requests else []
    if config.otlp_traces_endpoint is not None:
        tracer = Tracer(config.otlp_traces_endpoint, model_name)
        ending.callback(tracer.close)
        listeners.append(tracer.trace)
    return listeners


async def _announce(client: EngineClient, server: uvicorn.Server, name: str, listener: socket.socket) -> None:
    """Print the ready line when requests are served; stop the server if that never comes."""
    console = Console(stderr=True)
    showing = asyncio.create_task(show_loading(client, console)) if console.is_terminal else None
    try:
        await client.wait_ready()
    except (EngineDead, ConfigError):
        server.should_exit = True
        raise
    finally:
        if showing is not None:
            showing.cancel()
            await asyncio.wait([showing])
    print(_ready_line(name, client.card, listener, secure=server.config.is_ssl), flush=True)


def http_server(app: ASGIApp, config: ServerConfig) -> uvicorn.Server:
    """The server of an application; it runs until `should_exit` is set."""
    return _HttpServer(
        uvicorn.Config(
            app,
            http=BoundedHeads,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=max(1, round(config.shutdown_timeout)),
        )
    )


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would end this process before the engine's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Interruption:
    """SIGINT and SIGTERM: they cancel the start, or stop HTTP gracefully, or at once when repeated."""

    def __init__(self) -> None:
        self._main = asyncio.current_task()
        self._server: uvicorn.Server | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._interrupt)

    def stop_gracefully(self, server: uvicorn.Server) -> None:
        self._server = server

    def _interrupt(self) -> None:
        if self._server is None:
            assert self._main is not None
            self._main.cancel()
        else:
            self._server.force_exit = self._server.should_exit
            self._server.should_exit = True


def _bind(config: ServeConfig) -> socket.socket:
    """The address, taken before anything slow starts, not listened to yet: clients are refused, not kept."""
    host, port = config.server.host, config.server.port
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror or error}", 1) from error
    return listener


async def _prepare_model(config: EngineConfig) -> Path:
    """The folder of the model, downloaded or converted by another process: this one never imports torch."""
    revision = [] if config.revision is None else [config.revision]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "engine.models", config.model, *revision), stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise StartFailed("", process.returncode)  # it has said why
    return Path(output.decode().splitlines()[-1])


def _load_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer(folder)
    except Exception as error:  # tokenizers raises bare Exceptions for a file it cannot read
        raise StartFailed(f"the tokenizer of {folder.name} cannot be loaded: {error}", 2) from error


def _ready_line(model_name: str, card: ModelCard, listener: socket.socket, *, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    default, *others = (plan.name for plan in card.plans)
    words = f" (others: {', '.join(others)})" if others else ""
    scheme = "https" if secure else "http"
    cache = "" if card.cache_dtype == "auto" else f" cache={card.cache_dtype}"
    return (
        f"farspan ready: {scheme}://{host}:{port}/v1  model={model_name} plan={default}{words}"
        f" context={card.max_model_len} pages={card.num_pages}×{card.page_bytes}B"
        f" {card.dtype}/{card.device}{cache}"
    )
