"""Bad input is answered in the envelope before the engine hears of it, and the next request is served."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.protocol import CHAT_NOTHING, TEXT_NOTHING
from tests.server.builders import (
    CONTEXT,
    MODEL,
    PATIENCE,
    FakeEngine,
    chat_body,
    events,
    http_server,
    say,
    text_body,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LIMIT = 100_000  # bytes of a body


@dataclass(frozen=True)
class Running:
    engine: FakeEngine
    client: httpx.Client


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    engine = FakeEngine(say(5, 6))
    with (
        http_server(engine, folder, max_body_bytes=LIMIT) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield Running(engine, client)


@pytest.fixture(autouse=True)
def nothing_heard(running: Running) -> None:
    running.engine.submitted.clear()


def refused(
    running: Running, response: httpx.Response, status: int, code: str, param: str | None = None
) -> str:
    """Check the reply, that the engine heard nothing, and that the next request is served; the message."""
    assert running.engine.submitted == [], "the engine heard of a bad request"
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert len(response.content) < 2000
    after = running.client.post(CHAT, json=chat_body())
    assert after.status_code == 200, after.text
    assert len(running.engine.submitted) == 1
    running.engine.submitted.clear()
    message: str = error["message"]
    return message


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def past_call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


# name of the case: (path, changes to a good body, status, code, param)
FIELDS: dict[str, tuple[str, dict[str, Any], int, str, str | None]] = {
    "unknown model": (CHAT, {"model": "gpt-9"}, 404, "model_not_found", "model"),
    "model of the wrong type": (CHAT, {"model": 5}, 400, "invalid_type", "model"),
    "no model": (CHAT, {"model": None}, 400, "missing_required_parameter", "model"),
    "unknown plan": (CHAT, {"plan": "fast"}, 404, "plan_not_found", "plan"),
    "no messages": (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    "messages missing": (CHAT, {"messages": None}, 400, "missing_required_parameter", "messages"),
    "messages as text": (CHAT, {"messages": "hi"}, 400, "invalid_type", "messages"),
    "a message as text": (CHAT, {"messages": ["hi"]}, 400, "invalid_type", "messages.0"),
    "too many messages": (CHAT, {"messages": [{}] * 5000}, 400, "invalid_value", "messages"),
    "unknown role": (
        CHAT,
        {"messages": [{"role": "x", "content": ""}]},
        400,
        "invalid_value",
        "messages.0.role",
    ),
    "a tool's result without its call": (
        CHAT,
        {"messages": [{"role": "tool", "content": ""}]},
        400,
        "invalid_value",
        "messages.0",
    ),
    "a user's result": (
        CHAT,
        {"messages": [{"role": "user", "content": "", "tool_call_id": "1"}]},
        400,
        "invalid_value",
        "messages.0",
    ),
    "a user's calls": (
        CHAT,
        {"messages": [{"role": "user", "content": "", "tool_calls": [past_call("{}")]}]},
        400,
        "invalid_value",
        "messages.0",
    ),
    "arguments that are no JSON": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [past_call("{")]}]},
        400,
        "invalid_value",
        "messages.0.tool_calls.0.function.arguments",
    ),
    "no content": (
        CHAT,
        {"messages": [{"role": "user"}]},
        400,
        "missing_required_parameter",
        "messages.0.content",
    ),
    "null content": (
        CHAT,
        {"messages": [{"role": "user", "content": None}]},
        400,
        "invalid_value",
        "messages.0.content",
    ),
    "an image": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
            ]
        },
        400,
        "invalid_value",
        "messages.0.content.0.type",
    ),
    "tool calls of before": (
        CHAT,
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        400,
        "missing_required_parameter",
        "messages.0.tool_calls.0.function",
    ),
    "unknown key in a message": (
        CHAT,
        {"messages": [{"role": "user", "content": "", "mood": "good"}]},
        400,
        "unsupported_parameter",
        "messages.0.mood",
    ),
    "empty text prompt": (TEXT, {"prompt": ""}, 400, "invalid_value", "prompt"),
    "empty list prompt": (TEXT, {"prompt": []}, 400, "invalid_value", "prompt"),
    "empty list in a list": (TEXT, {"prompt": [[]]}, 400, "invalid_value", "prompt"),
    "several prompts": (TEXT, {"prompt": ["a", "b"]}, 400, "invalid_value", "prompt"),
    "prompt missing": (TEXT, {"prompt": None}, 400, "missing_required_parameter", "prompt"),
    "prompt as number": (TEXT, {"prompt": 5}, 400, "invalid_value", "prompt"),
    "prompt of booleans": (TEXT, {"prompt": [True]}, 400, "invalid_value", "prompt"),
    "prompt of text and ids": (TEXT, {"prompt": [1, "a"]}, 400, "invalid_value", "prompt"),
    "token id below": (TEXT, {"prompt": [-1]}, 400, "invalid_value", "prompt"),
    "token id at the vocabulary": (TEXT, {"prompt": [300]}, 400, "invalid_value", "prompt"),
    "token id of 2**31": (TEXT, {"prompt": [2**31]}, 400, "invalid_value", "prompt"),
    "token id of 2**63": (TEXT, {"prompt": [2**63]}, 400, "invalid_value", "prompt"),
    "token id of 2**200": (TEXT, {"prompt": [2**200]}, 400, "invalid_value", "prompt"),
    "stop token below": (CHAT, {"stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids.0"),
    "stop token at the vocabulary": (CHAT, {"stop_token_ids": [300]}, 400, "invalid_value", "stop_token_ids"),
    "stop token of 2**63": (CHAT, {"stop_token_ids": [2**63]}, 400, "invalid_value", "stop_token_ids"),
    "too many stop tokens": (CHAT, {"stop_token_ids": [1] * 1000}, 400, "invalid_value", "stop_token_ids"),
    "too long a prompt of text": (
        TEXT,
        {"prompt": "the quick " * CONTEXT},
        400,
        "context_length_exceeded",
        "prompt",
    ),
    "too long a prompt of ids": (TEXT, {"prompt": [5] * CONTEXT}, 400, "context_length_exceeded", "prompt"),
    "a prompt too long to tokenise": (
        TEXT,
        {"prompt": "x" * 90_000},
        400,
        "context_length_exceeded",
        "prompt",
    ),
    "too long an answer": (CHAT, {"max_tokens": CONTEXT}, 400, "context_length_exceeded", "messages"),
    "an answer of 2**62": (CHAT, {"max_tokens": 2**62}, 400, "context_length_exceeded", "messages"),
    "max_tokens 0": (CHAT, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    "max_tokens negative": (TEXT, {"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    "max_tokens as text": (TEXT, {"max_tokens": "5"}, 400, "invalid_type", "max_tokens"),
    "max_tokens true": (TEXT, {"max_tokens": True}, 400, "invalid_type", "max_tokens"),
    "max_tokens 1.5": (TEXT, {"max_tokens": 1.5}, 400, "invalid_type", "max_tokens"),
    "max_tokens 2**64": (TEXT, {"max_tokens": 2**64}, 400, "invalid_value", "max_tokens"),
    "max_completion_tokens 0": (
        CHAT,
        {"max_completion_tokens": 0},
        400,
        "invalid_value",
        "max_completion_tokens",
    ),
    "two different limits": (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, 400, "invalid_value", None),
    "temperature below": (CHAT, {"temperature": -0.1}, 400, "invalid_value", "temperature"),
    "temperature above": (CHAT, {"temperature": 2.1}, 400, "invalid_value", "temperature"),
    "temperature true": (CHAT, {"temperature": True}, 400, "invalid_type", "temperature"),
    "temperature as text": (CHAT, {"temperature": "hot"}, 400, "invalid_type", "temperature"),
    "top_p 0": (CHAT, {"top_p": 0}, 400, "invalid_value", "top_p"),
    "top_p above": (CHAT, {"top_p": 1.01}, 400, "invalid_value", "top_p"),
    "top_k -2": (CHAT, {"top_k": -2}, 400, "invalid_value", "top_k"),
    "seed 2**63": (CHAT, {"seed": 2**63}, 400, "invalid_value", "seed"),
    "seed 1.5": (CHAT, {"seed": 1.5}, 400, "invalid_type", "seed"),
    "five stop strings": (CHAT, {"stop": list("abcde")}, 400, "invalid_value", "stop"),
    "an empty stop string": (CHAT, {"stop": [""]}, 400, "invalid_value", "stop.0"),
    "500 stop strings": (CHAT, {"stop": ["a"] * 500}, 400, "invalid_value", "stop"),
    "a long stop string": (CHAT, {"stop": "a" * 5000}, 400, "invalid_value", "stop.0"),
    "stop as number": (CHAT, {"stop": 5}, 400, "invalid_type", "stop"),
    "stream as text": (CHAT, {"stream": "yes"}, 400, "invalid_type", "stream"),
    "stream_options without stream": (
        CHAT,
        {"stream_options": {"include_usage": True}},
        400,
        "invalid_value",
        None,
    ),
    "unknown stream option": (
        CHAT,
        {"stream": True, "stream_options": {"include_joy": True}},
        400,
        "unsupported_parameter",
        "stream_options.include_joy",
    ),
    "a billion choices": (CHAT, {"n": 10**9}, 400, "invalid_value", "n"),
    "no choice": (CHAT, {"n": 0}, 400, "invalid_value", "n"),
    "more choices than run at once": (CHAT, {"n": 9}, 400, "invalid_value", "n"),
    "the prompt's log-probabilities of two choices": (
        TEXT,
        {"n": 2, "prompt_logprobs": 1},
        400,
        "invalid_value",
        "n",
    ),
    "n true": (CHAT, {"n": True}, 400, "invalid_type", "n"),
    "logprobs as a number in a chat": (CHAT, {"logprobs": 5}, 400, "invalid_type", "logprobs"),
    "top_logprobs alone": (CHAT, {"top_logprobs": 5}, 400, "invalid_value", None),
    "top_logprobs -1": (CHAT, {"logprobs": True, "top_logprobs": -1}, 400, "invalid_value", "top_logprobs"),
    "top_logprobs 21": (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    "logprobs true in a completion": (TEXT, {"logprobs": True}, 400, "invalid_type", "logprobs"),
    "logprobs 21": (TEXT, {"logprobs": 21}, 400, "invalid_value", "logprobs"),
    "logprobs -1": (TEXT, {"logprobs": -1}, 400, "invalid_value", "logprobs"),
    "prompt_logprobs -1": (TEXT, {"prompt_logprobs": -1}, 400, "invalid_value", "prompt_logprobs"),
    "prompt_logprobs of a vocabulary": (
        TEXT,
        {"prompt_logprobs": 299},
        400,
        "invalid_value",
        "prompt_logprobs",
    ),
    "prompt_logprobs in a stream": (
        TEXT,
        {"prompt_logprobs": 1, "stream": True},
        400,
        "invalid_value",
        None,
    ),
    "min_p above": (CHAT, {"min_p": 1.1}, 400, "invalid_value", "min_p"),
    "min_p below": (CHAT, {"min_p": -0.1}, 400, "invalid_value", "min_p"),
    "repetition_penalty 0": (CHAT, {"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
    "repetition_penalty -1": (CHAT, {"repetition_penalty": -1}, 400, "invalid_value", "repetition_penalty"),
    "presence_penalty above": (CHAT, {"presence_penalty": 2.1}, 400, "invalid_value", "presence_penalty"),
    "frequency_penalty below": (CHAT, {"frequency_penalty": -3}, 400, "invalid_value", "frequency_penalty"),
    "frequency_penalty as text": (CHAT, {"frequency_penalty": "1"}, 400, "invalid_type", "frequency_penalty"),
    "a bias below the vocabulary": (CHAT, {"logit_bias": {"-1": 1}}, 400, "invalid_value", "logit_bias"),
    "a bias at the vocabulary": (CHAT, {"logit_bias": {"300": 1}}, 400, "invalid_value", "logit_bias"),
    "a bias of 2**31": (CHAT, {"logit_bias": {str(2**31): 1}}, 400, "invalid_value", "logit_bias"),
    "a bias of 2**200": (CHAT, {"logit_bias": {str(2**200): 1}}, 400, "invalid_value", "logit_bias"),
    "a bias by name": (CHAT, {"logit_bias": {"fox": 1}}, 400, "invalid_value", "logit_bias"),
    "a bias in other digits": (CHAT, {"logit_bias": {"\u0665": 1}}, 400, "invalid_value", "logit_bias"),
    "too large a bias": (CHAT, {"logit_bias": {"5": 101}}, 400, "invalid_value", "logit_bias.5"),
    "a bias as text": (CHAT, {"logit_bias": {"5": "1"}}, 400, "invalid_type", "logit_bias.5"),
    "too many biases": (
        CHAT,
        {"logit_bias": {str(n): 1 for n in range(1025)}},
        400,
        "invalid_value",
        "logit_bias",
    ),
    "biases as a list": (CHAT, {"logit_bias": [[5, 1]]}, 400, "invalid_type", "logit_bias"),
    "min_tokens -1": (CHAT, {"min_tokens": -1}, 400, "invalid_value", "min_tokens"),
    "min_tokens above the limit": (CHAT, {"min_tokens": 9, "max_tokens": 8}, 400, "invalid_value", None),
    "min_tokens above the context": (CHAT, {"min_tokens": 2**40}, 400, "invalid_value", "min_tokens"),
    "truncation to nothing": (
        TEXT,
        {"truncate_prompt_tokens": 0},
        400,
        "invalid_value",
        "truncate_prompt_tokens",
    ),
    "truncation to -2": (
        TEXT,
        {"truncate_prompt_tokens": -2},
        400,
        "invalid_value",
        "truncate_prompt_tokens",
    ),
    "timeout 0": (CHAT, {"timeout": 0}, 400, "invalid_value", "timeout"),
    "timeout of a year": (CHAT, {"timeout": 3e7}, 400, "invalid_value", "timeout"),
    "an empty salt": (CHAT, {"cache_salt": ""}, 400, "invalid_value", "cache_salt"),
    "a long salt": (CHAT, {"cache_salt": "x" * 1025}, 400, "invalid_value", "cache_salt"),
    "a salt of numbers": (CHAT, {"cache_salt": 5}, 400, "invalid_type", "cache_salt"),
    "a priority of 2**31": (CHAT, {"priority": 2**31}, 400, "invalid_value", "priority"),
    "a priority of 0.5": (CHAT, {"priority": 0.5}, 400, "invalid_type", "priority"),
    "a priority in words": (CHAT, {"priority": "high"}, 400, "invalid_type", "priority"),
    "an echo of a chat": (CHAT, {"echo": True}, 400, "unsupported_parameter", "echo"),
    "no answer and no echo": (TEXT, {"max_tokens": 0}, 400, "invalid_value", None),
    "a tool without a function": (
        CHAT,
        {"tools": [{"type": "function"}]},
        400,
        "missing_required_parameter",
        "tools.0.function",
    ),
    "a tool of another type": (
        CHAT,
        {"tools": [{"type": "web_search"}]},
        400,
        "invalid_value",
        "tools.0.type",
    ),
    "a tool with an odd name": (
        CHAT,
        {"tools": [tool("a b")]},
        400,
        "invalid_value",
        "tools.0.function.name",
    ),
    "too many tools": (CHAT, {"tools": [tool(f"f{n}") for n in range(129)]}, 400, "invalid_value", "tools"),
    "two tools of one name": (CHAT, {"tools": [tool("f"), tool("f")]}, 400, "invalid_value", "tools"),
    "tools of a template without": (CHAT, {"tools": [tool("f")]}, 400, "invalid_value", "tools"),
    "a forced tool of none": (CHAT, {"tool_choice": "required"}, 400, "invalid_value", None),
    "an unknown tool": (
        CHAT,
        {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "invalid_value",
        None,
    ),
    "an odd choice of tools": (CHAT, {"tool_choice": "any"}, 400, "invalid_value", "tool_choice"),
    "tools and a format": (
        CHAT,
        {"tools": [tool("f")], "response_format": {"type": "json_object"}},
        400,
        "invalid_value",
        None,
    ),
    "an unknown format": (
        CHAT,
        {"response_format": {"type": "xml"}},
        400,
        "invalid_value",
        "response_format.type",
    ),
    "a schema without a schema": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        400,
        "missing_required_parameter",
        "response_format.json_schema.schema",
    ),
    "a format without its schema": (
        CHAT,
        {"response_format": {"type": "json_schema"}},
        400,
        "invalid_value",
        "response_format",
    ),
    "a schema of an unknown type": (
        CHAT,
        schema_of({"type": "wrong"}),
        400,
        "invalid_value",
        "response_format",
    ),
    "a schema from elsewhere": (
        CHAT,
        schema_of({"$ref": "http://127.0.0.1:9/schema.json"}),
        400,
        "invalid_value",
        "response_format",
    ),
    "a schema of itself": (CHAT, schema_of({"$ref": "#"}), 400, "invalid_value", "response_format"),
    "a broken regex": (
        CHAT,
        {"structured_outputs": {"regex": "(a"}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    "a broken grammar": (
        TEXT,
        {"structured_outputs": {"grammar": "root ::= ("}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    "a grammar of nothing": (
        TEXT,
        {"structured_outputs": {"grammar": "start: nowhere"}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    "two structures": (
        TEXT,
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    "no structure": (TEXT, {"structured_outputs": {}}, 400, "invalid_value", "structured_outputs"),
    "a schema that is no JSON": (
        TEXT,
        {"structured_outputs": {"json": "{"}},
        400,
        "invalid_value",
        "structured_outputs.json",
    ),
    "too many choices to take": (
        TEXT,
        {"structured_outputs": {"choice": ["a"] * 2000}},
        400,
        "invalid_value",
        "structured_outputs.choice",
    ),
    "a structure that must not end": (
        TEXT,
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        400,
        "invalid_value",
        None,
    ),
    "vLLM's older name": (TEXT, {"guided_json": {}}, 400, "unsupported_parameter", "guided_json"),
    "suffix": (TEXT, {"suffix": "end"}, 400, "unsupported_parameter", "suffix"),
    "best_of": (TEXT, {"best_of": 2}, 400, "unsupported_parameter", "best_of"),
    "reserved template keys": (
        CHAT,
        {"chat_template_kwargs": {"tokenize": True}},
        400,
        "invalid_value",
        "chat_template_kwargs",
    ),
    "a template's special token": (
        CHAT,
        {"chat_template_kwargs": {"eos_token": "x"}},
        400,
        "invalid_value",
        "chat_template_kwargs",
    ),
    "many template keys": (
        CHAT,
        {"chat_template_kwargs": {f"k{n}": n for n in range(100)}},
        400,
        "invalid_value",
        "chat_template_kwargs",
    ),
    "large template keys": (
        CHAT,
        {"chat_template_kwargs": {"k": "x" * 20_000}},
        400,
        "invalid_value",
        "chat_template_kwargs",
    ),
    "two ends of a prompt": (
        CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        400,
        "invalid_value",
        None,
    ),
    "a chat's parameter in a completion": (
        TEXT,
        {"max_completion_tokens": 5},
        400,
        "unsupported_parameter",
        "max_completion_tokens",
    ),
    "a typing mistake": (CHAT, {"temprature": 1}, 400, "unsupported_parameter", "temprature"),
    "a typing mistake with null": (CHAT, {"temprature": None}, 400, "unsupported_parameter", "temprature"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_bad_field_is_refused_by_name(running: Running, case: str) -> None:
    path, changes, status, code, param = FIELDS[case]
    body = chat_body(**changes) if path == CHAT else text_body(**changes)
    refused(running, running.client.post(path, json=body), status, code, param)


BODIES = {
    "nothing": b"",
    "not JSON": b"model=tiny",
    "half of it": b'{"model": "tiny", "messages": [',
    "an array": b"[]",
    "null": b"null",
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
    "not UTF-8": b'{"model": "\xff"}',
    "half a surrogate pair": rb'{"model": "tiny", "prompt": "\ud800"}',
    "ninety thousand brackets": b"[" * 90_000,
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_json_object_is_refused(running: Running, case: str) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = running.client.post(TEXT, content=BODIES[case], headers=headers)
    refused(running, response, 400, "invalid_json")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_only_json_is_read(running: Running, kind: str) -> None:
    content = json.dumps(chat_body()).encode()
    response = running.client.post(CHAT, content=content, headers={"content-type": kind})
    refused(running, response, 415, "unsupported_media_type")


def test_a_large_body_is_refused_by_its_declared_size(running: Running) -> None:
    """The reply comes although not a byte of the body was sent."""
    host, port = running.client.base_url.host, running.client.base_url.port
    with socket.create_connection((host, port), PATIENCE) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {2**40}\r\n\r\n".encode()
        )
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_a_large_body_of_undeclared_size_is_not_read_to_its_end(running: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1000 * LIMIT:
            sent += 10_000
            yield b"x" * 10_000

    response = running.client.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    refused(running, response, 413, "request_too_large")
    assert sent < 1000 * LIMIT


def test_ten_thousand_mistakes_get_a_short_answer(running: Running) -> None:
    body = chat_body(messages=[{"role": "x" * 50}] * 1000)
    refused(running, running.client.post(CHAT, json=body), 400, "invalid_value", "messages.0.role")


def test_a_long_name_is_not_echoed(running: Running) -> None:
    name = "x" * 50_000
    for changes in ({"model": name}, {"plan": name}, {name: 1}, {"temperature": name}):
        response = running.client.post(CHAT, json=chat_body(**changes))
        assert response.status_code in (400, 404) and len(response.content) < 2000


@pytest.mark.parametrize(("method", "path", "status"), [("GET", CHAT, 405), ("POST", "/v1/models", 405)])
def test_a_wrong_method_is_refused_in_the_envelope(
    running: Running, method: str, path: str, status: int
) -> None:
    response = running.client.request(method, path)
    assert response.headers["allow"]
    refused(running, response, status, "method_not_allowed")


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/chat/completions/", "//v1/completions", "/docs/", "/redoc"]
)
def test_a_wrong_url_is_refused_in_the_envelope(running: Running, path: str) -> None:
    refused(running, running.client.get(f"{running.client.base_url}{path}"), 404, "unknown_url")


def test_an_unknown_plan_names_the_loaded_ones(running: Running) -> None:
    response = running.client.post(CHAT, json=chat_body(plan="fast"))
    assert "sparse, dense" in refused(running, response, 404, "plan_not_found", "plan")


def test_an_unknown_parameter_names_the_nearest_one(running: Running) -> None:
    response = running.client.post(CHAT, json=chat_body(max_token=5))
    message = refused(running, response, 400, "unsupported_parameter", "max_token")
    assert "'max_tokens'" in message


def test_too_long_a_request_is_refused_in_openais_words(running: Running) -> None:
    response = running.client.post(TEXT, json=text_body(prompt=[5] * 200, max_tokens=100))
    message = refused(running, response, 400, "context_length_exceeded", "prompt")
    assert message.startswith(
        "This model's maximum context length is 256 tokens. However, you requested 300 tokens"
        " (200 in the prompt, 100 in the completion)."
    )
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("path", "nothing"), [(CHAT, CHAT_NOTHING), (TEXT, TEXT_NOTHING)])
def test_parameters_that_ask_for_nothing_are_accepted(
    running: Running, path: str, nothing: dict[str, tuple[Any, ...]]
) -> None:
    body = chat_body() if path == CHAT else text_body()
    for name, values in nothing.items():
        for value in (None, *values):
            response = running.client.post(path, json=body | {name: value})
            assert response.status_code == 200, (name, value, response.text)


@pytest.mark.parametrize("name", sorted(CHAT_NOTHING))
def test_parameters_that_ask_for_something_unserved_are_refused(running: Running, name: str) -> None:
    response = running.client.post(CHAT, json=chat_body(**{name: "something"}))
    refused(running, response, 400, "unsupported_parameter", name)


def test_a_bad_stream_request_is_refused_with_its_status(running: Running) -> None:
    response = running.client.post(CHAT, json=chat_body(stream=True, temperature=9))
    refused(running, response, 400, "invalid_value", "temperature")


def test_the_largest_request_that_fits_is_served(running: Running) -> None:
    response = running.client.post(TEXT, json=text_body(prompt=[5] * 200, max_tokens=56, model=MODEL))
    assert response.status_code == 200, response.text
    assert events(running.client.post(TEXT, json=text_body(prompt=[[299]], stream=True)).text)
