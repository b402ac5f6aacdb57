"""What clients look up: models, plans, the version, and text as token ids and back."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.tokenizer import Tokenizer
from server.version import farspan_version
from tests.server.builders import (
    CONTEXT,
    MODEL,
    PATIENCE,
    TEMPLATE,
    FakeEngine,
    chat_body,
    http_server,
    say,
)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(say(5))


@pytest.fixture(scope="module")
def client(engine: FakeEngine, folder: Path) -> Iterator[httpx.Client]:
    with (
        http_server(engine, folder, max_body_bytes=100_000) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


def test_a_model_is_found_by_its_name_only(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"][0]
    assert client.get(f"/v1/models/{MODEL}").json() == listed
    for name in ("other", "org/other", f"{MODEL}/"):
        missing = client.get(f"/v1/models/{name}")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_plans_say_what_each_layer_does(client: httpx.Client) -> None:
    plans = client.get("/v1/plans").json()
    assert plans["object"] == "list"
    assert [(plan["id"], plan["object"]) for plan in plans["data"]] == [("sparse", "plan"), ("dense", "plan")]
    sparse = plans["data"][0]
    assert sparse["layers"] == [
        {"first": 0, "last": 1, "prefill": "dense", "options": {}},
        {"first": 2, "last": 3, "prefill": "minference", "options": {"query_window": 64}},
    ]
    assert sparse["digest"] == "sparse-digest" and sparse["budget"] == 8


def test_the_version_is_told(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": farspan_version()}


def test_a_text_becomes_token_ids_and_text_again(client: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "the 🦊 <|im_end|> says"
    reply = client.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    tokens = tokenizer.encode(text, add_special_tokens=True)
    assert (reply["tokens"], reply["count"]) == (tokens, len(tokens))
    assert reply["max_model_len"] == CONTEXT
    assert len(reply["token_strs"]) == len(tokens) and "<|im_end|>" in reply["token_strs"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_tokens_are_spelled_out_beside_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spelled(self: Tokenizer, token: int) -> str:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return "spelled"

    monkeypatch.setattr(Tokenizer, "token_string", spelled)
    reply = client.post("/tokenize", json={"prompt": "f", "return_token_strs": True})
    assert reply.json()["token_strs"] == ["spelled"]


def test_a_chat_becomes_the_token_ids_that_the_model_would_get(
    client: httpx.Client, engine: FakeEngine
) -> None:
    messages = chat_body()["messages"]
    client.post("/v1/chat/completions", json=chat_body())
    reply = client.post("/tokenize", json={"messages": messages}).json()
    assert reply["tokens"] == list(engine.submitted[-1].tokens)
    shorter = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert shorter["tokens"] == reply["tokens"][: shorter["count"]] and shorter["count"] < reply["count"]


def test_the_tokenizer_is_described(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["bos_token"] == "<|endoftext|>"
    assert info["chat_template"] == TEMPLATE and info["model_max_length"] == CONTEXT


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"prompt": "a", "messages": chat_body()["messages"]}, 400, None),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "colour": 1}, 400, "colour"),
        ("/tokenize", {"messages": [{"role": "x", "content": "a"}]}, 400, "messages.0.role"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    client: httpx.Client, path: str, body: dict[str, object], status: int, param: str | None
) -> None:
    refused = client.post(path, json=body)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["param"] == param
    headers = {"content-type": "application/json"}
    assert client.post(path, content=b" " * 200_000, headers=headers).status_code == 413
