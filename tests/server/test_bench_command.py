"""`farspan bench` and `farspan env`: figures that add up, exit codes, nothing heavy loaded."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from engine.errors import StepFailed
from server.cli import app
from server.commands.bench import spread
from server.shadowing import ROOT
from tests.server.builders import FakeEngine, http_server, say, then


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(say(70, 71, 72))


@pytest.fixture(scope="module")
def url(engine: FakeEngine, folder: Path) -> Iterator[str]:
    with http_server(engine, folder) as address:
        yield address


@pytest.fixture(autouse=True)
def begin(engine: FakeEngine) -> None:
    engine.script = say(70, 71, 72)
    engine.submitted.clear()


def farspan(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="farspan")


def test_bench_sends_different_prompts_of_the_asked_length_and_counts_them(
    url: str, engine: FakeEngine
) -> None:
    load = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "100", "--output-tokens", "3")
    ended = farspan("bench", "--url", url, *load, "--plan", "dense", "--json")
    assert ended.exit_code == 0, ended.output
    assert {submit.prompt_length for submit in engine.submitted} == {100}
    assert len({submit.tokens for submit in engine.submitted}) == 6
    assert {
        (submit.plan, submit.sampling.max_tokens, submit.sampling.ignore_eos) for submit in engine.submitted
    } == {("dense", 3, True)}
    figures = json.loads(ended.stdout)
    assert figures["requests"] == 6 and figures["failed"] == 0 and figures["plan"] == "dense"
    assert figures["output_tokens_per_second"] == pytest.approx(6 * 3 / figures["seconds"])
    assert figures["prompt_tokens_per_second"] == pytest.approx(6 * 100 / figures["seconds"])
    assert figures["read_fraction"] == 0.25 and figures["kept_fraction"] == 0.5
    first, whole = figures["first_token_seconds"], figures["request_seconds"]
    assert 0 < first["p50"] <= first["p90"] <= first["p99"] <= whole["p99"] <= figures["seconds"]
    again = farspan("bench", "--url", url, *load)
    assert "to the first token" in again.stdout and "6 requests in" in again.stdout
    assert {submit.tokens for submit in engine.submitted[6:]} == {
        submit.tokens for submit in engine.submitted[:6]
    }


def test_bench_says_how_many_failed_and_exits_with_1(url: str, engine: FakeEngine) -> None:
    engine.script = then(say(70), StepFailed("no luck"))
    ended = farspan("bench", "--url", url, "--requests", "2", "--prompt-tokens", "10")
    assert (
        ended.exit_code == 1 and "2 of 2 requests failed; the first: the server says: no luck" in ended.stderr
    )
    assert farspan("bench", "--url", "http://127.0.0.1:1").exit_code == 3


def test_percentiles_are_values_that_were_measured() -> None:
    assert spread([]) is None
    assert spread([3.0]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert spread([float(value) for value in range(1, 101)]) == {
        "mean": 50.5,
        "p50": 50,
        "p90": 90,
        "p99": 99,
    }


def test_env_tells_versions_and_folders_without_loading_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cpu_decode-0123.so").write_bytes(b"12345")
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path))
    code = (
        "import json, sys\n"
        "from server.commands.env import environment\n"
        "print(json.dumps(environment()))\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    assert found["packages"]["torch"] and found["packages"]["transformers"]
    assert found["kernels"]["compiled"] == {"cpu_decode": 1}
    assert found["folders"]["FARSPAN_CACHE"] == {"path": str(tmp_path), "bytes": 5}
    shown = farspan("env")
    assert shown.exit_code == 0 and "cpu_decode: 1" in shown.stdout
    assert json.loads(farspan("env", "--json").stdout).keys() == found.keys()
