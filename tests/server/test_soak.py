"""Clients that leave, again and again: tasks, descriptors, pages and memory are where they were.

A hundred by default; `FARSPAN_SOAK=1000 make test ARGS=tests/server/test_soak.py` for more.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.schema import ServerConfig
from server import serve
from server.app import build_app
from server.metrics import Metrics
from server.tokenizer import Tokenizer
from tests.server.builders import MODEL, PATIENCE, FakeEngine, chat_body, save_tokenizer, say, then
from tests.server.test_serve import CHAT, started
from tests.tiny import save_tiny

STREAMS = int(os.environ.get("FARSPAN_SOAK", "100"))
WARM_UP = 30  # what the first requests allocate stays
AT_ONCE = 8
GROWTH = 24 * 2**20  # bytes of a process: allocators keep some


async def leave(client: httpx.AsyncClient, number: int, body: dict[str, Any]) -> None:
    """Ask, and go: with the headers, with the first event, or before there is a reply."""
    where = number % 3
    body = body | {"stream": where != 2}
    try:
        async with client.stream("POST", CHAT, json=body, timeout=0.05 if where == 2 else PATIENCE) as reply:
            assert reply.status_code == 200
            if where == 1:
                await anext(reply.aiter_bytes())
    except httpx.TimeoutException:
        assert where == 2


async def leave_often(url: str, count: int, body: dict[str, Any]) -> None:
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE) as client:
        for first in range(0, count, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, count))
            await asyncio.gather(*(leave(client, number, body) for number in numbers))


async def settled(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.02)


def test_no_task_and_no_descriptor_stays(folder: Path) -> None:
    async def body() -> None:
        engine = FakeEngine(then(say(5), None))  # silent until the client leaves
        config = ServerConfig(shutdown_timeout=5.0, sse_keep_alive_interval=0.01)
        app = build_app(engine, Tokenizer(folder), config, Metrics(MODEL, engine))
        server = serve.http_server(app, config)
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def held() -> tuple[int, int]:
            return len(asyncio.all_tasks()), psutil.Process().num_fds()

        async def idle() -> bool:
            return app.limits.is_idle and not server.server_state.connections

        try:
            await leave_often(url, WARM_UP, chat_body())
            await settled(idle)
            before = held()

            async def as_before() -> bool:
                return await idle() and held() <= before

            await leave_often(url, STREAMS, chat_body())
            await settled(as_before)
            assert len(engine.submitted) == len(engine.aborted)
            assert len(engine.submitted) > STREAMS / 2  # others left before they were heard of
        finally:
            server.should_exit = True
            await serving
            listener.close()

    asyncio.run(body())


def test_no_page_and_no_memory_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, vocab_size=300, max_position_embeddings=512)
    save_tokenizer(folder)
    body = chat_body(messages=[{"role": "user", "content": "the quick brown fox " * 20}], ignore_eos=True)

    async def leave_and_look(url: str, count: int) -> None:
        await leave_often(url, count, body)
        async with httpx.AsyncClient(base_url=url) as client:

            async def idle() -> bool:
                stats = (await client.get("/stats")).json()
                free = stats["pages_free"] + stats["pages_cached"]
                return (stats["running"], stats["waiting"], free) == (0, 0, stats["num_pages"])

            await settled(idle)

    with started(folder, tmp_path_factory.mktemp("here")) as server:
        processes = [psutil.Process(server.process.pid), server.engine()]
        asyncio.run(leave_and_look(server.url, WARM_UP))
        before = [(one.num_fds(), one.num_threads(), one.memory_info().rss) for one in processes]
        asyncio.run(leave_and_look(server.url, STREAMS))
        after = [(one.num_fds(), one.num_threads(), one.memory_info().rss) for one in processes]
        print(f"{STREAMS} streams: descriptors, threads and bytes were {before} and are {after}")
        for (fds, threads, memory), (fds_now, threads_now, memory_now) in zip(before, after, strict=True):
            assert fds_now <= fds + 2 and threads_now <= threads + 2  # sockets about to close; worker threads
            assert memory_now < memory + GROWTH
