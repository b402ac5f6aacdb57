"""OpenAI's SDKs, for Python and for Node, get the same replies to the same calls, in OpenAI's own forms."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from engine.errors import StepFailed
from engine.messages import FinishReason, Submit, TokenOutput
from server.tokenizer import Tokenizer
from tests.server.builders import MODEL, PATIENCE, FakeEngine, Step, http_server, save_tokenizer, say
from tests.server.test_tools import HERMES, TOOLS

KEY = "secret"
CHAT, TEXT, RESPONSES = "chat.completions.create", "completions.create", "responses.create"
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "it", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
TOOL_CALL = '<tool_call>{"name": "find", "arguments": {"a": 5}}</tool_call>'
FORCED_CALL = '[{"name": "add", "parameters": {"a": 1}}]'
FLAT = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
PAST_CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}


@dataclass(frozen=True)
class Call:
    """A method of a client, and what it is given."""

    method: str
    args: dict[str, Any]


def prompt(says: str) -> str:
    """The engine of these tests says what stands between the last of these brackets."""
    return f"the fox <<{says}>>"


def chat(says: str = "the lazy dog", **changes: Any) -> Call:
    messages = [{"role": "user", "content": prompt(says)}]
    return Call(CHAT, {"model": MODEL, "messages": messages, "max_tokens": 100} | changes)


def text(says: str = "the lazy dog", **changes: Any) -> Call:
    return Call(TEXT, {"model": MODEL, "prompt": prompt(says), "max_tokens": 100} | changes)


def respond(says: str = "the lazy dog", **changes: Any) -> Call:
    return Call(RESPONSES, {"model": MODEL, "input": prompt(says), "max_output_tokens": 100} | changes)


CALLS: dict[str, Call] = {
    "a chat": chat(),
    "a chat as a stream": chat(stream=True, stream_options={"include_usage": True}),
    "two answers": chat(n=2, temperature=0.5, seed=7),
    "logprobs": chat(logprobs=True, top_logprobs=3),
    "logprobs as a stream": chat(logprobs=True, top_logprobs=1, stream=True),
    "stop strings": chat(stop=["lazy", "fox"]),
    "a JSON schema": chat('{"a": 5}', response_format=JSON_SCHEMA),
    "a JSON object": chat("{}", response_format={"type": "json_object"}),
    "tools": chat(TOOL_CALL, tools=TOOLS),
    "tools as a stream": chat(TOOL_CALL, tools=TOOLS, stream=True),
    "a forced tool": chat(FORCED_CALL, tools=TOOLS, tool_choice="required"),
    "a result of a tool": chat(
        messages=[
            {"role": "user", "content": prompt("yes")},
            {"role": "assistant", "tool_calls": [PAST_CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "5"},
        ],
        tools=TOOLS,
    ),
    "penalties and biases": chat(presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}),
    "a text": text(),
    "a text as a stream": text(stream=True, stream_options={"include_usage": True}),
    "an echo with logprobs": text(echo=True, logprobs=2),
    "a prompt of token ids": text(prompt=[5, 6, 7], n=2),
    "a response": respond(),
    "a response as a stream": respond(stream=True, instructions="be brief"),
    "a response that calls": respond(TOOL_CALL, tools=FLAT),
    "a response that calls as a stream": respond(TOOL_CALL, tools=FLAT, stream=True),
    "a response in JSON": respond(
        '{"a": 5}', text={"format": {"type": "json_schema", "name": "it", "schema": {"type": "object"}}}
    ),
    "an unknown model": chat(model="gpt-9"),
    "a wrong temperature": chat(temperature=9),
    "too long a prompt": text("the fox " * 20_000),
    "what is not served": chat(modalities=["text", "audio"]),
    "a step that fails": chat("FAIL"),
    "a stream that fails": chat("FAIL", stream=True),
}
REFUSED = {
    "an unknown model": ("NotFoundError", 404, "model_not_found", "model"),
    "a wrong temperature": ("BadRequestError", 400, "invalid_value", "temperature"),
    "too long a prompt": ("BadRequestError", 400, "context_length_exceeded", "prompt"),
    "what is not served": ("BadRequestError", 400, "unsupported_parameter", "modalities"),
    "a step that fails": ("InternalServerError", 500, "engine_error", None),
    "a stream that fails": ("APIError", None, "engine_error", None),
}
URLS = {CHAT: "/v1/chat/completions", TEXT: "/v1/completions", RESPONSES: "/v1/responses"}
WHOLE: dict[str, Any] = {CHAT: ChatCompletion, TEXT: Completion, RESPONSES: Response}
STREAMED: dict[str, Any] = {CHAT: ChatCompletionChunk, TEXT: Completion, RESPONSES: ResponseStreamEvent}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = save_tokenizer(tmp_path_factory.mktemp("tooled"), HERMES)
    tokenizer = Tokenizer(folder)

    def script(submit: Submit) -> list[Step]:
        said = re.findall("<<(.*?)>>", tokenizer.decode(submit.tokens)) or ["a fox"]
        if said[-1] == "FAIL":
            return [StepFailed("it failed")]
        tokens = (*tokenizer.encode(said[-1], add_special_tokens=False), 2)
        steps = say(*tokens, reason=FinishReason.STOP)(submit)
        return [of_choice(step, choice) for step in steps for choice in range(submit.choices)]

    engine = FakeEngine(script)
    engine.card = msgspec.structs.replace(engine.card, max_model_len=2048)
    with http_server(engine, folder, api_keys=(KEY,)) as url:
        yield f"{url}/v1"


def of_choice(step: Step, choice: int) -> TokenOutput:
    assert isinstance(step, TokenOutput)
    return msgspec.structs.replace(step, choice=choice, cost=None if choice else step.cost)


def by_python(url: str, call: Call) -> Any:
    """The JSON of what Python's SDK returns, of all chunks of a stream, or of the error."""
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        method: Any = client
        for name in call.method.split("."):
            method = getattr(method, name)
        try:
            reply = method(**call.args)
            if call.args.get("stream"):
                with reply as chunks:
                    return [chunk.to_dict(mode="json") for chunk in chunks]
            return reply.to_dict(mode="json")
        except openai.APIError as error:
            status = error.status_code if isinstance(error, openai.APIStatusError) else None
            return {"error": type(error).__name__, "status": status, "code": error.code, "param": error.param}


