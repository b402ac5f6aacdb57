"""A real server: `farspan serve` in a process of its own, and the few HTTP calls that benchmarks make."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.common import CannotRun
from benchmarks.parts import ROOT

READY = re.compile(
    r"farspan ready: (?P<url>http://\S+)/v1  model=(?P<model>\S+) .*pages=(?P<pages>\d+)×(?P<page_bytes>\d+)B"
    r" (?P<dtype>\w+)/"
)
PATIENCE = 3600  # seconds: a long prompt under load is slow, not lost
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """Where a server listens, and what it is called there."""

    url: str  # without /v1
    model: str

    @classmethod
    def at(cls, url: str) -> "Server":
        """A server that somebody else started."""
        url = url.rstrip("/").removesuffix("/v1")
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
                return cls(url, json.load(reply)["data"][0]["id"])
        except OSError as error:
            raise CannotRun(f"{url}: no server answers ({error})") from error

    def complete(
        self, prompt: Sequence[int], plan: str | None, max_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """POST /v1/completions; returns the whole reply when it has come."""
        with self._post(prompt, plan, max_tokens, stream=False, **options) as reply:
            content: dict[str, Any] = json.load(reply)
        assert content["usage"]["completion_tokens"] == max_tokens, content["usage"]
        return content

    @contextmanager
    def streaming(self, prompt: Sequence[int], plan: str, max_tokens: int) -> Iterator[Iterator[str]]:
        """An open stream, as its pieces of text. Leaving the block hangs up, and so ends the request."""

        def pieces() -> Iterator[str]:
            for line in reply:
                data = line.decode().strip().removeprefix("data: ")
                if data.startswith("{"):
                    event = json.loads(data)
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    yield event["choices"][0]["text"]

        with self._post(prompt, plan, max_tokens, stream=True) as reply:
            yield pieces()

    def metrics(self) -> dict[str, float]:
        """GET /metrics: value by series, "farspan:kv_pages{private}" where a state tells two apart."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as reply:
            lines = reply.read().decode().splitlines()
        found = {}
        for line in lines:
            match = re.fullmatch(r"(farspan:\w+)\{([^}]*)\} (\S+)", line)
            if match and "le=" not in match[2]:
                state = re.search(r'state="(\w+)"', match[2])
                found[f"{match[1]}{{{state[1]}}}" if state else match[1]] = float(match[3])
        return found

    def _post(
        self, prompt: Sequence[int], plan: str | None, max_tokens: int, stream: bool, **options: Any
    ) -> Any:
        body = {
            **options,
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **({} if plan is None else {"plan": plan}),
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=PATIENCE)


@dataclass(frozen=True)
class Served(Server):
    """A server that this benchmark started, with the size of its cache."""

    num_pages: int
    page_bytes: int
    dtype: str


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """`farspan serve ARGUMENTS` on a free port, from its ready line to SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", *arguments, "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            ready = next((match for line in process.stdout if (match := READY.match(line))), None)
            if ready is None:
                raise CannotRun(f"farspan serve ended with code {process.wait()} before it was ready")
            yield Served(
                ready["url"],
                ready["model"],
                num_pages=int(ready["pages"]),
                page_bytes=int(ready["page_bytes"]),
                dtype=ready["dtype"],
            )
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # our own child; its engine notices that it is an orphan
