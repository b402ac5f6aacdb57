"""Clearing the prefix cache: what nobody reads is forgotten, what is read stays, who asked hears of it."""

import asyncio
from typing import Any

import pytest
import torch

from configs.loading import load_config
from engine import client as engine_client
from engine.client import EngineClient
from engine.errors import EngineDead
from engine.messages import CacheCleared, ClearCache, ModelCard, Ready, Resolved, Stats
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

SECONDS = 30.0
ROWS = 2 * 2  # pages of a column


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_model(num_hidden_layers=2)


def document(question: int) -> list[int]:
    return [*make_prompt(450, seed=1), *make_prompt(70, seed=100 + question)]


def test_a_cleared_cache_is_empty_and_changes_no_answer(network: torch.nn.Module) -> None:
    tiny = tiny_engine(plan("dense"), network=network, share_prefixes=True)
    first = tiny.answer(document(1))
    cached = tiny.cache.usage().cached
    assert cached >= 7 * ROWS
    cleared = tiny.engine.clear_cache()
    assert (cleared.pages, cleared.host_pages, cleared.stats.pages_cached) == (cached, 0, 0)
    assert cleared.stats.pages_free == tiny.cache.pool.num_pages
    tiny.assert_empty()
    hits = cleared.stats.prefix_hits
    assert tiny.answer(document(1)) == first
    assert tiny.engine.stats().prefix_hits == hits, "something was still known"
    assert tiny.engine.clear_cache().pages == cached, "what came later is not kept any more"


def test_what_a_live_sequence_reads_stays(network: torch.nn.Module) -> None:
    tiny = tiny_engine(plan("dense"), network=network, share_prefixes=True)
    expected = [tiny.answer(document(n), greedy(12)) for n in (1, 2)]
    tiny.engine.clear_cache()
    tiny.answer(make_prompt(300, seed=9))  # nobody reads this
    tiny.submit("alive", document(1), greedy(12))
    answer = [token for _ in range(4) for output in tiny.step() for token in output.tokens]
    held = tiny.cache.bytes_of(0)
    cleared = tiny.engine.clear_cache()
    assert cleared.pages == 4 * ROWS
    tiny.cache.check()
    assert tiny.cache.bytes_of(0) == held and cleared.stats.pages_cached == 0
    tiny.submit("beside", document(2), greedy(12))
    found = tiny.run()
    assert [answer + found["alive"], found["beside"]] == expected
    assert tiny.engine.stats().prefix_hits >= 448, "the columns of a live sequence were forgotten"
    tiny.assert_empty()


def test_columns_on_the_host_are_forgotten_too(network: torch.nn.Module) -> None:
    tiny = tiny_engine(
        plan("dense"), network=network, share_prefixes=True, num_pages=50, host_pages=60, host_columns=10
    )
    for seed in range(3):  # more than the pool has room for
        tiny.answer(make_prompt(500, seed=seed))
    before = tiny.engine.stats()
    assert before.pages_host > 0
    cleared = tiny.engine.clear_cache()
    assert (cleared.host_pages, cleared.stats.pages_host) == (before.pages_host, 0)
    tiny.assert_empty()
    assert tiny.answer(make_prompt(500, seed=0)) and tiny.engine.stats().host_hits == before.host_hits


class SilentChild:
    """A process that is ready, and says nothing by itself."""

    pid = 1
    newest: "SilentChild"

    def __init__(self, *arguments: Any) -> None:
        self.told: list[Any] = []
        self.says: asyncio.Queue[Any] = asyncio.Queue()
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        card = ModelCard("tiny", 256, 300, 8, (), "cpu", "float32")
        for message in (Resolved(card), Ready(card)):
            self.says.put_nowait(message)
        type(self).newest = self

    async def send(self, message: Any) -> None:
        self.told.append(message)

    async def hear(self) -> Any:
        return await self.says.get()

    async def ended(self) -> int:
        return await self.code

    def kill(self) -> None:
        if not self.code.done():
            self.code.set_result(-9)

    def close(self) -> None: ...


def test_who_asks_hears_of_it_even_if_the_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "Child", SilentChild)
    monkeypatch.setattr(engine_client, "SHUTDOWN_SECONDS", 0.01)

    async def body() -> None:
        client = EngineClient(load_config(None, {"server.engine_restarts": 0}))
        try:
            await client.start()
            await client.wait_ready()
            child = SilentChild.newest
            asked = [asyncio.create_task(client.clear_cache()) for _ in range(3)]
            while len(child.told) < 3:
                await asyncio.sleep(0)
            assert child.told == [ClearCache()] * 3
            asked[0].cancel()  # its client left: the answer to it is nobody else's
            await asyncio.wait(asked[:1])
            for pages in (5, 7):
                child.says.put_nowait(CacheCleared(pages, 0, Stats(pages_free=pages)))
            assert (await asked[1]).pages == 7 and client.stats.pages_free == 7
            child.kill()
            with pytest.raises(EngineDead, match="code -9"):
                await asked[2]
            with pytest.raises(EngineDead):
                await client.clear_cache()
        finally:
            await client.stop()

    asyncio.run(asyncio.wait_for(body(), SECONDS))