def by_node(url: str, calls: list[Call]) -> list[Any]:
    """The same by Node's SDK."""
    sent = {"url": url, "key": KEY, "calls": [{"method": c.method, "args": [c.args]} for c in calls]}
    script = Path(__file__).with_name("sdk_calls.cjs")
    ran = subprocess.run(
        ["node", script], input=json.dumps(sent), capture_output=True, text=True, timeout=4 * PATIENCE
    )
    assert ran.returncode == 0, ran.stderr
    replies: list[Any] = json.loads(ran.stdout)
    return replies


def plain(reply: Any) -> Any:
    """Without what differs from call to call, and what an SDK adds or says as null."""
    if isinstance(reply, list):
        return [plain(one) for one in reply]
    if not isinstance(reply, dict):
        return reply
    passing = {"id", "created", "created_at", "item_id", "call_id", "output_text", "_request_id"}
    return {name: plain(value) for name, value in reply.items() if name not in passing and value is not None}


@pytest.mark.parametrize("name", CALLS)
def test_pythons_sdk_understands_the_reply(url: str, name: str) -> None:
    reply = by_python(url, CALLS[name])
    refused = isinstance(reply, dict) and isinstance(reply.get("error"), str)
    assert refused == (name in REFUSED), reply
    if refused:
        assert tuple(reply.values()) == REFUSED[name]


def test_nodes_sdk_understands_it_alike(url: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if subprocess.run(["node", "-e", "require('openai')"], capture_output=True).returncode:
        pytest.skip("node finds no package 'openai': npm install openai, and name its folder in NODE_PATH")
    replies = by_node(url, list(CALLS.values()))
    for (name, call), reply in zip(CALLS.items(), replies, strict=True):
        assert plain(reply) == plain(by_python(url, call)), name


@pytest.mark.parametrize("name", [name for name in CALLS if name not in REFUSED])
def test_every_reply_has_openais_own_form(url: str, name: str) -> None:
    """Strictly: every field has the type that OpenAI publishes, and nothing that it needs is missing."""
    call = CALLS[name]
    headers = {"authorization": f"Bearer {KEY}"}
    reply = httpx.post(
        url.removesuffix("/v1") + URLS[call.method], json=call.args, headers=headers, timeout=PATIENCE
    )
    if not call.args.get("stream"):
        body = reply.json()
        if name == "an echo with logprobs":  # of the first token, OpenAI's server says null as well
            logprobs = body["choices"][0]["logprobs"]
            assert logprobs["token_logprobs"].pop(0) is None and logprobs["top_logprobs"].pop(0) is None
        TypeAdapter(WHOLE[call.method]).validate_json(json.dumps(body), strict=True)
        return
    for chunk in [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]:
        if call.method == TEXT:  # before the last of a text, OpenAI's server says null as well
            for choice in chunk["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        TypeAdapter(STREAMED[call.method]).validate_json(json.dumps(chunk), strict=True)


def test_a_class_of_the_callers_is_filled(url: str) -> None:
    class Found(BaseModel):
        a: int

    messages: Any = [{"role": "user", "content": prompt('{"a": 5}')}]
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Found)
        assert parsed.choices[0].message.parsed == Found(a=5)
        answer = client.responses.parse(model=MODEL, input=prompt('{"a": 6}'), text_format=Found)
        assert answer.output_parsed == Found(a=6)
        assert [model.id for model in client.models.list()] == [MODEL]
        TypeAdapter(Model).validate_python(client.models.retrieve(MODEL).to_dict(), strict=True)
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"
