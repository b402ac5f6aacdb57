"""`farspan plan check` says what /metrics of a server will show: the bytes of sequences that answer."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from server.cli import app
from server.shadowing import ROOT
from tests.server.builders import PATIENCE, save_tokenizer
from tests.tiny import make_prompt, save_tiny

PLANS: dict[str, dict[str, Any]] = {
    "everything": {"kv": {"policy": "keep_all"}},
    "compressed": {"kv": {"policy": "snapkv", "budget": 512}},
}
# The last tokens of an answer fall in one page for long enough to be seen: 20 pages a row in the end, and 12.
PROMPT, ANSWER, AT_ONCE = 1000, 255, 3


def forecast(name: str) -> dict[str, Any]:
    """What plan check says of one prompt length."""
    lengths = ("--prompt", f"{PROMPT}", "--answer", f"{ANSWER}", "--concurrency", f"{AT_ONCE}")
    arguments = [
        "plan",
        "check",
        f"{name}.yaml",
        "--model",
        "./tiny",
        *lengths,
        "--dtype",
        "float32",
        "--json",
    ]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    (memory,) = json.loads(ran.stdout)["memory"]
    return dict(memory)


def scrape(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=PATIENCE).text)
    samples = (sample for family in families for sample in family.samples)
    return {sample.name.partition(":")[2]: sample.value for sample in samples}


def most_held(url: str, plan: str) -> float:
    """The most that /metrics shows of so many requests that answer at once, asked until all have ended."""
    most = 0.0
    with ThreadPoolExecutor(AT_ONCE) as clients:
        body = {"model": "tiny", "plan": plan, "max_tokens": ANSWER, "ignore_eos": True}
        asked = [
            clients.submit(
                httpx.post,
                f"{url}/v1/completions",
                json=body | {"prompt": make_prompt(PROMPT, seed=seed)},
                timeout=4 * PATIENCE,
            )
            for seed in range(AT_ONCE)
        ]
        while not all(one.done() for one in asked):
            shown = scrape(url)
            if shown["num_requests_running"] == AT_ONCE:
                most = max(most, shown["kv_cache_bytes"])
            time.sleep(0.01)  # the engine wants this core
        for one in asked:
            assert one.result().json()["usage"]["completion_tokens"] == ANSWER, one.result().text
    return most


def test_plan_check_predicts_what_metrics_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_tiny(tmp_path / "tiny"))
    for name, content in PLANS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    plans = [word for name in PLANS for word in ("--plan", f"{name}.yaml")]
    flags = ("--port", "0", "--threads", "1", "--kv-cache-memory-bytes", "64MiB", "--dtype", "float32")
    serving = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "./tiny", *plans, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serving.stdout is not None
    with serving, serving.stdout as output:
        try:
            ready = re.match(r"farspan ready: (http://\S+)/v1 ", output.readline())
            assert ready
            for name in PLANS:
                told = forecast(name)
                held = most_held(ready[1], name)
                assert told["answering_bytes"][str(AT_ONCE)] == pytest.approx(held, rel=0.05), name
                assert AT_ONCE * told["computing_bytes"] >= held, name
        finally:
            serving.kill()
