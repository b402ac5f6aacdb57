"""EngineClient while its engines die: what is replayed, what is given up, and what readers are told."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.loading import load_config
from engine import client as engine_client
from engine.client import EngineClient
from engine.errors import EngineDead, StepFailed
from engine.messages import Abort, FinishReason, Loading, Ready, Refused, Reports, Resolved, Submit
from tests.engine.fake_child import CARD, FakeChild, Served, with_client, with_fake_children
from tests.engine.readers import until
from tests.tiny import greedy


@with_client()
async def test_each_choice_goes_on_from_what_it_had(served: Served) -> None:
    heard, task = await served.ask("a", choices=3, reports=Reports(progress=True))
    for choice in range(3):
        served.engine.answer("a", 10 + choice, choice=choice, end=choice == 0)
    served.engine.answer("a", 20, choice=1)
    await until(lambda: len(heard.tokens[1]) == 2)
    second = await served.die()
    replayed = [(one.first_choice, one.choices, one.tokens) for one in second.submitted]
    assert replayed == [(1, 1, (1, 2, 3, 11, 20)), (2, 1, (1, 2, 3, 12))]
    assert {one.prompt_length for one in second.submitted} == {3}
    assert not any(one.reports.progress for one in second.submitted)
    second.answer("a", 21, choice=1, end=True)
    second.answer("a", 22, choice=2, end=True)
    assert dict((await task).tokens) == {0: [10], 1: [11, 20, 21], 2: [12, 22]}
    assert (served.client.restarts, served.client.replays) == (1, 1)


@with_client()
async def test_what_a_dead_engine_said_and_nobody_heard_is_not_heard_later(served: Served) -> None:
    first = served.engine
    _, task = await served.ask("a")
    second = await served.die()
    first.answer("a", 10)
    second.answer("a", 10, 11, end=True)
    assert (await task).tokens[0] == [10, 11]


@with_client()
async def test_a_choice_that_nobody_reads_is_not_replayed(served: Served) -> None:
    heard, task = await served.ask("a", choices=2)
    served.engine.answer("a", 10)
    served.engine.answer("a", 11, choice=1)
    await until(lambda: bool(heard.tokens[1]))
    await served.client.end_choice("a", 0)
    assert served.engine.told[-1] == Abort("a", 0)
    second = await served.die()  # before it could say that the choice has ended
    assert [one.first_choice for one in second.submitted] == [1]
    second.answer("a", 12, choice=1, end=True)
    assert (await task).reasons == {0: FinishReason.ABORT, 1: FinishReason.LENGTH}


@with_client()
async def test_a_reader_that_left_while_the_engine_was_away_is_not_replayed(served: Served) -> None:
    stream = served.client.generate(Submit("a", (1,), 1, "dense", greedy(9)))
    first = asyncio.ensure_future(anext(stream))
    await until(lambda: bool(served.engine.submitted))
    served.engine.answer("a", 10)
    await first
    second = await served.fall()
    await stream.aclose()
    second.say(Loading("weights", 0.0), Ready(CARD))
    await until(lambda: served.client.is_ready)
    assert second.told == []


@with_client()
async def test_a_request_that_the_engine_dies_of_twice_is_given_up(served: Served) -> None:
    _, task = await served.ask("poison")
    await served.die()
    _, living = await served.ask("other")
    third = await served.die()
    with pytest.raises(StepFailed, match="code -9 twice with this request"):
        await task
    assert [one.request_id for one in third.submitted] == ["other"]
    third.answer("other", 10, end=True)
    assert (await living).tokens[0] == [10]


@with_client()
async def test_of_several_only_the_one_that_the_engine_dies_of_is_given_up(served: Served) -> None:
    good, poison, better = [(await served.ask(name))[1] for name in ("good", "poison", "better")]
    await served.die()
    third = await served.die()
    assert [one.request_id for one in third.submitted] == ["good"], "one at a time"
    third.answer("good", 10)
    await until(lambda: len(third.submitted) == 2)
    assert third.submitted[1].request_id == "poison"
    fourth = await served.die()
    with pytest.raises(StepFailed):
        await poison
    await until(lambda: len(fourth.submitted) == 2)
    assert [one.request_id for one in fourth.submitted] == ["good", "better"]
    fourth.answer("good", 11, end=True)
    fourth.answer("better", 12, end=True)
    assert (await good).tokens[0] == [10, 11] and (await better).tokens[0] == [12]


@with_client()
async def test_an_engine_killed_while_loading_is_started_again(served: Served) -> None:
    _, task = await served.ask("a")
    second = await served.fall()
    second.say(Resolved(CARD), Loading("weights", 0.25))
    await until(lambda: served.client.loading.fraction == 0.25)
    assert served.client.loading.reason == "the engine process ended with code -9"
    third = await served.fall()
    third.say(Resolved(CARD), Ready(CARD))
    await until(lambda: bool(third.submitted))
    third.answer("a", 10, end=True)
    assert (await task).tokens[0] == [10], "a death without it is not its own"
    assert served.client.restarts == 2


@with_client()
async def test_an_engine_that_dies_as_soon_as_it_is_ready_is_not_ready(served: Served) -> None:
    await served.ask("a")
    second = await served.fall()
    second.die()
    second.say(Ready(CARD))
    await until(lambda: served.engine is not second)
    assert not served.client.is_ready
    served.engine.say(Ready(CARD))
    await until(lambda: served.client.is_ready)


@with_client(restarts=2)
async def test_too_many_deaths_end_every_request_and_say_why(served: Served) -> None:
    heard, task = await served.ask("a")
    for token in range(3):
        await until(lambda: len(served.children) > token and bool(served.engine.submitted))  # noqa: B023
        served.engine.answer("a", token)
        await until(lambda: token in heard.tokens[0])  # noqa: B023
        served.engine.die()
    words = "ended with code -9; it has died 3 times in 600 seconds"
    with pytest.raises(EngineDead, match=words):
        await task
    client = served.client
    assert not client.is_ready and client.death is not None and words in client.death
    with pytest.raises(EngineDead, match=words):
        await (await served.ask("late"))[1]
    assert len(served.children) == 3 and heard.tokens[0] == [0, 1, 2]


@with_client()
async def test_an_engine_that_refuses_to_start_again_is_left_alone(served: Served) -> None:
    _, task = await served.ask("a")
    second = await served.fall()
    second.say(Refused("plans: it is gone"))
    second.die(2)
    with pytest.raises(EngineDead, match="plans: it is gone"):
        await task
    assert len(served.children) == 2


@pytest.mark.parametrize(("said", "error"), [(Refused("no"), ConfigError), (None, EngineDead)])
def test_a_first_start_that_fails_is_not_repeated(
    said: Refused | None, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        client = EngineClient(load_config(None, {}))
        starting = asyncio.create_task(client.start())
        await until(lambda: bool(children))
        if said is not None:
            children[0].say(said)
        children[0].die(2)
        with pytest.raises(error):
            await starting
        await client.stop()
        assert len(children) == 1

    children = with_fake_children(monkeypatch)
    FakeChild.loads = False
    asyncio.run(body())


@with_client()
async def test_a_server_that_leaves_starts_no_other_engine(served: Served) -> None:
    await served.die()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_client, "BACKOFF_SECONDS", 1000.0)
        served.engine.die()
        await until(lambda: not served.client.is_ready)
        await served.client.stop()
    assert len(served.children) == 2


@with_client()
async def test_a_server_that_leaves_as_the_pause_ends_starts_no_other_engine(served: Served) -> None:
    client = served.client

    async def both_at_once(waiting: Coroutine[Any, Any, bool], seconds: float) -> None:
        waiting.close()
        client._leaving.set()
        raise TimeoutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_client.asyncio, "wait_for", both_at_once)
        served.engine.die()
        await until(lambda: client.death is not None or len(served.children) > 1)
    assert len(served.children) == 1
