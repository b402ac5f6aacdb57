"""/v1/responses says what a chat would, in OpenAI's newer form: items, and events that add up to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from engine.errors import StepFailed
from engine.messages import FinishReason
from server.tokenizer import Tokenizer
from tests.server.builders import MODEL, PATIENCE, FakeEngine, http_server, save_tokenizer, say, then

RESPONSES = "/v1/responses"
TEMPLATE = (
    "{# <think></think> #}{% if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}"
    " <tool_call>\n{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}[{{ call.function.name }}]{% endfor %}{{ '\n' }}{% endfor %}"
    "assistant: "
)
TOOL: Any = {
    "type": "function",
    "name": "find",
    "description": "finds",
    "parameters": {"type": "object", "properties": {}},
    "strict": True,
}


class Running:
    """A server whose engine says what a test gives it."""

    def __init__(self, engine: FakeEngine, url: str, tokenizer: Tokenizer) -> None:
        self.engine, self.url, self.tokenizer = engine, url, tokenizer

    def says(self, text: str, reason: FinishReason = FinishReason.STOP) -> int:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = [*tokens, 2] if reason is FinishReason.STOP else tokens
        self.engine.script = say(*tokens, reason=reason)
        return len(tokens)

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url + RESPONSES, json={"model": MODEL, **body}, timeout=PATIENCE)

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.engine.submitted[-1].tokens)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = save_tokenizer(tmp_path_factory.mktemp("responses"), TEMPLATE)
    engine = FakeEngine(say(5))
    engine.card = msgspec.structs.replace(engine.card, max_model_len=2048)
    with http_server(engine, folder) as url:
        yield Running(engine, url, Tokenizer(folder))


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


def test_the_openai_client_gets_text(running: Running, client: openai.OpenAI) -> None:
    said = running.says("the 🦊")
    response = client.responses.create(
        model=MODEL, input="hello", instructions="be brief", max_output_tokens=50, temperature=0.5
    )
    assert (response.output_text, response.status, response.object) == ("the 🦊", "completed", "response")
    assert response.id.startswith("resp_") and response.usage is not None
    assert response.usage.output_tokens == said and response.usage.input_tokens_details.cached_tokens == 4
    assert running.prompt == "system: be brief\nuser: hello\nassistant: "
    submit = running.engine.submitted[-1]
    assert submit.request_id == response.id, "logs and traces name what the client knows"
    assert (submit.sampling.max_tokens, submit.sampling.temperature) == (50, 0.5)
    assert response.model_extra is not None and response.model_extra["farspan"]["plan"] == "sparse"


def test_events_add_up_to_the_whole(running: Running, client: openai.OpenAI) -> None:
    running.says('<think>hm</think>I look.\n<tool_call>{"name": "find", "arguments": {"a": 1}}</tool_call>')
    with client.responses.create(model=MODEL, input="go", tools=[TOOL], stream=True) as stream:
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "I look." and json.loads(final.output[2].arguments) == {"a": 1}
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    for name, expected in (
        ("response.reasoning_text.delta", "hm"),
        ("response.output_text.delta", "I look."),
        ("response.function_call_arguments.delta", final.output[2].arguments),
    ):
        assert "".join(event.delta for event in events if event.type == name) == expected
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert added == done == [item.id for item in final.output]

    whole = running.post(input="go", tools=[TOOL]).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][1]["content"][0]["text"] == "I look."


def test_what_was_said_can_be_sent_back(running: Running, client: openai.OpenAI) -> None:
    running.says('<think>hm</think>I look.\n<tool_call>{"name": "find", "arguments": {"a": 1}}</tool_call>')
    first = client.responses.create(model=MODEL, input="go", tools=[TOOL])
    call: Any = first.output[2]
    items: list[Any] = [
        {"role": "user", "content": "go"},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "found"},
    ]
    client.responses.create(model=MODEL, input=items, tools=[TOOL])
    expected = "user: go\nassistant: I look.[find]\ntool: found\nassistant: "
    assert running.prompt.endswith(expected)


def test_an_answer_that_was_cut_is_incomplete(running: Running) -> None:
    running.says("the fox", FinishReason.LENGTH)
    reply = running.post(input="x").json()
    assert reply["status"] == "incomplete"
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_format_becomes_a_grammar(running: Running) -> None:
    running.says("{}")
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    form = {"type": "json_schema", "name": "it", "schema": schema, "strict": True}
    assert running.post(input="x", text={"format": form}).status_code == 200
    assert running.engine.submitted[-1].sampling.grammar is not None


def test_a_stream_that_fails_says_so(running: Running, client: openai.OpenAI) -> None:
    running.engine.script = then(say(5), StepFailed("the step failed"))
    with (
        client.responses.create(model=MODEL, input="x", stream=True) as stream,
        pytest.raises(openai.APIError, match="the step failed"),
    ):
        list(stream)
    text = running.post(input="x", stream=True).text
    assert "event: error" in text and "[DONE]" not in text


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": 5}, 400, "input"),
        ({"input": [{"role": "x", "content": "a"}]}, 400, "input.0.role"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, 400, "input.0"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, 400, "input.0.type"),
        ({"model": "other"}, 404, "model"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"store": True}, 400, "store"),
        ({"background": True}, 400, "background"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, 400, "input"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0.type"),
        ({"tool_choice": "any"}, 400, "tool_choice.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
            400,
            "text.format",
        ),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, 400, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 400, "text.format"),
        ({"tempo": 1}, 400, "tempo"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_names_of_this_api(
    running: Running, changes: dict[str, Any], status: int, param: str
) -> None:
    refused = running.post(**{"input": "x", **changes})
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["param"] == param
