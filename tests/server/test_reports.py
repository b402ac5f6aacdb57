"""What a request may ask to be told beside its answer: progress of the prompt, costs by head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.messages import FinishReason, HeadCosts, Reports, Submit, TokenOutput
from tests.server.builders import (
    PATIENCE,
    FakeEngine,
    Step,
    chat_body,
    cost,
    events,
    http_server,
    text_body,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEADS = HeadCosts(((0.5, 1.0), (0.25, 0.75)), ((20, 8), (8, 4)))


def slow_prompt(submit: Submit) -> Sequence[Step]:
    """Two chunks of the prompt, then the answer."""
    steps: list[Step] = [TokenOutput(submit.request_id, computed=part) for part in (2, 4)]
    if not submit.reports.progress:
        steps.clear()
    asked = cost(heads=HEADS) if submit.reports.per_head else cost()
    return [
        *steps,
        TokenOutput(submit.request_id, (70,), cost=asked),
        TokenOutput(submit.request_id, (71,), finish_reason=FinishReason.LENGTH),
    ]


@pytest.fixture(scope="module")
def server(folder: Path) -> Any:
    engine = FakeEngine(slow_prompt)
    with http_server(engine, folder) as url:
        yield engine, url


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (TEXT, text_body())])
def test_progress_comes_as_chunks_without_choices_before_the_answer(
    server: Any, path: str, body: dict[str, Any]
) -> None:
    engine, url = server
    asked = body | {"stream": True, "farspan": {"progress": True}, "stream_options": {"include_usage": True}}
    chunks = events(httpx.post(url + path, json=asked, timeout=PATIENCE).text)
    length = engine.submitted[-1].prompt_length
    progress = [chunk["farspan"]["progress"] for chunk in chunks[:2]]
    assert progress == [
        {"prompt_tokens_computed": 2, "prompt_tokens": length},
        {"prompt_tokens_computed": 4, "prompt_tokens": length},
    ]
    assert all(chunk["choices"] == [] and chunk["usage"] is None for chunk in chunks[:2])
    assert all(chunk["id"] == chunks[-1]["id"] for chunk in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    quiet = events(httpx.post(url + path, json=body | {"stream": True}, timeout=PATIENCE).text)
    assert engine.submitted[-1].reports == Reports()
    assert all(chunk["choices"] for chunk in quiet)


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (TEXT, text_body())])
def test_costs_by_head_come_where_they_are_asked_for(server: Any, path: str, body: dict[str, Any]) -> None:
    _, url = server
    asked = body | {"farspan": {"per_head": True}}
    whole = httpx.post(url + path, json=asked, timeout=PATIENCE).json()
    expected = {
        "prefill_read_fraction": [[0.5, 1.0], [0.25, 0.75]],
        "kv_tokens_kept": [[20, 8], [8, 4]],
    }
    assert whole["farspan"]["per_head"] == expected
    *_, last = events(httpx.post(url + path, json=asked | {"stream": True}, timeout=PATIENCE).text)
    assert last["farspan"]["per_head"] == expected
    unasked = httpx.post(url + path, json=body, timeout=PATIENCE).json()
    assert "per_head" not in unasked["farspan"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"progress": True}, None),
        ({"per_head": 1}, "farspan.per_head"),
        ({"per_heads": True}, "farspan.per_heads"),
        (True, "farspan"),
    ],
)
def test_what_makes_no_sense_is_refused(server: Any, asked: Any, param: str | None) -> None:
    _, url = server
    refused = httpx.post(url + CHAT, json=chat_body(farspan=asked), timeout=PATIENCE)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


def test_the_engine_of_this_moment_is_told_as_json(server: Any) -> None:
    engine, url = server
    stats = httpx.get(f"{url}/stats", timeout=PATIENCE).json()
    assert (stats["running"], stats["waiting"]) == (2, 1)
    pages = [stats[f"pages_{state}"] for state in ("free", "cached", "borrowed", "private")]
    assert sum(pages) == stats["num_pages"] == engine.card.num_pages
    assert stats["page_bytes"] == engine.card.page_bytes
