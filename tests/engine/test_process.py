"""The engine in its own process, reached through the client: real sockets, a real tiny model, real deaths."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.loading import load_config
from configs.schema import ServeConfig
from engine.client import EngineClient
from engine.errors import EngineDead
from engine.messages import FinishReason, Sampling, Submit
from tests.engine.readers import until
from tests.tiny import greedy, make_prompt, save_tiny

SECONDS = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def config(folder: Path, **flags: Any) -> ServeConfig:
    return load_config(
        None,
        {
            "engine.model": str(folder),
            "engine.threads": 1,
            "engine.max_model_len": 1024,
            "cache.kv_cache_memory_bytes": "64MiB",
            "plans": ["dense", "snapkv"],
            **flags,
        },
    )


@asynccontextmanager
async def running(config: ServeConfig) -> AsyncIterator[EngineClient]:
    client = EngineClient(config)
    try:
        await client.start()
        await client.wait_ready()
        yield client
    finally:
        await client.stop()


@dataclass
class Shared:
    """One running engine and the event loop its client lives on: a start costs seconds."""

    runner: asyncio.Runner
    client: EngineClient

    def run(self, body: Coroutine[Any, Any, None]) -> None:
        self.runner.run(asyncio.wait_for(body, SECONDS))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Shared]:
    with asyncio.Runner() as runner:
        context = running(config(folder))
        yield Shared(runner, runner.run(context.__aenter__()))
        runner.run(context.__aexit__(None, None, None))


async def tokens_of(
    client: EngineClient, name: str, sampling: Sampling, length: int = 50, plan: str = "dense"
) -> list[int]:
    prompt = make_prompt(length, seed=length)
    found: list[int] = []
    async for output in client.generate(Submit(name, prompt, length, plan, sampling)):
        found += output.tokens
    return found


def test_requests_are_answered_together_and_every_page_comes_back(shared: Shared) -> None:
    async def body() -> None:
        client = shared.client
        assert client.card.max_model_len == 1024
        assert [plan.name for plan in client.card.plans] == ["dense", "snapkv"]
        lengths = (10, 100, 700)
        alone = [await tokens_of(client, f"a{n}", greedy(12), n) for n in lengths]
        together = await asyncio.gather(*(tokens_of(client, f"b{n}", greedy(12), n) for n in lengths))
        assert together == alone
        assert client.stats.pages_free + client.stats.pages_cached == client.card.num_pages
        assert client.stats.running == client.stats.waiting == 0

    shared.run(body())


def test_a_reader_that_leaves_frees_its_pages(shared: Shared) -> None:
    async def body() -> None:
        client = shared.client
        stream = client.generate(Submit("left", make_prompt(300), 300, "dense", greedy(700)))
        await anext(stream)
        assert client.stats.running == 1
        await stream.aclose()
        await until(lambda: client.stats.running == 0)
        assert client.stats.pages_free + client.stats.pages_cached == client.card.num_pages

    shared.run(body())


def test_a_killed_engine_ends_every_request_with_a_clear_error(folder: Path) -> None:
    async def body() -> None:
        async with running(config(folder, **{"server.engine_restarts": 0})) as client:
            endless = [asyncio.create_task(tokens_of(client, f"{n}", greedy(900), 50)) for n in range(3)]
            await until(lambda: client.stats.running == 3)
            os.kill(client.pid, signal.SIGKILL)
            for task in endless:
                with pytest.raises(EngineDead, match="ended with code -9"):
                    await task
            assert not client.is_ready
            with pytest.raises(EngineDead):
                await tokens_of(client, "late", greedy(1))

    asyncio.run(asyncio.wait_for(body(), SECONDS))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"engine.max_model_len": 100_000}, "8192 tokens"),  # before weights load
        ({"cache.kv_cache_memory_bytes": "64KiB"}, "would"),  # after
    ],
)
def test_what_cannot_be_served_is_refused_in_words(folder: Path, flags: dict[str, Any], words: str) -> None:
    async def body() -> None:
        with pytest.raises(ConfigError, match=words):
            async with running(config(folder, **flags)):
                pass

    asyncio.run(asyncio.wait_for(body(), SECONDS))


def test_an_engine_whose_parent_dies_leaves(folder: Path) -> None:
    """A server killed outright leaves no engine behind: the engine notices that it is an orphan."""
    script = (
        "import asyncio, sys\n"
        "from configs.schema import ServeConfig\n"
        "from engine.client import EngineClient\n"
        "async def main():\n"
        "    client = EngineClient(ServeConfig.model_validate_json(sys.argv[1]))\n"
        "    await client.start(); await client.wait_ready()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, config(folder).model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + SECONDS
    while is_alive(engine):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_reader_that_leaves_does_not_disturb_the_others(shared: Shared) -> None:
    async def body() -> None:
        client = shared.client
        alone = await tokens_of(client, "alone", greedy(200))
        stream = client.generate(Submit("left", make_prompt(300), 300, "snapkv", greedy(700)))
        other = asyncio.create_task(tokens_of(client, "stays", greedy(200)))
        first = await anext(stream)
        assert first.finish_reason is None and first.cost is not None
        await stream.aclose()
        assert await other == alone

    shared.run(body())


def test_seeded_sampling_repeats_itself_whatever_else_runs(shared: Shared) -> None:
    async def body() -> None:
        client = shared.client
        sampling = Sampling(max_tokens=30, temperature=1.0, top_p=0.95, top_k=50, seed=11, ignore_eos=True)
        alone = await tokens_of(client, "alone", sampling)
        crowd = [
            tokens_of(client, f"{n}", Sampling(max_tokens=40, seed=n, ignore_eos=True)) for n in range(5)
        ]
        repeated, *_ = await asyncio.gather(tokens_of(client, "again", sampling), *crowd)
        assert repeated == alone
        assert FinishReason.STOP not in alone

    shared.run(body())
