"""Tool calls and reasoning are told from text: the same streamed in any pieces, and only what is a call."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from engine.messages import FinishReason
from server.calls_in_text import ToolCall
from server.speech import Said, Speech
from server.tokenizer import Tokenizer
from server.toolcalls import ForcedCalls, HermesCalls, LlamaCalls, ToolParser
from tests.server.builders import (
    MODEL,
    PATIENCE,
    TEMPLATE,
    FakeEngine,
    chat_body,
    events,
    http_server,
    save_tokenizer,
    say,
)

CHAT = "/v1/chat/completions"
NAMES = ["find", "add"]
FIND, ADD = {"name": "find", "arguments": {"what": "the fox"}}, {"name": "add", "arguments": {"a": 1}}
HERMES = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %} as JSON\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}"
    "<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "\n{% endfor %}assistant: "
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "as it says",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
    for name in NAMES
]


def hermes(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def llama(*calls: dict[str, Any]) -> str:
    return "; ".join(json.dumps({"name": c["name"], "parameters": c["arguments"]}) for c in calls)


def taken_apart(make: Callable[[], Speech], text: str, size: int) -> list[tuple[str, Any]]:
    """Kinds and contents of what was said, neighbours of one kind joined, with the text in such pieces."""
    speech = make()
    said: list[Said] = []
    for start in range(0, len(text), size):
        said += speech.feed(text[start : start + size])
    found: list[tuple[str, Any]] = []
    for part in said + speech.flush():
        if part.call is not None:
            found.append(("call", {"name": part.call.name, "arguments": part.call.arguments}))
        elif part.kind == "arguments":
            found[-1][1]["arguments"] += part.text
        elif found and found[-1][0] == part.kind:
            found[-1] = (part.kind, found[-1][1] + part.text)
        else:
            found.append((part.kind, part.text))
    for kind, what in found:
        if kind == "call":
            what["arguments"] = json.loads(what["arguments"])
    return found


CASES: dict[str, tuple[Callable[[], ToolParser], str, list[tuple[str, Any]]]] = {
    "one call": (lambda: HermesCalls(NAMES), hermes(FIND), [("call", FIND)]),
    "two calls": (lambda: HermesCalls(NAMES), hermes(FIND, ADD) + "\n", [("call", FIND), ("call", ADD)]),
    "text before": (
        lambda: HermesCalls(NAMES),
        "I look:  \n" + hermes(FIND),
        [("content", "I look:"), ("call", FIND)],
    ),
    "text after": (
        lambda: HermesCalls(NAMES),
        hermes(FIND) + "\nDone <b.",
        [("call", FIND), ("content", "\nDone <b.")],
    ),
    "an unknown name": (
        lambda: HermesCalls(["other"]),
        hermes(FIND),
        [("content", hermes(FIND))],
    ),
    "broken JSON": (
        lambda: HermesCalls(NAMES),
        "<tool_call>{oh</tool_call>!",
        [("content", "<tool_call>{oh</tool_call>!")],
    ),
    "no last tag": (lambda: HermesCalls(NAMES), hermes(FIND)[: -len("</tool_call>")], [("call", FIND)]),
    "cut off": (
        lambda: HermesCalls(NAMES),
        '<tool_call>{"name": "fi',
        [("content", '<tool_call>{"name": "fi')],
    ),
    "plain text": (lambda: HermesCalls(NAMES), "1 < 2, <tool>\n\n", [("content", "1 < 2, <tool>\n\n")]),
    "Llama's call": (lambda: LlamaCalls(NAMES), llama(FIND), [("call", FIND)]),
    "Llama's calls": (
        lambda: LlamaCalls(NAMES),
        llama({"name": "find", "arguments": {"what": 'a;"}'}}, ADD),
        [("call", {"name": "find", "arguments": {"what": 'a;"}'}}), ("call", ADD)],
    ),
    "Llama's text": (lambda: LlamaCalls(NAMES), "see {this}; ok", [("content", "see {this}; ok")]),
    "Llama's JSON": (lambda: LlamaCalls(NAMES), '{"a": 1}', [("content", '{"a": 1}')]),
    "a forced list": (
        lambda: ForcedCalls(NAMES, None),
        json.dumps([{"name": c["name"], "parameters": c["arguments"]} for c in (FIND, ADD)]),
        [("call", FIND), ("call", ADD)],
    ),
    "a forced list cut off": (
        lambda: ForcedCalls(NAMES, None),
        '[{"name": "find"',
        [("content", '{"name": "find"')],
    ),
    "a tag in an argument": (
        lambda: HermesCalls(NAMES),
        hermes({"name": "find", "arguments": {"what": '</tool_call>"{<'}}, ADD),
        [("call", {"name": "find", "arguments": {"what": '</tool_call>"{<'}}), ("call", ADD)],
    ),
    "quoted arguments": (
        lambda: HermesCalls(NAMES),
        hermes({"name": "find", "arguments": json.dumps(FIND["arguments"])}),
        [("call", FIND)],
    ),
    "the name at the end": (
        lambda: HermesCalls(NAMES),
        hermes({"arguments": FIND["arguments"], "name": "find"}),
        [("call", FIND)],
    ),
    "no arguments": (
        lambda: LlamaCalls(NAMES),
        '{"name": "find"}; ' + llama(ADD),
        [("call", {"name": "find", "arguments": {}}), ("call", ADD)],
    ),
    "text after Llama's call": (
        lambda: LlamaCalls(NAMES),
        llama(ADD) + " and so on",
        [("call", ADD), ("content", "and so on")],
    ),
    "an unknown one of Llama's calls": (
        lambda: LlamaCalls(["find"]),
        llama(FIND, ADD),
        [("call", FIND), ("content", llama(ADD))],
    ),
    "a named call": (
        lambda: ForcedCalls(NAMES, "find"),
        ' {"what": "the fox"}',
        [("call", FIND)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_calls_are_found_however_the_text_arrives(case: str) -> None:
    parser, text, expected = CASES[case]
    for size in (1, 2, 3, 7, len(text)):
        assert taken_apart(lambda: Speech(parser()), text, size) == expected, size


THOUGHTS: dict[str, tuple[Any, str, list[tuple[str, Any]]]] = {
    "thought of": (
        "may come",
        "<think>\nhm\n</think>\n\nYes.",
        [("reasoning", "\nhm\n"), ("content", "Yes.")],
    ),
    "not thought of": ("may come", "Yes. </think>", [("content", "Yes. </think>")]),
    "already open": ("open", "hm</think>Yes.", [("reasoning", "hm"), ("content", "Yes.")]),
    "never closed": ("open", "hm </thin", [("reasoning", "hm </thin")]),
    "nearly thought of": ("may come", " <thin", [("content", " <thin")]),
    "nothing": ("may come", "  ", [("content", "  ")]),
    "closed before": ("none", "<think>a</think>", [("content", "<think>a</think>")]),
}


@pytest.mark.parametrize("case", THOUGHTS)
def test_reasoning_is_told_from_the_answer(case: str) -> None:
    state, text, expected = THOUGHTS[case]
    for size in (1, 2, 5, len(text)):
        assert taken_apart(lambda: Speech(reasoning=state), text, size) == expected, size


def test_a_call_may_follow_reasoning() -> None:
    text = "<think>which?</think>\n" + hermes(ADD)
    for size in (1, 4, len(text)):
        found = taken_apart(lambda: Speech(HermesCalls(NAMES), "may come"), text, size)
        assert found == [("reasoning", "which?"), ("call", ADD)]


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tooled"), HERMES)


def saying(folder: Path, text: str, reason: FinishReason = FinishReason.STOP) -> FakeEngine:
    tokens = Tokenizer(folder).encode(text, add_special_tokens=False)
    engine = FakeEngine(say(*tokens, *([2] if reason is FinishReason.STOP else []), reason=reason))
    engine.card = msgspec.structs.replace(engine.card, max_model_len=2048)  # tools take room
    return engine


def test_tools_reach_the_template_and_calls_the_client(tooled: Path) -> None:
    engine = saying(tooled, "I look.\n" + hermes(FIND, ADD))
    with (
        http_server(engine, tooled) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client,
    ):
        messages: list[Any] = [{"role": "user", "content": "go"}]
        chat = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS[:1], max_tokens=9)
        prompt = Tokenizer(tooled).decode(engine.submitted[-1].tokens)
        assert '"name": "find"' in prompt and "as it says" in prompt
        (choice,) = chat.choices
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or "").startswith("I look.")  # `add` is no tool of this request
        assert [call.function.name for call in choice.message.tool_calls or []] == ["find"]  # type: ignore[union-attr]

        chat = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=9)
        message = chat.choices[0].message
        calls: Any = message.tool_calls
        assert message.content == "I look."
        assert [json.loads(call.function.arguments) for call in calls] == [{"what": "the fox"}, {"a": 1}]
        assert len({call.id for call in calls}) == 2

        result = {"role": "tool", "tool_call_id": calls[0].id, "content": "found"}
        again = [*messages, message.model_dump(exclude_none=True), result]
        client.chat.completions.create(model=MODEL, messages=again, tools=TOOLS, max_tokens=9)
        prompt = Tokenizer(tooled).decode(engine.submitted[-1].tokens)
        assert '<tool_call>{"what": "the fox"}</tool_call>' in prompt and "tool: found" in prompt

        with client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, stream=True, max_tokens=9
        ) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
        streamed: Any = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        first = [call for call in streamed if call.id]
        assert [(call.index, call.function.name) for call in first] == [(0, "find"), (1, "add")]
        assert len(streamed) > len(first), "arguments come in pieces"
        said = ["".join(c.function.arguments for c in streamed if c.index == index) for index in (0, 1)]
        assert [json.loads(one) for one in said] == [{"what": "the fox"}, {"a": 1}]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_or_with_none_calls_are_text(tooled: Path) -> None:
    engine = saying(tooled, hermes(FIND))
    with http_server(engine, tooled) as url:
        for changes in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            reply = httpx.post(url + CHAT, json=chat_body(max_tokens=9, **changes), timeout=PATIENCE).json()
            (choice,) = reply["choices"]
            assert choice["message"]["content"] == hermes(FIND) and choice["finish_reason"] == "stop"
            assert "tool_calls" not in choice["message"]
            assert "tools:" not in Tokenizer(tooled).decode(engine.submitted[-1].tokens)


@pytest.mark.parametrize(
    ("choice", "said", "call", "reason"),
    [
        ("required", '[{"name": "add", "parameters": {"a": 5}}]', ("add", {"a": 5}), "tool_calls"),
        ({"type": "function", "function": {"name": "find"}}, '{"a": 7}', ("find", {"a": 7}), "stop"),
    ],
)
def test_a_forced_call_is_forced_by_a_grammar(
    tooled: Path, choice: Any, said: str, call: tuple[str, Any], reason: str
) -> None:
    engine = saying(tooled, said)
    tokenizer = Tokenizer(tooled)
    with http_server(engine, tooled) as url:
        for stream in (False, True):
            body = chat_body(tools=TOOLS, tool_choice=choice, stream=stream, max_tokens=9)
            response = httpx.post(url + CHAT, json=body, timeout=PATIENCE)
            replies = events(response.text) if stream else [response.json()]
            parts = [reply["choices"][0]["delta" if stream else "message"] for reply in replies]
            found, *more = [found for part in parts for found in part.get("tool_calls") or []]
            arguments = "".join(one["function"]["arguments"] for one in (found, *more))
            assert (found["function"]["name"], json.loads(arguments)) == call
            assert bool(more) == stream and not any("id" in one for one in more)
            assert replies[-1]["choices"][0]["finish_reason"] == reason
            assert not any(part.get("content") for part in parts)
    grammar = engine.submitted[-1].sampling.grammar
    assert grammar is not None and tokenizer.grammars is not None
    for text, fits in ((said, True), (said.replace('"a"', '"b"'), False), ("I would rather talk", False)):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        matcher = tokenizer.grammars.matcher(grammar)
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == fits


def test_one_call_only_where_several_are_not_wanted(tooled: Path) -> None:
    engine, tokenizer = saying(tooled, "[]"), Tokenizer(tooled)
    two = json.dumps([{"name": "add", "parameters": {"a": 5}}] * 2)
    tokens = tokenizer.encode(two, add_special_tokens=False)
    taken = []
    with http_server(engine, tooled) as url:
        for parallel in (True, False):
            body = chat_body(tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel, max_tokens=9)
            assert httpx.post(url + CHAT, json=body, timeout=PATIENCE).status_code == 200
            assert tokenizer.grammars is not None and engine.submitted[-1].sampling.grammar is not None
            matcher = tokenizer.grammars.matcher(engine.submitted[-1].sampling.grammar)
            taken.append(matcher.try_consume_tokens(tokens) == len(tokens))
    assert taken == [True, False]


@pytest.mark.parametrize(
    ("opens", "said", "thought", "content"),
    [
        ("", "<think>hm</think>Yes", "hm", "Yes"),
        ("<think>\n", "hm</think>Yes", "hm", "Yes"),
        ("<think>\n\n</think>\n\n", "Yes", None, "Yes"),
        ("", "Yes", None, "Yes"),
    ],
)
def test_reasoning_has_a_field_of_its_own_where_a_template_marks_it(
    tmp_path: Path, opens: str, said: str, thought: str | None, content: str
) -> None:
    marks = "{# <think></think> #}"
    folder = save_tokenizer(tmp_path, marks + TEMPLATE + json.dumps(opens)[1:-1].replace("\\n", "\n"))
    with http_server(saying(folder, said), folder) as url:
        message = httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE).json()["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, content)
        chunks = events(httpx.post(url + CHAT, json=chat_body(stream=True), timeout=PATIENCE).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (thought or "")
    assert "".join(delta.get("content", "") for delta in deltas) == content


FORMATS: dict[str, tuple[Callable[[], ToolParser], str]] = {
    "Hermes": (lambda: HermesCalls(NAMES), hermes(FIND)),
    "Llama": (lambda: LlamaCalls(NAMES), llama(FIND)),
    "forced": (lambda: ForcedCalls(NAMES, None), '[{"name": "find", "parameters": {"what": "the fox"}}]'),
    "named": (lambda: ForcedCalls(NAMES, "find"), '{"what": "the fox"}'),
}


@pytest.mark.parametrize("format", FORMATS)
def test_arguments_come_while_they_are_said(format: str) -> None:
    make, text = FORMATS[format]
    speech = Speech(make())
    said = speech.feed(text[: text.index("fox")])
    assert [part.kind for part in said] == ["call"] and said[0].call is not None
    assert said[0].call.arguments == '{"what": "the '
    (more, *rest) = speech.feed(text[text.index("fox") :]) + speech.flush()
    assert (more.kind, more.text.split("}")[0]) == ("arguments", 'fox"')
    assert rest == []


@pytest.mark.parametrize("broken", ['{"a": ', '{"a": </tool_call>', '{"a": "b'])
def test_a_call_that_breaks_off_ends_with_its_answer(broken: str) -> None:
    """Its beginning has been said by then: nothing can take that back."""
    speech = Speech(HermesCalls(NAMES))
    said = speech.feed('<tool_call>{"name": "find", "arguments": ' + broken) + speech.flush()
    assert [part.call.arguments for part in said if part.call] == [broken.removesuffix("</tool_call>")]
    assert len(said) == 1


def test_calls_have_names_of_their_own() -> None:
    assert ToolCall("f", "{}").id != ToolCall("f", "{}").id
