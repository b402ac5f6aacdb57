"""What /metrics shows is what happened, under the names that dashboards know."""

from pathlib import Path

import httpx
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import StepFailed
from engine.messages import Outputs, Stats
from server.metrics import Metrics
from tests.server.builders import (
    MODEL,
    PATIENCE,
    FakeEngine,
    chat_body,
    http_server,
    say,
    then,
)

CHAT = "/v1/chat/completions"


def samples(text: str) -> dict[str, float]:
    """Values by name and labels, without the model's name, which all have."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == MODEL
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_levels_are_the_engines(folder: Path) -> None:
    with http_server(FakeEngine(say(5)), folder) as url:
        response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"] == CONTENT_TYPE_LATEST
    found = samples(response.text)
    assert found["farspan:num_requests_running"] == 2
    assert found["farspan:num_requests_waiting"] == 1
    assert found["farspan:kv_cache_usage_perc"] == 0.3
    assert found["farspan:kv_cache_bytes"] == 1920
    states = {"free": 60, "cached": 10, "borrowed": 5, "private": 25}
    assert {state: found[f"farspan:kv_pages{{state={state}}}"] for state in states} == states


def test_requests_are_counted_once_each_by_how_they_ended(folder: Path) -> None:
    engine = FakeEngine(say(5, 6, 7))
    with http_server(engine, folder, sse_keep_alive_interval=0.01) as url:
        httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE)
        httpx.post(url + CHAT, json=chat_body(stream=True, plan="dense"), timeout=PATIENCE)
        httpx.post(url + CHAT, json=chat_body(temperature=9), timeout=PATIENCE)  # refused: never a request
        engine.script = then(say(5), StepFailed("no"))
        httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE)
        engine.script = then(say(5), None)
        with httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=PATIENCE) as response:
            next(response.iter_bytes())
        assert engine.abort_heard.wait(PATIENCE)
        found = samples(httpx.get(f"{url}/metrics").text)
    reasons = {
        reason: found[f"farspan:request_success_total{{finished_reason={reason}}}"]
        for reason in ("length", "error", "abort")
    }
    assert reasons == {"length": 2, "error": 1, "abort": 1}
    assert found["farspan:requests_total{plan=sparse}"] == 3
    assert found["farspan:requests_total{plan=dense}"] == 1
    for name, count in {
        "time_to_first_token_seconds": 4,
        "inter_token_latency_seconds": 4,
        "e2e_request_latency_seconds": 4,
        "request_queue_time_seconds": 4,
        "request_prefill_time_seconds": 4,
        "request_prompt_tokens": 4,
        "request_generation_tokens": 4,
        "prefill_read_fraction": 4,
        "kept_fraction": 4,
        "attention_recall": 4,
    }.items():
        assert found[f"farspan:{name}_count"] == count, name
    assert found["farspan:request_generation_tokens_sum"] == 3 + 3 + 1 + 1
    assert found["farspan:request_queue_time_seconds_sum"] == 4 * 0.5
    assert found["farspan:request_prefill_time_seconds_sum"] == 4 * 2.0
    assert found["farspan:prefill_read_fraction_sum"] == 4 * 0.25
    assert found["farspan:kept_fraction_sum"] == 4 * 0.5


def test_tokens_and_steps_are_counted_as_the_engine_says() -> None:
    engine = FakeEngine(say(5))
    metrics = Metrics(MODEL, engine)
    engine.stats = Stats(steps=1, step_tokens=40, prompt_tokens=40, generation_tokens=1)
    metrics.on_step(Outputs((), engine.stats))
    metrics.on_step(Outputs((), engine.stats))  # an abort between two steps
    engine.stats = Stats(steps=2, step_tokens=1, prompt_tokens=40, generation_tokens=2)
    metrics.on_step(Outputs((), engine.stats))
    found = samples(metrics.exposition().decode())
    assert found["farspan:prompt_tokens_total"] == 40
    assert found["farspan:generation_tokens_total"] == 2
    assert found["farspan:iteration_tokens_total_count"] == 2
    assert found["farspan:iteration_tokens_total_sum"] == 41


@pytest.mark.parametrize(
    ("name", "seconds"), [("time_to_first_token_seconds", 2560), ("request_prefill_time_seconds", 7680)]
)
def test_buckets_reach_as_far_as_long_prompts_take(name: str, seconds: int) -> None:
    found = samples(Metrics(MODEL, FakeEngine(say(5))).exposition().decode())
    assert f"farspan:{name}_bucket{{le={float(seconds)}}}" in found


def test_two_servers_in_one_process_do_not_mix(folder: Path) -> None:
    with http_server(FakeEngine(say(5)), folder) as one, http_server(FakeEngine(say(5)), folder) as other:
        httpx.post(one + CHAT, json=chat_body(), timeout=PATIENCE)
        assert "farspan:requests_total{plan=sparse}" not in samples(httpx.get(f"{other}/metrics").text)
