"""A whole server as users start it: ready line, answers, and an end that leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.shadowing import ROOT
from tests.server.builders import PATIENCE, events, save_tokenizer, until
from tests.tiny import make_prompt, save_tiny

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the quick brown fox " * 20}]
READY = re.compile(
    r"farspan ready: (http://127\.0\.0\.1:\d+)/v1  model=tiny plan=dense \(others: short\)"
    r" context=512 pages=\d+×\d+B float32/cpu\n"
)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    url: str

    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, vocab_size=300, max_position_embeddings=512)
    return save_tokenizer(folder)


@contextmanager
def started(model: Path, folder: Path, *more: str) -> Iterator[Server]:
    """`farspan serve`, from another folder, until its ready line; killed at the end if it still runs."""
    (folder / "short.yaml").write_text("kv: {policy: snapkv, budget: 64}\n")
    arguments = [
        "--port",
        "0",
        "--plan",
        "dense",
        "--plan",
        "short.yaml",
        "--kv-cache-memory-bytes",
        "16MiB",
        "--dtype",
        "float32",
    ]
    arguments += more
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", str(model), *arguments, "--threads", "1"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout as output:
        try:
            line = output.readline()
            match = READY.fullmatch(line)
            assert match, line
            yield Server(process, match[1])
        finally:
            process.kill()


def ask(server: Server, **changes: object) -> httpx.Response:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **changes}
    return httpx.post(server.url + CHAT, json=body, timeout=PATIENCE)


def assert_log_likelihoods_are_huggingfaces(server: Server, model: Path) -> None:
    """What lm-eval's local-completions sends for a context and its continuation, and what it reads."""
    tokens, context = list(make_prompt(150, seed=3)), 120
    asked = {
        "model": "tiny",
        "prompt": [tokens],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
    }
    reply = httpx.post(f"{server.url}/v1/completions", json={**asked, "echo": True}, timeout=PATIENCE).json()
    (choice,) = sorted(reply["choices"], key=lambda choice: choice["index"])
    found = choice["logprobs"]["token_logprobs"][context:-1]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(
            torch.tensor([tokens])
        ).logits
    logprobs = logits[0, context - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(tokens[context:])[:, None])[:, 0]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][context:-1]]
    assert best == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-3)


def test_a_server_starts_answers_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path) as server:
        whole = ask(server).json()
        assert whole["farspan"]["kv_tokens_kept"] == whole["usage"]["prompt_tokens"] > 64
        *_, last = events(ask(server, stream=True).text)
        assert last["farspan"]["plan"] == "dense"
        short = ask(server, plan="short").json()
        assert short["farspan"]["plan"] == "short" and short["farspan"]["kv_tokens_kept"] == 64
        exact = ask(server, structured_outputs={"regex": "[a-c]{5}"}, logprobs=True).json()["choices"][0]
        assert re.fullmatch("[a-c]{5}", exact["message"]["content"]) and exact["finish_reason"] == "stop"
        assert len(exact["logprobs"]["content"]) == 6  # with the end
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert "farspan:kv_cache_bytes" in httpx.get(f"{server.url}/metrics").text
        assert_log_likelihoods_are_huggingfaces(server, model)

        engine = server.engine()
        own = psutil.Process(server.process.pid).net_connections() + engine.net_connections()
        listening = [one.laddr for one in own if one.status == psutil.CONN_LISTEN]
        assert [(one.ip, one.port) for one in listening] == [("127.0.0.1", int(server.url.split(":")[-1]))]
        body = {"model": "tiny", "messages": MESSAGES, "stream": True, "ignore_eos": True, "max_tokens": 400}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=PATIENCE) as response:
            parts = response.iter_text()
            text = next(parts)
            server.process.terminate()
            until(lambda: refuses_connections(server.url))
            text += "".join(parts)
        assert events(text)[-1]["choices"][0]["finish_reason"] == "length", "it was cut off"
        assert server.process.wait(PATIENCE) == 0
        assert not engine.is_running()
        assert [path.name for path in tmp_path.iterdir()] == ["short.yaml"]


def test_a_stream_survives_its_engine_and_a_server_whose_engine_dies_too_often_says_so(
    model: Path, tmp_path: Path
) -> None:
    with started(model, tmp_path, "--engine-restarts", "1") as server:
        undisturbed = ask(server, ignore_eos=True, max_tokens=200).json()["choices"][0]["message"]["content"]
        body = {"model": "tiny", "messages": MESSAGES, "stream": True, "ignore_eos": True, "temperature": 0}
        request = {"url": server.url + CHAT, "json": body | {"max_tokens": 200}, "timeout": 4 * PATIENCE}
        with httpx.stream("POST", **request) as response:  # type: ignore[arg-type]
            parts = response.iter_text()
            text = next(parts)
            server.engine().kill()
            until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
            loading = httpx.get(f"{server.url}/readyz").json()
            assert loading["loading"]["reason"] == "the engine process ended with code -9"
            text += "".join(parts)
        replies = events(text)
        assert "".join(reply["choices"][0]["delta"].get("content", "") for reply in replies) == undisturbed
        assert replies[-1]["farspan"]["plan"] == "dense"
        assert "farspan:requests_replayed_total" in httpx.get(f"{server.url}/metrics").text

        with httpx.stream("POST", **request) as response:  # type: ignore[arg-type]
            parts = response.iter_text()
            text = next(parts)
            server.engine().kill()
            text += "".join(parts)
        assert events(text)[-1]["error"]["code"] == "engine_unavailable"
        assert "died 2 times" in httpx.get(f"{server.url}/readyz").json()["error"]["message"]
        refused = ask(server)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0


def refuses_connections(url: str) -> bool:
    try:
        httpx.get(f"{url}/readyz", timeout=PATIENCE)
    except httpx.ConnectError:
        return True
    return False


def refused(*arguments: str) -> str:
    """What `farspan serve` says on standard error, having ended with code 2 and no ready line."""
    ended = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", *arguments, "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
    )
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    return ended.stderr


def test_a_model_that_cannot_be_served_is_refused_before_the_server_is_ready(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "odd" / "model.safetensors").touch()
    assert "mamba" in refused(str(tmp_path / "odd"))


def test_a_cache_that_is_too_small_is_refused_once_the_model_is_loaded(model: Path) -> None:
    message = refused(str(model), "--kv-cache-memory-bytes", "64KiB", "--plan", "dense")
    assert "cache.kv_cache_memory_bytes" in message and "too few" in message
