"""Several prompts in one request: each is answered as if it were alone, and one reply carries all."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.messages import FinishReason, Submit, TokenOutput
from server.limits import Limits
from server.several import interleaved
from server.tokenizer import Tokenizer
from tests.server.builders import PATIENCE, FakeEngine, cost, events, http_server, text_body, until

TEXT = "/v1/completions"
WORDS = ["the fox", "a cat says", "naïve 🦊"]


def echoing(tokenizer: Tokenizer) -> FakeEngine:
    """Answers every choice with the prompt's own tokens, one at a time."""

    def script(submit: Submit) -> list[TokenOutput]:
        last = submit.prompt_length - 1
        return [
            TokenOutput(
                submit.request_id,
                (token,),
                finish_reason=FinishReason.LENGTH if step == last else None,
                cost=cost() if (step, choice) == (0, 0) else None,
                choice=choice,
            )
            for step, token in enumerate(submit.tokens)
            for choice in range(submit.choices)
        ]

    return FakeEngine(script)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("as_ids", [False, True])
def test_each_prompt_has_its_choices_and_all_are_counted(
    folder: Path, tokenizer: Tokenizer, n: int, as_ids: bool
) -> None:
    ids = [tokenizer.encode(words, add_special_tokens=False) for words in WORDS]
    body = text_body(prompt=ids if as_ids else WORDS, n=n)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with http_server(engine := echoing(tokenizer), folder) as url:
        whole = httpx.post(url + TEXT, json=body, timeout=PATIENCE).json()
        chunks = events(httpx.post(url + TEXT, json=body | options, timeout=PATIENCE).text)
    expected = [words for words in WORDS for _ in range(n)]
    assert [choice["index"] for choice in whole["choices"]] == list(range(3 * n))
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert len(whole["farspan"]) == 3 and whole["farspan"][2]["plan"] == "sparse"
    prompt = sum(map(len, ids))
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, n * prompt)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3 * cost().cached_tokens}
    names = {submit.request_id for submit in engine.submitted}
    assert len(names) == 6, "each is a request of its own to the engine"

    assert chunks.pop()["usage"] == usage
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    streamed = {index: "" for index in range(3 * n)}
    ends = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends.append(choice["index"])
    assert list(streamed.values()) == expected and sorted(ends) == list(range(3 * n))


def test_an_echo_belongs_to_its_own_prompt(folder: Path, tokenizer: Tokenizer) -> None:
    body = text_body(prompt=WORDS, echo=True, max_tokens=0)
    with http_server(echoing(tokenizer), folder) as url:
        reply = httpx.post(url + TEXT, json=body, timeout=PATIENCE).json()
    assert [choice["text"] for choice in reply["choices"]] == WORDS


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_that_fails_ends_all_and_the_engine_hears_of_it(folder: Path, stream: bool) -> None:
    def script(submit: Submit) -> list[TokenOutput | Exception | None]:
        return [RuntimeError("broken")] if submit.request_id.endswith("-1") else [None]

    engine = FakeEngine(script)
    with http_server(engine, folder) as url:
        reply = httpx.post(url + TEXT, json=text_body(prompt=WORDS, stream=stream), timeout=PATIENCE)
        assert ("error" in events(reply.text)[-1]) if stream else reply.status_code == 500
        until(lambda: len(engine.aborted) == 2)


def test_a_client_that_leaves_aborts_all(folder: Path) -> None:
    engine = FakeEngine(lambda submit: [None])
    with http_server(engine, folder) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + TEXT, json=text_body(prompt=WORDS), timeout=0.5)
        until(lambda: len(engine.aborted) == 3)


def test_all_of_them_wait_and_each_stops_waiting_with_its_first_token(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    queue, answered = Limits.queue, Limits.answered

    def queued(self: Limits, visit: object, tokens: int, running: int) -> None:
        queue(self, visit, tokens, running)  # type: ignore[arg-type]
        counted.append(self.waiting_tokens)

    def begun(self: Limits, visit: object, tokens: int) -> None:
        answered(self, visit, tokens)  # type: ignore[arg-type]
        counted.append(self.waiting_tokens)

    monkeypatch.setattr(Limits, "queue", queued)
    monkeypatch.setattr(Limits, "answered", begun)
    with http_server(echoing(tokenizer), folder) as url:
        body = text_body(prompt=[[5] * 10, [6] * 20])
        assert httpx.post(url + TEXT, json=body, timeout=PATIENCE).status_code == 200
    assert counted[0] == 30 and counted[1] in (10, 20) and counted[2] == 0


def test_progress_says_of_which_prompt() -> None:
    async def stream() -> AsyncGenerator[dict[str, Any], None]:  # a reply's chunks, its prompt half computed
        yield {"choices": [], "farspan": {"progress": {"prompt_tokens_computed": 1, "prompt_tokens": 2}}}

    async def prompts() -> list[int]:
        chunks = interleaved([stream(), stream()], 1)
        return [chunk["farspan"]["progress"]["prompt"] async for chunk in chunks]

    assert sorted(asyncio.run(prompts())) == [0, 1]
