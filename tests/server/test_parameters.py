"""What a request asks for beyond text: how tokens are chosen, logprobs, echoes, prompts cut or continued."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.grammars import Grammars
from engine.messages import FinishReason
from server import structured
from server.tokenizer import Tokenizer
from tests.server.builders import (
    CONTEXT,
    PATIENCE,
    FakeEngine,
    chat_body,
    events,
    http_server,
    save_tokenizer,
    say,
    text_body,
    then,
    until,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FOX = "the 🦊!"


class Running:
    """A server whose engine says what a test gives it."""

    def __init__(self, engine: FakeEngine, url: str, tokenizer: Tokenizer) -> None:
        self.engine, self.url, self.tokenizer = engine, url, tokenizer

    def says(self, text: str, reason: FinishReason = FinishReason.LENGTH) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self.engine.script = say(*tokens, reason=reason)
        return tokens

    def post(self, path: str, **changes: Any) -> Any:
        body = chat_body(**changes) if path == CHAT else text_body(**changes)
        response = httpx.post(self.url + path, json=body, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        return events(response.text) if changes.get("stream") else response.json()

    @property
    def heard(self) -> Any:
        """The newest request that reached the engine."""
        return self.engine.submitted[-1]


@pytest.fixture(scope="module")
def running(folder: Path, tokenizer: Tokenizer) -> Iterator[Running]:
    engine = FakeEngine(say(5))
    with http_server(engine, folder) as url:
        yield Running(engine, url, tokenizer)


def test_every_sampling_parameter_reaches_the_engine(running: Running) -> None:
    running.says("x")
    for path in (CHAT, TEXT):
        asked = dict(
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=-0.5,
            frequency_penalty=0.7,
            min_tokens=2,
            max_tokens=5,
        )
        running.post(path, logit_bias={"7": -100, "299": 1.5}, priority=-3, **asked)
        assert running.heard.priority == -3
        sampling = running.heard.sampling
        assert {name: getattr(sampling, name) for name in asked} == asked
        assert sampling.logit_bias == ((7, -100.0), (299, 1.5))
        assert sampling.logprobs is None and sampling.prompt_logprobs is None


def test_logprobs_of_a_chat_say_which_bytes_a_token_is(running: Running) -> None:
    tokens = running.says(FOX)
    whole = running.post(CHAT, logprobs=True, top_logprobs=2)["choices"][0]
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == FOX
    assert [entry["logprob"] for entry in content] == [-token / 1000 for token in tokens]
    for token, entry in zip(tokens, content, strict=True):
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][1] == {name: entry[name] for name in ("token", "logprob", "bytes")}
        assert bytes(entry["bytes"]) == running.tokenizer.token_bytes(token)

    chunks = [chunk["choices"][0] for chunk in running.post(CHAT, logprobs=True, top_logprobs=2, stream=True)]
    streamed = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert streamed == content
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == FOX
    assert running.post(CHAT, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert running.post(CHAT)["choices"][0]["logprobs"] is None


def test_logprobs_of_a_text_are_columns_that_streams_add_up_to(running: Running) -> None:
    tokens = running.says("the fox")
    whole = running.post(TEXT, logprobs=1)["choices"][0]["logprobs"]
    assert "".join(whole["tokens"]) == "the fox"
    assert whole["token_logprobs"] == [-token / 1000 for token in tokens]
    starts = ["".join(whole["tokens"][:count]) for count in range(len(tokens))]
    assert whole["text_offset"] == [len(start) for start in starts]
    for text, top, token in zip(whole["tokens"], whole["top_logprobs"], tokens, strict=True):
        assert top[text] == -token / 1000 and len(top) == 2  # the token itself is in, beside the best
    chunks = [c["choices"][0]["logprobs"] for c in running.post(TEXT, logprobs=1, stream=True)]
    for name, column in whole.items():
        assert [entry for chunk in chunks if chunk for entry in chunk[name]] == column


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_scores_the_prompt_as_evaluations_need_it(running: Running, stream: bool) -> None:
    """lm-eval reads token_logprobs[context:-1], and takes top_logprobs for what greedy would say."""
    running.says("!")
    prompt = running.tokenizer.encode("the fox", add_special_tokens=False)
    reply = running.post(TEXT, prompt=[prompt], echo=True, logprobs=1, max_tokens=1, stream=stream)
    choices = [chunk["choices"][0] for chunk in (reply if stream else [reply])]
    assert "".join(choice["text"] for choice in choices) == "the fox!"
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    columns = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    assert running.heard.sampling.prompt_logprobs == 1
    assert "".join(columns["tokens"]) == "the fox!"
    assert columns["token_logprobs"][0] is None and columns["top_logprobs"][0] is None
    assert columns["token_logprobs"][1:-1] == [-token / 1000 for token in prompt[1:]]
    assert all(len(top) == 2 for top in columns["top_logprobs"][1:])
    assert columns["text_offset"][-1] == len("the fox")


def test_an_echo_without_an_answer_shows_the_prompt_only(running: Running) -> None:
    running.says("!")
    reply = running.post(TEXT, echo=True, max_tokens=0, logprobs=0)
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the fox", "length")
    assert reply["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == reply["usage"]["prompt_tokens"]
    assert running.heard.sampling.max_tokens == 1
    assert running.post(TEXT, echo=True)["choices"][0]["text"] == "the fox!"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_prompt_logprobs_are_by_token_id_as_vllms_are(running: Running, path: str) -> None:
    running.says("!")
    reply = running.post(path, prompt_logprobs=1)
    found = reply["prompt_logprobs"] if path == CHAT else reply["choices"][0]["prompt_logprobs"]
    tokens = running.heard.tokens
    assert found[0] is None and len(found) == len(tokens)
    for token, entry in zip(tokens[1:], found[1:], strict=True):
        assert list(entry) == [str(token - 1), str(token)]
        own = entry[str(token)]
        assert (own["logprob"], own["rank"]) == (-token / 1000, 2)
        assert own["decoded_token"] == running.tokenizer.token_bytes(token).decode(errors="replace")


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_token_ids_are_returned_where_asked_for(running: Running, path: str) -> None:
    tokens = running.says(FOX)
    whole = running.post(path, return_token_ids=True)
    assert whole["choices"][0]["token_ids"] == tokens
    holder = whole if path == CHAT else whole["choices"][0]
    assert holder["prompt_token_ids"] == list(running.heard.tokens)
    chunks = running.post(path, return_token_ids=True, stream=True)
    assert [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", ())] == tokens
    first = chunks[0] if path == CHAT else chunks[0]["choices"][0]
    assert first["prompt_token_ids"] == list(running.heard.tokens)
    assert "token_ids" not in running.post(path)["choices"][0]


def test_a_prompt_is_cut_to_its_last_tokens(running: Running) -> None:
    running.says("!")
    running.post(TEXT, prompt=[5, 6, 7, 8], truncate_prompt_tokens=2)
    assert running.heard.tokens == (7, 8) and running.heard.prompt_length == 2
    long = "the quick brown fox " * 20_000  # would be refused without tokenising otherwise
    running.post(TEXT, prompt=long, truncate_prompt_tokens=-1, max_tokens=56)
    assert len(running.heard.tokens) == CONTEXT - 56
    expected = running.tokenizer.encode(long[-10_000:], add_special_tokens=False)
    assert list(running.heard.tokens) == expected[-200:]


def test_stop_strings_before_min_tokens_are_text(running: Running) -> None:
    tokens = running.says("a!b!c!d")
    choice = running.post(TEXT, stop="!", min_tokens=3, max_tokens=9)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a!b", "stop")
    assert len(tokens) == 7


def test_a_final_message_is_continued_and_a_prompt_may_end_with_a_turn(running: Running) -> None:
    running.says("!")
    messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the fox "}]
    running.post(CHAT, messages=messages, continue_final_message=True)
    rendered = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\nthe fox"
    assert list(running.heard.tokens) == running.tokenizer.encode(rendered, add_special_tokens=False)
    running.post(CHAT, messages=messages[:1], add_generation_prompt=False)
    rendered = "<|im_start|>user\nsay<|im_end|>\n"
    assert list(running.heard.tokens) == running.tokenizer.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_longer_than_its_timeout_ends_and_frees_the_engine(
    running: Running, stream: bool
) -> None:
    running.engine.script = then(say(5), None)
    running.engine.aborted.clear()
    began = time.monotonic()
    body = chat_body(timeout=0.2, stream=stream)
    response = httpx.post(running.url + CHAT, json=body, timeout=PATIENCE)
    assert 0.2 <= time.monotonic() - began < 5
    error = events(response.text)[-1]["error"] if stream else response.json()["error"]
    assert (error["code"], error["param"]) == ("timeout", "timeout")
    if not stream:
        assert response.status_code == 408 and response.headers["x-should-retry"] == "false"
    until(lambda: running.engine.aborted == [running.heard.request_id])


def test_a_template_sees_what_the_request_gives_it(tmp_path: Path) -> None:
    template = "{{ messages[0]['content'] }}{% if enable_thinking is false %} no{% endif %}"
    engine = FakeEngine(say(5))
    folder = save_tokenizer(tmp_path, template)
    with http_server(engine, folder) as url:
        for keys in ({}, {"enable_thinking": False}):
            httpx.post(url + CHAT, json=chat_body(chat_template_kwargs=keys), timeout=PATIENCE)
    decoded = [Tokenizer(folder).decode(submit.tokens) for submit in engine.submitted]
    assert decoded == ["the fox", "the fox no"]


FORMATS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "any object": ({"response_format": {"type": "json_object"}}, ['{"a": [1]}', "{}"], ["[1]", "a"]),
    "a schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "point",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        "properties": {"x": {"type": "integer"}},
                        "required": ["x"],
                        "additionalProperties": False,
                    },
                },
            }
        },
        ['{"x": 5}'],
        ['{"y": 5}', '{"x": "5"}', "{}"],
    ),
    "vLLM's json": ({"structured_outputs": {"json": {"type": "boolean"}}}, ["true"], ["1"]),
    "json as text": ({"structured_outputs": {"json": '{"type": "null"}'}}, ["null"], ["0"]),
    "a regex": ({"structured_outputs": {"regex": "[a-c]+!"}}, ["abc!"], ["abd!", "!"]),
    "a choice": ({"structured_outputs": {"choice": ["the fox", "🦊"]}}, ["🦊", "the fox"], ["the dog"]),
    "a grammar": ({"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c")'}}, ["ab"], ["ad"]),
}


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_an_answer_must_look_like_reaches_the_engine_as_a_grammar(
    running: Running, path: str, case: str
) -> None:
    asked, right, wrong = FORMATS[case]
    running.says("x")
    running.post(path, **asked)
    grammars = running.tokenizer.grammars
    assert grammars is not None
    for texts, expected in ((right, True), (wrong, False)):
        for text in texts:
            matcher = grammars.matcher(running.heard.sampling.grammar)
            tokens = running.tokenizer.encode(text, add_special_tokens=False)
            fits = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
            assert fits == expected, text


def test_a_text_format_asks_for_nothing(running: Running) -> None:
    running.says("x")
    running.post(CHAT, response_format={"type": "text"})
    assert running.heard.sampling.grammar is None


def test_a_grammar_that_is_never_ready_keeps_nobody_from_the_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit ends the request, and those that waited behind it are told to come back."""
    let_go = threading.Event()
    monkeypatch.setattr(structured, "SECONDS", 0.3)
    monkeypatch.setattr(Grammars, "check", lambda self, grammar: let_go.wait(PATIENCE))
    running.says("x")
    try:
        with ThreadPoolExecutor(4) as clients:
            body = chat_body(structured_outputs={"regex": "a"})
            replies = [
                clients.submit(httpx.post, running.url + CHAT, json=body, timeout=PATIENCE) for _ in range(4)
            ]
            assert running.post(CHAT)["choices"]
            statuses = sorted(reply.result().status_code for reply in replies)
            assert statuses == [400, 400, 503, 503]  # two threads compile
    finally:
        let_go.set()
