"""A request survives its engine: the process is killed, another goes on, no token is lost and none comes
twice."""

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from configs.errors import ConfigError
from configs.loading import load_config
from configs.schema import ServeConfig
from engine import client as engine_client
from engine.child import Child
from engine.client import EngineClient
from engine.errors import EngineDead, StepFailed
from engine.messages import (
    Abort,
    Cost,
    FinishReason,
    FromEngine,
    Loading,
    ModelCard,
    Outputs,
    Ready,
    Refused,
    Reports,
    Resolved,
    Sampling,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    TokenOutput,
)
from tests.tiny import greedy, make_prompt, save_tiny

SECONDS = 120.0
GRID = "prefill: {method: minference, chunk: 128, last_q: 64, dense_below: 0}\n"
CARD = ModelCard("tiny", 1024, 256, 8, (), "cpu", "float32", num_pages=10)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@dataclass
class Heard:
    """What the reader of one request was told."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by choice
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    reasons: dict[int, FinishReason] = field(default_factory=dict)

    def take(self, output: TokenOutput) -> None:
        assert output.choice not in self.reasons, "it ended twice"
        self.tokens[output.choice] += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.costs += [output.cost] if output.cost is not None else []
        if output.finish_reason is not None:
            self.reasons[output.choice] = output.finish_reason


async def read(client: EngineClient, submit: Submit, heard: Heard) -> Heard:
    async for output in client.generate(submit):
        heard.take(output)
    return heard


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


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeChild]]:
    FakeChild.born, FakeChild.loads = [], True
    monkeypatch.setattr(engine_client, "Child", FakeChild)
    monkeypatch.setattr(engine_client, "BACKOFF_SECONDS", 0.001)
    yield FakeChild.born


@asynccontextmanager
async def client_of(restarts: int = 3) -> AsyncIterator[EngineClient]:
    client = EngineClient(load_config(None, {"server.engine_restarts": restarts}))
    try:
        async with asyncio.timeout(SECONDS):
            await client.start()
            await client.wait_ready()
            yield client
    finally:
        await client.stop()


def ask(
    client: EngineClient, name: str, choices: int = 1, **options: Any
) -> tuple[Heard, "asyncio.Task[Heard]"]:
    heard = Heard()
    submit = Submit(name, (1, 2, 3), 3, "dense", greedy(9), choices=choices, **options)
    return heard, asyncio.create_task(read(client, submit, heard))


async def reborn(client: EngineClient, children: list[FakeChild]) -> FakeChild:
    """The next child, once it serves."""
    count = len(children)
    await until(lambda: len(children) > count and client.is_ready)
    return children[-1]


async def die(client: EngineClient, children: list[FakeChild]) -> FakeChild:
    children[-1].die()
    return await reborn(client, children)


def test_each_choice_goes_on_from_what_it_had(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "a", choices=3, reports=Reports(progress=True))
            await until(lambda: bool(children[0].submitted))
            for choice in range(3):
                children[0].answer("a", 10 + choice, choice=choice, end=choice == 0)
            children[0].answer("a", 20, choice=1)
            await until(lambda: len(heard.tokens[1]) == 2)
            second = await die(client, children)
            replayed = [(one.first_choice, one.choices, one.tokens) for one in second.submitted]
            assert replayed == [(1, 1, (1, 2, 3, 11, 20)), (2, 1, (1, 2, 3, 12))]
            assert {one.prompt_length for one in second.submitted} == {3}
            assert not any(one.reports.progress for one in second.submitted)
            second.answer("a", 21, choice=1, end=True)
            second.answer("a", 22, choice=2, end=True)
            assert dict((await task).tokens) == {0: [10], 1: [11, 20, 21], 2: [12, 22]}
            assert (client.restarts, client.replays) == (1, 1)

    asyncio.run(body())


def test_what_a_dead_engine_said_and_nobody_heard_is_not_heard_later(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "a")
            await until(lambda: bool(children[0].submitted))
            second = await die(client, children)
            children[0].answer("a", 10)
            second.answer("a", 10, 11, end=True)
            assert (await task).tokens[0] == [10, 11]

    asyncio.run(body())


def test_a_choice_that_nobody_reads_is_not_replayed(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "a", choices=2)
            await until(lambda: bool(children[0].submitted))
            children[0].answer("a", 10)
            children[0].answer("a", 11, choice=1)
            await until(lambda: bool(heard.tokens[1]))
            await client.end_choice("a", 0)
            assert children[0].told[-1] == Abort("a", 0)
            second = await die(client, children)  # before it could say that the choice has ended
            assert [one.first_choice for one in second.submitted] == [1]
            second.answer("a", 12, choice=1, end=True)
            assert (await task).reasons == {0: FinishReason.ABORT, 1: FinishReason.LENGTH}

    asyncio.run(body())


def test_a_reader_that_left_while_the_engine_was_away_is_not_replayed(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            stream = client.generate(Submit("a", (1,), 1, "dense", greedy(9)))
            first = asyncio.ensure_future(anext(stream))
            await until(lambda: bool(children[0].submitted))
            children[0].answer("a", 10)
            await first
            FakeChild.loads = False
            children[0].die()
            await until(lambda: len(children) == 2)
            await stream.aclose()
            children[1].say(Loading("weights", 0.0), Ready(CARD))
            await until(lambda: client.is_ready)
            assert children[1].told == []

    asyncio.run(body())


def test_a_request_that_the_engine_dies_of_twice_is_given_up(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "poison")
            await until(lambda: bool(children[0].submitted))
            second = await die(client, children)
            other, living = ask(client, "other")
            await until(lambda: len(second.submitted) == 2)
            third = await die(client, children)
            with pytest.raises(StepFailed, match="code -9 twice with this request"):
                await task
            assert [one.request_id for one in third.submitted] == ["other"]
            third.answer("other", 10, end=True)
            assert (await living).tokens[0] == [10]

    asyncio.run(body())


def test_of_several_only_the_one_that_the_engine_dies_of_is_given_up(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            tasks = [ask(client, name)[1] for name in ("good", "poison", "better")]
            await until(lambda: len(children[0].submitted) == 3)
            await die(client, children)
            third = await die(client, children)
            assert [one.request_id for one in third.submitted] == ["good"], "one at a time"
            third.answer("good", 10)
            await until(lambda: len(third.submitted) == 2)
            assert third.submitted[1].request_id == "poison"
            fourth = await die(client, children)
            with pytest.raises(StepFailed):
                await tasks[1]
            await until(lambda: len(fourth.submitted) == 2)
            assert [one.request_id for one in fourth.submitted] == ["good", "better"]
            fourth.answer("good", 11, end=True)
            fourth.answer("better", 12, end=True)
            assert (await tasks[0]).tokens[0] == [10, 11] and (await tasks[2]).tokens[0] == [12]

    asyncio.run(body())


def test_an_engine_killed_while_loading_is_started_again(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "a")
            await until(lambda: bool(children[0].submitted))
            FakeChild.loads = False
            children[0].die()
            await until(lambda: len(children) == 2)
            children[1].say(Resolved(CARD), Loading("weights", 0.25))
            await until(lambda: client.loading.fraction == 0.25)
            assert client.loading.reason == "the engine process ended with code -9"
            children[1].die()
            await until(lambda: len(children) == 3)
            children[2].say(Resolved(CARD), Ready(CARD))
            await until(lambda: bool(children[2].submitted))
            children[2].answer("a", 10, end=True)
            assert (await task).tokens[0] == [10], "a death without it is not its own"
            assert client.restarts == 2

    asyncio.run(body())


def test_an_engine_that_dies_as_soon_as_it_is_ready_is_not_ready(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "a")
            await until(lambda: bool(children[0].submitted))
            FakeChild.loads = False
            children[0].die()
            await until(lambda: len(children) == 2)
            children[1].die()
            children[1].say(Ready(CARD))
            await until(lambda: len(children) == 3)
            assert not client.is_ready
            children[2].say(Ready(CARD))
            await until(lambda: client.is_ready)

    asyncio.run(body())


def test_too_many_deaths_end_every_request_and_say_why(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of(restarts=2) as client:
            heard, task = ask(client, "a")
            for token in range(3):
                await until(lambda: len(children) > token and bool(children[token].submitted))  # noqa: B023
                children[token].answer("a", token)
                await until(lambda: token in heard.tokens[0])  # noqa: B023
                children[token].die()
            words = "ended with code -9; it has died 3 times in 600 seconds"
            with pytest.raises(EngineDead, match=words):
                await task
            assert not client.is_ready and client.death is not None and words in client.death
            with pytest.raises(EngineDead, match=words):
                await ask(client, "late")[1]
            assert len(children) == 3 and heard.tokens[0] == [0, 1, 2]

    asyncio.run(body())


def test_an_engine_that_refuses_to_start_again_is_left_alone(children: list[FakeChild]) -> None:
    async def body() -> None:
        async with client_of() as client:
            heard, task = ask(client, "a")
            await until(lambda: bool(children[0].submitted))
            FakeChild.loads = False
            children[0].die()
            await until(lambda: len(children) == 2)
            children[1].say(Refused("plans: it is gone"))
            children[1].die(2)
            with pytest.raises(EngineDead, match="plans: it is gone"):
                await task
            assert len(children) == 2

    asyncio.run(body())


def test_a_first_start_that_fails_is_not_repeated(children: list[FakeChild]) -> None:
    async def body(said: Refused | None, error: type[Exception]) -> None:
        FakeChild.loads = False
        client = EngineClient(load_config(None, {}))
        starting = asyncio.create_task(client.start())
        count = len(children)
        await until(lambda: len(children) > count)
        if said is not None:
            children[-1].say(said)
        children[-1].die(2)
        with pytest.raises(error):
            await starting
        await client.stop()
        assert len(children) == count + 1

    asyncio.run(body(Refused("no"), ConfigError))
    asyncio.run(body(None, EngineDead))


def test_a_server_that_leaves_starts_no_other_engine(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        monkeypatch.setattr(engine_client, "BACKOFF_SECONDS", 1000.0)
        async with client_of() as client:
            await die(client, children)
            children[-1].die()
            await until(lambda: not client.is_ready)
        assert len(children) == 2

    asyncio.run(body())


def test_threads_spin_and_sleep_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[dict[str, str]] = []

    def refuse(*given: Any, env: dict[str, str], **options: Any) -> None:
        seen.append(env)
        raise OSError("seen enough")

    async def start() -> None:
        with zmq.asyncio.Context() as context, pytest.raises(OSError, match="seen enough"):
            Child(load_config(None, {}), context, f"ipc://{tmp_path}/engine")

    monkeypatch.setattr("engine.child.subprocess.Popen", refuse)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    asyncio.run(start())
    assert seen[0]["GOMP_SPINCOUNT"] == "10000" and seen[0]["OMP_WAIT_POLICY"] == "active"
