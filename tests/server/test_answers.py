"""Answers have OpenAI's shapes, streamed or not, and end where they should: the same text either way."""

from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from engine.errors import EngineDead, StepFailed
from engine.messages import FinishReason, Submit, TokenOutput
from server.tokenizer import Tokenizer
from tests.server.builders import (
    CONTEXT,
    MODEL,
    PATIENCE,
    FakeEngine,
    Script,
    Step,
    chat_body,
    cost,
    events,
    http_server,
    say,
    text_body,
    then,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FOX = "the 🦊 says naïve things."


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def post(engine: FakeEngine, folder: Path, path: str, body: dict[str, Any]) -> httpx.Response:
    with http_server(engine, folder) as url:
        return httpx.post(url + path, json=body, timeout=PATIENCE)


def answer(engine: FakeEngine, folder: Path, **changes: Any) -> tuple[str, str, int]:
    """Text, finish reason and tokens of an answer, which must be the same streamed or not, chat or text."""
    found = set()
    with http_server(engine, folder) as url:
        for path, body in {CHAT: chat_body(**changes), TEXT: text_body(**changes)}.items():
            whole = httpx.post(url + path, json=body, timeout=PATIENCE).json()
            (choice,) = whole["choices"]
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            found.add((text, choice["finish_reason"], whole["usage"]["completion_tokens"]))

            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = events(httpx.post(url + path, json=body | options, timeout=PATIENCE).text)
            usage = chunks.pop()["usage"]
            choices = [chunk["choices"][0] for chunk in chunks]
            text = "".join(
                choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in choices
            )
            reasons = [choice["finish_reason"] for choice in choices]
            assert reasons[:-1] == [None] * (len(reasons) - 1), "exactly one end, and it comes last"
            found.add((text, reasons[-1], usage["completion_tokens"]))
    assert len(found) == 1, found
    return found.pop()


def test_a_chat_completion_has_openais_shape_and_says_what_it_cost(
    folder: Path, tokenizer: Tokenizer
) -> None:
    engine = FakeEngine(say(*ids(tokenizer, FOX)))
    reply = post(engine, folder, CHAT, chat_body()).json()
    (submit,) = engine.submitted
    assert reply.pop("id") == submit.request_id and submit.request_id.startswith("chatcmpl-")
    assert reply.pop("created") > 1_700_000_000
    assert reply.pop("system_fingerprint").endswith("-sparse-digest")
    prompt, said = submit.prompt_length, len(ids(tokenizer, FOX))
    assert reply == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": FOX, "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
        "farspan": {
            "plan": "sparse",
            "prefill_read_fraction": 0.25,
            "decode_read_fraction": None,
            "attention_recall": 0.97,
            "attention_recall_p5": 0.9,
            "attention_recall_samples": 48,
            "kv_tokens_total": 20,
            "kv_tokens_kept": 10.0,
            "kv_bytes": 4096,
        },
    }


@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_what_the_answer_read_is_said_when_it_ends(folder: Path, tokenizer: Tokenizer, url: str) -> None:
    def script(submit: Submit) -> list[Step]:
        steps = say(*ids(tokenizer, FOX))(submit)
        return [
            msgspec.structs.replace(step, decode_read_fraction=1 / (number + 1))
            for number, step in enumerate(steps)
            if isinstance(step, TokenOutput)
        ]

    last = len(ids(tokenizer, FOX))
    make_body = chat_body if url == CHAT else text_body
    whole = post(FakeEngine(script), folder, url, make_body()).json()
    streamed = events(post(FakeEngine(script), folder, url, make_body(stream=True)).text)
    for found in (whole, next(event for event in reversed(streamed) if "farspan" in event)):
        assert found["farspan"]["decode_read_fraction"] == 1 / last
        assert found["farspan"]["prefill_read_fraction"] == 0.25


def test_a_text_completion_has_openais_shape(folder: Path, tokenizer: Tokenizer) -> None:
    reply = post(FakeEngine(say(*ids(tokenizer, FOX))), folder, TEXT, text_body()).json()
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion"
    assert reply["choices"] == [{"index": 0, "text": FOX, "logprobs": None, "finish_reason": "length"}]
    assert reply["farspan"]["plan"] == "sparse"


