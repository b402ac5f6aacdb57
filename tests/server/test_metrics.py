"""What /metrics shows is what happened, under the names that dashboards know."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import StepFailed
from engine.messages import FinishReason, LayerRun, Outputs, Sampling, Stats, Submit, TokenOutput
from server.metrics import Metrics
from server.prepare import Job
from server.series import OF_VLLM
from tests.server.builders import (
    MODEL,
    PATIENCE,
    FakeEngine,
    Script,
    chat_body,
    cost,
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
    assert found["farspan:engine_restarts_total"] == 2
    assert found["farspan:requests_replayed_total"] == 5
    states = {"free": 60, "cached": 10, "borrowed": 5, "private": 25}
    assert {state: found[f"farspan:kv_pages{{state={state}}}"] for state in states} == states


def test_swaps_are_the_engines(folder: Path) -> None:
    engine = FakeEngine(say(5))
    engine.stats = Stats(swapped=1, swaps_out=4, swaps_in=3, pages_host=7, host_hits=640)
    with http_server(engine, folder) as url:
        found = samples(httpx.get(f"{url}/metrics").text)
    assert (found["farspan:num_requests_swapped"], found["farspan:host_pages"]) == (1, 7)
    assert found["farspan:host_cache_hits_total"] == 640
    assert [found[f"farspan:swaps_total{{direction={way}}}"] for way in ("out", "in")] == [4, 3]


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


def test_names_that_vllm_has_take_its_prefix_and_ours_stay() -> None:
    engine = FakeEngine(say(5))
    found = samples(Metrics(MODEL, engine, "vllm").exposition().decode())
    for name in ("num_requests_running", "time_to_first_token_seconds_count", "prompt_tokens_total"):
        assert f"vllm:{name}" in found
    assert "farspan:prefill_read_fraction_count" in found and "farspan:kv_cache_bytes" in found
    exposed = {family.name for family in Metrics(MODEL, engine, "vllm").registry.collect()}
    assert {f"vllm:{name}" for name in OF_VLLM} == {name for name in exposed if name.startswith("vllm:")}


def test_steps_with_prompts_are_told_apart_by_context() -> None:
    engine = FakeEngine(say(5))
    metrics = Metrics(MODEL, engine)
    for step, context in enumerate((1, 1024, 1025, 70_000, 2_000_000, 0), start=1):
        metrics.on_step(Outputs((), Stats(steps=step, step_seconds=2.0, step_context=context)))
    found = samples(metrics.exposition().decode())
    counts = {
        label: found[f"farspan:prefill_chunk_seconds_count{{context={label}}}"]
        for label in ("1024", "4096", "262144", "more")
    }
    assert counts == {"1024": 2, "4096": 1, "262144": 1, "more": 1}
    assert found["farspan:prefill_chunk_seconds_sum{context=1024}"] == 4.0


def test_prompts_that_a_sparse_plan_read_densely_are_counted_by_reason(folder: Path) -> None:
    engine = FakeEngine(say(5))
    sparse, dense = engine.card.plans
    everywhere = msgspec.structs.replace(dense, layers=(LayerRun(0, 3, "dense", {}),), dense_below=100)
    engine.card = msgspec.structs.replace(engine.card, plans=(sparse, everywhere))

    def costs(**changes: Any) -> Script:
        return lambda submit: [TokenOutput(submit.request_id, (5,), FinishReason.STOP, cost(**changes))]

    with http_server(engine, folder) as url:

        def ask(plan: str, **changes: Any) -> None:
            engine.script = costs(**changes)
            httpx.post(url + CHAT, json=chat_body(plan=plan), timeout=PATIENCE)

        ask("sparse")
        ask("sparse", floored_chunks=2)
        engine.card = msgspec.structs.replace(
            engine.card, plans=(msgspec.structs.replace(sparse, dense_below=21), everywhere)
        )
        ask("sparse")
        ask("dense")
        found = samples(httpx.get(f"{url}/metrics").text)
    assert found["farspan:dense_fallbacks_total{reason=recall_floor}"] == 1
    assert found["farspan:dense_fallbacks_total{reason=short_prompt}"] == 1
    assert found["farspan:attention_recall_p5_sum"] == pytest.approx(4 * 0.9)


def test_refusals_for_lack_of_room_are_counted_by_reason(folder: Path) -> None:
    engine = FakeEngine(then(say(5), None))
    with http_server(engine, folder, max_open_requests=1, sse_keep_alive_interval=0.01) as url:
        with httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=PATIENCE) as response:
            parts = response.iter_bytes()  # dropped, it would hang up
            next(parts)
            assert httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE).status_code == 503
        assert engine.abort_heard.wait(PATIENCE)
        found = samples(httpx.get(f"{url}/metrics").text)
    assert found["farspan:admission_rejections_total{reason=open_requests}"] >= 1


def test_times_between_tokens_are_those_of_each_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = FakeEngine(say(5)), 0.0
    monkeypatch.setattr("server.meter.time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    submit = Submit("a", (1, 2), 2, "sparse", Sampling(max_tokens=9), choices=2)
    metrics = Metrics(MODEL, engine)
    meter = metrics.open(Job(submit, (), engine.card.plans[0], arrived=0.0))
    for now in (1.0, 2.0, 3.0):  # noqa: B007  the clock reads it
        for choice in range(2):
            meter.tokens(1, None, choice)
    now = 9.0
    meter.tokens(2, None, 1)
    meter.close(FinishReason.LENGTH)
    found = samples(metrics.exposition().decode())
    assert found["farspan:time_to_first_token_seconds_sum"] == 1.0
    assert found["farspan:inter_token_latency_seconds_count"] == 6
    assert found["farspan:inter_token_latency_seconds_sum"] == 2 + 2 + 6
    assert found["farspan:request_time_per_output_token_seconds_sum"] == pytest.approx(10 / 6)
    assert found["farspan:request_decode_time_seconds_sum"] == 8.0
    assert found["farspan:request_generation_tokens_sum"] == 8


def test_the_times_of_a_request_add_up(folder: Path) -> None:
    with http_server(FakeEngine(say(5, 6, 7)), folder) as url:
        httpx.post(url + CHAT, json=chat_body(max_tokens=9), timeout=PATIENCE)
        found = samples(httpx.get(f"{url}/metrics").text)
    decoding = found["farspan:request_decode_time_seconds_sum"]
    assert found["farspan:request_time_per_output_token_seconds_sum"] == pytest.approx(decoding / 2)
    assert found["farspan:request_inference_time_seconds_sum"] == pytest.approx(decoding + 2.0)
    assert found["farspan:inter_token_latency_seconds_sum"] == pytest.approx(decoding)
    assert found["farspan:request_prefill_kv_computed_tokens_sum"] == 20 - 4
    assert found["farspan:request_params_n_sum"] == 1 and found["farspan:request_params_max_tokens_sum"] == 9
