"""Several answers to one prompt: each is whole, by its index, and ends on its own."""

from pathlib import Path

import httpx
import pytest

from engine.messages import FinishReason, Submit, TokenOutput
from server.tokenizer import Tokenizer
from tests.server.builders import (
    PATIENCE,
    FakeEngine,
    Script,
    chat_body,
    cost,
    events,
    http_server,
    text_body,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def interleaved(tokenizer: Tokenizer, *texts: str) -> Script:
    """An engine that answers with these texts at once, a token of each in turn; shorter ones end first."""
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def script(submit: Submit) -> list[TokenOutput]:
        assert submit.choices == len(texts)
        return [
            TokenOutput(
                submit.request_id,
                (tokens[step],),
                finish_reason=FinishReason.LENGTH if step == len(tokens) - 1 else None,
                cost=cost() if (step, choice) == (0, 0) else None,
                choice=choice,
            )
            for step in range(max(map(len, answers)))
            for choice, tokens in enumerate(answers)
            if step < len(tokens)
        ]

    return script


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_choices_are_whole_streamed_or_not(folder: Path, tokenizer: Tokenizer, path: str) -> None:
    texts = ["the fox says things", "naïve 🦊", "the"]
    body = (chat_body if path == CHAT else text_body)(n=3)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with http_server(FakeEngine(interleaved(tokenizer, *texts)), folder) as url:
        whole = httpx.post(url + path, json=body, timeout=PATIENCE).json()
        chunks = events(httpx.post(url + path, json=body | options, timeout=PATIENCE).text)
    found = whole["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2]
    assert [c["message"]["content"] if path == CHAT else c["text"] for c in found] == texts
    assert {choice["finish_reason"] for choice in found} == {"length"}
    assert whole["farspan"]["plan"] == "sparse"
    usage = chunks.pop()["usage"]
    assert usage == whole["usage"]
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert usage["completion_tokens"] == tokens
    streamed = {index: "" for index in range(3)}
    ended: list[int] = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["index"] not in ended
        streamed[choice["index"]] += (
            choice["delta"].get("content") if path == CHAT else choice["text"]
        ) or ""
        if choice["finish_reason"] is not None:
            ended.append(choice["index"])
            assert chunk["farspan"] == whole["farspan"]
    assert list(streamed.values()) == texts and sorted(ended) == [0, 1, 2]


def test_a_stop_string_ends_one_choice_and_the_engine_hears_of_it(folder: Path, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(interleaved(tokenizer, "the fox says no", "a cat says nothing", "the bird"))
    with http_server(engine, folder) as url:
        reply = httpx.post(url + TEXT, json=text_body(n=3, stop=["fox"]), timeout=PATIENCE).json()
    assert [choice["text"] for choice in reply["choices"]] == ["the ", "a cat says nothing", "the bird"]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop", "length", "length"]
    assert engine.ended_choices == [0]


def test_the_last_choice_that_a_stop_string_ends_ends_the_request(folder: Path, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(interleaved(tokenizer, "a", "the fox says no more"))
    with http_server(engine, folder) as url:
        reply = httpx.post(url + TEXT, json=text_body(n=2, stop=["fox"]), timeout=PATIENCE).json()
    assert [choice["text"] for choice in reply["choices"]] == ["a", "the "]
    assert engine.ended_choices == [] and engine.abort_heard.wait(PATIENCE)
