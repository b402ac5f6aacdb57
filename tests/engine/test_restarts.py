"""A request survives its engine: the process is killed, another goes on, no token is lost and none comes
twice."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from configs.schema import ServeConfig
from engine.client import EngineClient
from engine.errors import EngineDead
from engine.messages import Sampling, Submit
from tests.engine.readers import Heard, read, until
from tests.tiny import greedy, make_prompt, save_tiny

SECONDS = 120.0
GRID = "prefill: {method: minference, chunk: 128, last_q: 64, dense_below: 0}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, eos_token_id=0)
    (folder / "grid.yaml").write_text(GRID)
    (folder / "select.yaml").write_text("decode: {method: quest, read: 128}\n")
    return folder


def config(folder: Path, **flags: Any) -> ServeConfig:
    return load_config(
        None,
        {
            "engine.model": str(folder),
            "engine.threads": 1,
            "engine.dtype": "float32",
            "engine.max_model_len": 2048,
            "cache.kv_cache_memory_bytes": "64MiB",
            "scheduler.step_seconds": 60.0,  # prompts are not cut: all begin together on a slow machine, too
            "plans": ["dense", str(folder / "grid.yaml"), "snapkv", str(folder / "select.yaml")],
            **flags,
        },
    )


def submits(round: str) -> dict[str, Submit]:
    """Requests of every kind, long enough that none ends before the others have begun."""
    long, short = make_prompt(400, seed=1), make_prompt(90, seed=2)
    sampled = Sampling(max_tokens=120, temperature=1.0, top_p=0.95, seed=5, ignore_eos=True)
    punished = greedy(120, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2, prompt_logprobs=1)
    obeying = Sampling(max_tokens=120, temperature=1.0, seed=9, grammar="start: /[a-h]{100}/\n")
    asked = {
        "dense": (short, "dense", greedy(120), 1),
        "grid": (long, "grid", greedy(120), 1),
        "snapkv": (long, "snapkv", greedy(120), 1),
        "select": (long, "select", greedy(120), 1),
        "two": (long, "snapkv", sampled, 2),
        "sampled": (short, "dense", sampled, 1),
        "punished": (short, "dense", punished, 1),
        "obeying": (short, "dense", obeying, 1),
    }
    return {
        name: Submit(f"{name}-{round}", prompt, len(prompt), plan, sampling, choices=choices)
        for name, (prompt, plan, sampling, choices) in asked.items()
    }


def test_streams_go_on_as_if_their_engine_had_not_been_killed(folder: Path) -> None:
    async def body() -> None:
        client = EngineClient(config(folder))
        try:
            await client.start()
            await client.wait_ready()
            undisturbed = {name: await read(client, one, Heard()) for name, one in submits("alone").items()}
            heard = {name: Heard() for name in undisturbed}
            first = client.pid
            tasks = [
                asyncio.create_task(read(client, one, heard[name])) for name, one in submits("killed").items()
            ]
            await until(lambda: all(len(one.tokens[0]) > 8 for one in heard.values()))
            os.kill(first, signal.SIGKILL)
            await until(lambda: not client.is_ready)
            assert client.death is None and "code -9" in client.loading.words
            with pytest.raises(EngineDead, match="loading again"):
                await read(client, Submit("late", (1, 2), 2, "dense", greedy(1)), Heard())
            assert not any(one.reasons for one in heard.values()), "nothing was left to survive"
            await asyncio.gather(*tasks)
            assert client.pid != first and client.restarts == 1
            assert client.replays == len(heard)
            for name, one in heard.items():
                assert one.tokens == undisturbed[name].tokens, name
                assert one.reasons == undisturbed[name].reasons, name
                assert len(one.costs) == 1, name
                for new, old in zip(one.logprobs, undisturbed[name].logprobs, strict=True):
                    assert new.logprob == pytest.approx(old.logprob, abs=1e-3)
                assert len(one.prompt_logprobs) == len(undisturbed[name].prompt_logprobs)
            assert heard["two"].tokens[0] != heard["two"].tokens[1]
            assert len(heard["punished"].prompt_logprobs) == 89
            stats = client.stats
            assert (stats.running, stats.waiting) == (0, 0)
            assert stats.pages_free + stats.pages_cached == client.card.num_pages
        finally:
            await client.stop()

    asyncio.run(asyncio.wait_for(body(), SECONDS))