@pytest.mark.parametrize("include_usage", [False, True])
def test_chunks_of_a_chat_have_openais_shape(folder: Path, tokenizer: Tokenizer, include_usage: bool) -> None:
    tokens = ids(tokenizer, "the fox")
    body = chat_body(stream=True, stream_options={"include_usage": include_usage})
    response = post(FakeEngine(say(*tokens)), folder, CHAT, body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = events(response.text)
    usage = chunks.pop() if include_usage else None
    shared = {(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}
    assert len(shared) == 1 and {name for _, _, name, _ in shared} == {"chat.completion.chunk"}
    first, *middle, last = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert [("farspan" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert last["farspan"]["kv_tokens_kept"] == 10.0
    if usage is None:
        assert not any("usage" in chunk for chunk in chunks)
    else:
        assert all(chunk["usage"] is None for chunk in chunks)
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(tokens)
        assert (usage["id"], usage["created"], usage["object"], usage["model"]) in shared


def test_characters_spread_over_tokens_arrive_whole(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, FOX)
    assert answer(FakeEngine(say(*tokens)), folder) == (FOX, "length", len(tokens))


def test_an_end_token_is_counted_and_not_shown(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = [*ids(tokenizer, "the fox"), 2]
    engine = FakeEngine(say(*tokens, reason=FinishReason.STOP))
    assert answer(engine, folder) == ("the fox", "stop", len(tokens))


def test_a_stop_token_of_the_request_is_counted_and_not_shown(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "the fox!")
    engine = FakeEngine(say(*tokens, reason=FinishReason.STOP))
    assert answer(engine, folder, stop_token_ids=tokens[-1:]) == ("the fox", "stop", len(tokens))
    assert {submit.sampling.stop_token_ids for submit in engine.submitted} == {(tokens[-1],)}


@pytest.mark.parametrize("stop", ["🦊 say", ["zebra", "🦊 say"], ["s na", "🦊 say"]])
def test_a_stop_string_over_several_tokens_cuts_the_answer_and_ends_the_request(
    folder: Path, tokenizer: Tokenizer, stop: str | list[str]
) -> None:
    engine = FakeEngine(then(say(*ids(tokenizer, FOX)), None))  # would go on for ever
    text, reason, num_tokens = answer(engine, folder, stop=stop)
    assert (text, reason) == ("the ", "stop")
    needed = next(
        count
        for count in range(len(ids(tokenizer, FOX)))
        if "🦊 say" in tokenizer._tokens.decode(ids(tokenizer, FOX)[:count])
    )
    assert num_tokens == needed
    assert engine.aborted == [submit.request_id for submit in engine.submitted]


def test_the_beginning_of_a_stop_string_at_the_end_is_shown(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "the fox")
    assert answer(FakeEngine(say(*tokens)), folder, stop="fox!") == ("the fox", "length", len(tokens))


def test_an_answer_without_text_still_ends(folder: Path) -> None:
    assert answer(FakeEngine(say(2, reason=FinishReason.STOP)), folder) == ("", "stop", 1)


def test_several_tokens_of_one_step_are_one_piece(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = tuple(ids(tokenizer, FOX))

    def at_once(submit: Any) -> list[TokenOutput]:
        return [TokenOutput(submit.request_id, tokens, FinishReason.LENGTH, cost())]

    assert answer(FakeEngine(at_once), folder) == (FOX, "length", len(tokens))


def test_what_was_asked_for_reaches_the_engine(folder: Path) -> None:
    engine = FakeEngine(say(5))
    asked = dict(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=-7,
        ignore_eos=True,
        stop_token_ids=[9],
        plan="dense",
        max_tokens=3,
    )
    post(engine, folder, TEXT, text_body(prompt=[7, 8], **asked))
    (submit,) = engine.submitted
    assert (submit.tokens, submit.prompt_length, submit.plan) == ((7, 8), 2, "dense")
    sampling = submit.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.9, 40)
    assert (sampling.seed, sampling.ignore_eos, sampling.stop_token_ids) == (-7, True, (9,))


def test_defaults_are_openais(folder: Path) -> None:
    engine = FakeEngine(say(5))
    post(engine, folder, CHAT, chat_body(top_k=-1, stop=None, user="me"))
    post(engine, folder, TEXT, text_body())
    post(engine, folder, CHAT, chat_body(max_completion_tokens=9))
    chat, text, limited = engine.submitted
    assert chat.sampling.max_tokens == CONTEXT - chat.prompt_length
    assert text.sampling.max_tokens == 16
    assert limited.sampling.max_tokens == 9
    assert (chat.plan, chat.sampling.temperature, chat.sampling.top_p, chat.sampling.top_k) == (
        "sparse",
        1,
        1,
        0,
    )
    assert chat.sampling.seed != text.sampling.seed >= 0  # drawn, so that a replay repeats it


def test_a_chat_is_rendered_with_its_template(folder: Path, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(say(5))
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    post(engine, folder, CHAT, chat_body(messages=messages))
    rendered = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
    rendered += "<|im_start|>assistant\n"
    assert list(engine.submitted[0].tokens) == ids(tokenizer, rendered)


def after_text(error: Exception) -> Script:
    return then(say(5, 6), error)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StepFailed("the step failed"), 500, "engine_error"),
        (EngineDead("the engine process ended"), 503, "engine_unavailable"),
        (RuntimeError("/secret/path"), 500, "internal_error"),
    ],
)
def test_an_engine_error_ends_a_request_once_in_the_envelope(
    folder: Path, error: Exception, status: int, code: str
) -> None:
    whole = post(FakeEngine(after_text(error)), folder, CHAT, chat_body())
    assert whole.status_code == status
    assert whole.json()["error"]["code"] == code
    assert "secret" not in whole.text
    assert ("retry-after" in whole.headers) == (status == 503)

    streamed = post(FakeEngine(after_text(error)), folder, CHAT, chat_body(stream=True))
    assert streamed.status_code == 200  # it was sent before the error came
    *chunks, last = events(streamed.text)
    assert last["error"]["code"] == code and last["error"]["type"] == "server_error"
    assert "secret" not in streamed.text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def test_models_says_how_long_a_context_is_and_which_plans_there_are(folder: Path) -> None:
    with http_server(FakeEngine(say(5)), folder) as url:
        listing = httpx.get(f"{url}/v1/models").json()
    assert listing["object"] == "list"
    (model,) = listing["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", CONTEXT)
    assert [(plan["name"], plan["default"]) for plan in model["plans"]] == [
        ("sparse", True),
        ("dense", False),
    ]
    assert model["plans"][0]["digest"] == "sparse-digest"


def test_readiness_follows_the_engine_and_life_does_not(folder: Path) -> None:
    engine = FakeEngine(say(5))
    with http_server(engine, folder) as url:
        assert [httpx.get(url + path).status_code for path in ("/readyz", "/health", "/livez")] == [200] * 3
        engine.is_ready = False
        loading = httpx.get(f"{url}/readyz")
        assert loading.status_code == 503 and "loading: weights, 25%" in loading.json()["error"]["message"]
        assert loading.json()["loading"] == {"phase": "weights", "fraction": 0.25, "reason": None}
        engine.death = "the engine process ended with code -9"
        for path in ("/readyz", "/health"):
            dead = httpx.get(url + path)
            assert dead.status_code == 503 and "code -9" in dead.json()["error"]["message"]
        assert httpx.get(f"{url}/livez").status_code == 200
        for stream in (False, True):
            refused = httpx.post(url + CHAT, json=chat_body(stream=stream))
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "engine_unavailable"


def test_the_openai_client_works_unchanged(folder: Path, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(say(*ids(tokenizer, FOX)))
    messages: Any = [{"role": "user", "content": "the fox"}]
    with (
        http_server(engine, folder) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client,
    ):
        assert [model.id for model in client.models.list()] == [MODEL]
        chat = client.chat.completions.create(model=MODEL, messages=messages, extra_body={"plan": "dense"})
        assert chat.choices[0].message.content == FOX
        assert chat.usage is not None and chat.usage.prompt_tokens_details is not None
        assert chat.model_extra is not None and chat.model_extra["farspan"]["attention_recall"] == 0.97
        assert engine.submitted[-1].plan == "dense"

        reply: Any = chat.choices[0].message.model_dump()
        again = client.chat.completions.create(model=MODEL, messages=[*messages, reply, *messages])
        assert again.choices[0].finish_reason == "length"

        with client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == FOX
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 0
        assert client.completions.create(model=MODEL, prompt="the fox").choices[0].text == FOX

        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(model=MODEL, messages=messages, max_tokens=CONTEXT)
        assert refusal.value.code == "context_length_exceeded" and refusal.value.param == "messages"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="other", messages=messages)
        assert unknown.value.code == "model_not_found"
        engine.script = after_text(StepFailed("the step failed"))
        with pytest.raises(openai.APIError, match="the step failed"):
            list(client.chat.completions.create(model=MODEL, messages=messages, stream=True))
