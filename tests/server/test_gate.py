"""Nobody passes without a key where there are keys, nothing is unbounded, and every reply has a name."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.errors import ConfigError
from configs.schema import ServeConfig, ServerConfig
from engine.messages import Submit
from server.auth import ENVIRONMENT, Keys
from server.gate import MAX_HEADER_BYTES, MAX_HEADERS
from server.http import MAX_HEAD_BYTES
from tests.server.builders import (
    CONTEXT,
    PATIENCE,
    FakeEngine,
    Step,
    chat_body,
    events,
    http_server,
    say,
    text_body,
    then,
    until,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY, OTHER = "Key-of-one", "key-of-another"


def with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[str]:
    """A server with two keys; its URL."""
    with http_server(FakeEngine(say(5)), folder, api_keys=(KEY, OTHER), max_requests_per_key=2) as url:
        yield url


@pytest.fixture(scope="module")
def open_server(folder: Path) -> Iterator[str]:
    with http_server(FakeEngine(say(5)), folder) as url:
        yield url


PATHS = [
    *("/v1/models", "/v1/models/tiny", "/metrics", CHAT, TEXT, "/stats", "/v1", "//v1/models", "/v1/models/"),
    *(
        "/livez/",
        "/LIVEZ",
        "//livez",
        "/livez/../v1/models",
        "/docs/",
        "/redoc",
        "/nowhere",
        "/%6civez/x",
        "/page",
        "/page/",
        "/page/index.html",
        "/page/../metrics",
        "/index.html",
    ),
]
WRONG: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "another key": [("authorization", "Bearer no")],
    "other letters": [("authorization", f"Bearer {KEY.upper()}")],
    "the beginning of it": [("authorization", f"Bearer {KEY[:-1]}")],
    "more than it": [("authorization", f"Bearer {KEY}x")],
    "no scheme": [("authorization", KEY)],
    "another scheme": [("authorization", f"Basic {KEY}")],
    "an empty key": [("authorization", "Bearer")],
    "two keys": [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer no")],
    "another host": [("host", "localhost"), ("x-forwarded-prefix", "/livez")],
    "another header": [("x-api-key", KEY)],
}


@pytest.mark.parametrize("case", WRONG)
def test_no_route_opens_without_a_key(locked: str, case: str) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
        for path in PATHS:
            for method in ("GET", "POST", "OPTIONS"):
                request = client.build_request(method, locked, headers=WRONG[case])
                request.url = request.url.copy_with(raw_path=path.encode())
                response = client.send(request)
                assert response.status_code == 401, (method, path)
                error = response.json()["error"]
                assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-should-retry"] == "false"
                assert KEY not in response.text


def test_health_needs_no_key_and_everything_else_opens_with_one(locked: str) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.get(locked + path).status_code == 200
    for key in (KEY, OTHER):
        assert httpx.get(f"{locked}/v1/models", headers=with_key(key)).status_code == 200
        assert httpx.get(f"{locked}/metrics", headers=with_key(key)).status_code == 200
        assert httpx.post(locked + CHAT, json=chat_body(), headers=with_key(key)).status_code == 200
        assert httpx.get(f"{locked}/nowhere", headers=with_key(key)).status_code == 404
    lower = {"Authorization": f"bearer {KEY}"}
    assert httpx.get(f"{locked}/v1/models", headers=lower).status_code == 200


def test_keys_come_from_flags_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n from-file \nanother\n")
    monkeypatch.setenv(ENVIRONMENT, "from-env one-more")
    keys = Keys.of(ServerConfig(api_keys=("from-flag",), api_key_file=file))
    good = ("from-flag", "from-file", "another", "from-env", "one-more")
    owners = {keys.owner(f"Bearer {key}") for key in good}
    assert len(owners) == 5 and None not in owners
    assert keys.owner("Bearer # of the team") is None
    monkeypatch.delenv(ENVIRONMENT)
    assert not Keys.of(ServerConfig()).are_needed


@pytest.mark.parametrize(
    "config", [{"api_keys": ("",)}, {"api_keys": ("a b",)}, {"api_keys": ("ü",)}, {"max_requests_per_key": 1}]
)
def test_keys_that_cannot_be_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="server"):
        Keys.of(ServerConfig(**config))


def test_a_key_file_must_be_there_and_hold_a_key(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").write_text("# nothing\n")
        with pytest.raises(ConfigError, match="api_key_file"):
            Keys.of(ServerConfig(api_key_file=file))


def test_keys_stay_in_the_serving_process() -> None:
    config = ServeConfig(server=ServerConfig(api_keys=("secret",)))
    assert "secret" not in config.model_dump_json() and "secret" not in repr(config)


class Blocked:
    """An engine that begins an answer only when told to."""

    def __init__(self) -> None:
        self.engine = FakeEngine(self.script)
        self.begins = False

    def script(self, submit: Submit) -> list[Step]:
        return [*say(5)(submit)] if self.begins else [None]


def held(url: str, stop: threading.Event, **changes: Any) -> threading.Thread:
    """A request that stays open until `stop`."""

    def hold() -> None:
        headers = changes.pop("headers", {})
        body = text_body(stream=True, **changes)
        with httpx.stream("POST", url + TEXT, json=body, headers=headers, timeout=PATIENCE):
            stop.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    return thread


def test_a_key_has_its_share_and_others_theirs(folder: Path) -> None:
    blocked, stop = Blocked(), threading.Event()
    config = {"api_keys": (KEY, OTHER), "max_requests_per_key": 2}
    with http_server(blocked.engine, folder, **config) as url:
        threads = [held(url, stop, headers=with_key(KEY)) for _ in range(2)]
        until(lambda: len(blocked.engine.submitted) == 2)
        blocked.begins = True
        refused = httpx.post(url + TEXT, json=text_body(), headers=with_key(KEY))
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert "x-should-retry" not in refused.headers
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert httpx.post(url + TEXT, json=text_body(), headers=with_key(OTHER)).status_code == 200
        assert httpx.get(f"{url}/livez").status_code == 200
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        until(lambda: httpx.post(url + TEXT, json=text_body(), headers=with_key(KEY)).status_code == 200)


def test_waiting_prompts_are_bounded_by_their_tokens(folder: Path) -> None:
    blocked, stop = Blocked(), threading.Event()
    with http_server(blocked.engine, folder, max_queued_tokens=100) as url:
        threads = [held(url, stop, prompt=[5] * 60)]
        until(lambda: len(blocked.engine.submitted) == 1)
        for stream in (False, True):
            full = httpx.post(url + TEXT, json=text_body(prompt=[5] * 41, stream=stream))
            assert full.status_code == 503 and full.headers["retry-after"]
            assert full.json()["error"]["code"] == "overloaded"
            assert "x-should-retry" not in full.headers
        blocked.begins = True
        assert httpx.post(url + TEXT, json=text_body(prompt=[5] * 40)).status_code == 200
        stop.set()
        threads[0].join(PATIENCE)
        until(lambda: len(blocked.engine.aborted) == 1)
        # One alone is let in, however long.
        assert httpx.post(url + TEXT, json=text_body(prompt=[5] * 200)).status_code == 200
        assert CONTEXT > 200


def test_a_prompt_waits_no_more_when_its_answer_has_begun(folder: Path) -> None:
    stop = threading.Event()
    engine = FakeEngine(then(say(5), None))
    with http_server(engine, folder, max_queued_tokens=100) as url:
        thread = held(url, stop, prompt=[5] * 60)
        # Let in only if nothing waits any more; left at once.
        body = text_body(prompt=[5] * 60, stream=True)

        def is_let_in() -> bool:
            with httpx.stream("POST", url + TEXT, json=body, timeout=PATIENCE) as response:
                return response.status_code == 200

        until(lambda: len(engine.submitted) >= 1)
        until(is_let_in)
        assert engine.submitted[0].request_id not in engine.aborted, "the first had to leave for that"
        stop.set()
        thread.join(PATIENCE)


def test_keys_and_salts_share_no_prefixes_with_each_other(folder: Path) -> None:
    engine = FakeEngine(say(5))
    with http_server(engine, folder, api_keys=(KEY, OTHER)) as url:
        for key in (KEY, OTHER):
            for salt in (None, "mine", "mine"):
                response = httpx.post(url + TEXT, json=text_body(cache_salt=salt), headers=with_key(key))
                assert response.status_code == 200
    salts = [submit.cache_salt for submit in engine.submitted]
    assert salts[1] == salts[2] and salts[4] == salts[5]
    assert len(set(salts)) == 4 and "" not in salts and not any("mine" in salt for salt in salts)


def test_open_requests_are_bounded(folder: Path) -> None:
    blocked, stop = Blocked(), threading.Event()
    with http_server(blocked.engine, folder, max_open_requests=2) as url:
        threads = [held(url, stop) for _ in range(2)]
        until(lambda: len(blocked.engine.submitted) == 2)
        full = httpx.post(url + CHAT, json=chat_body())
        assert full.status_code == 503 and full.json()["error"]["code"] == "overloaded"
        assert httpx.get(f"{url}/readyz").status_code == 200
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


@pytest.mark.parametrize("path", ["/livez", "/v1/models", "/nowhere"])
def test_every_reply_carries_the_name_of_its_request(open_server: str, locked: str, path: str) -> None:
    for url in (open_server, locked):
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            for given in ("a-1._:/+=@", "x" * 128):
                response = client.get(path, headers={"x-request-id": given})
                assert response.headers["x-request-id"] == given
            drawn = {client.get(path).headers["x-request-id"] for _ in range(2)}
            assert len(drawn) == 2
            for odd in ("", "a b", "x" * 129, "a\tb", "<b>"):
                name = client.get(path, headers={"x-request-id": odd}).headers["x-request-id"]
                assert name != odd and name.isalnum()


def test_a_failure_of_ours_has_a_name_too(folder: Path) -> None:
    with http_server(FakeEngine(lambda submit: [RuntimeError("mine")]), folder) as url:
        failed = httpx.post(url + CHAT, json=chat_body(), headers={"x-request-id": "mine"})
        assert failed.status_code == 500 and failed.headers["x-request-id"] == "mine"
        streamed = httpx.post(url + CHAT, json=chat_body(stream=True), headers={"x-request-id": "mine"})
        assert streamed.headers["x-request-id"] == "mine" and events(streamed.text)


def test_too_many_or_too_long_headers_are_refused(open_server: str) -> None:
    many = {f"x-{number}": "a" for number in range(MAX_HEADERS + 1)}
    for headers in (many, {"x-long": "a" * (MAX_HEADER_BYTES + 1)}):
        response = httpx.get(f"{open_server}/livez", headers=headers)
        assert response.status_code == 431
        assert response.json()["error"]["code"] == "headers_too_large"
    assert httpx.get(f"{open_server}/livez").status_code == 200


def test_a_head_without_end_is_cut_off(open_server: str) -> None:
    host, port = open_server.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nx-long: ")
        with pytest.raises(OSError):  # the other end closes
            while sent < 100 * MAX_HEAD_BYTES:
                connection.sendall(b"a" * 4096)
                sent += 4096
    assert sent < 100 * MAX_HEAD_BYTES
    assert httpx.get(f"{open_server}/livez").status_code == 200


def test_a_large_body_is_no_large_head(open_server: str) -> None:
    body = text_body(prompt="x" * (4 * MAX_HEAD_BYTES))
    assert httpx.post(open_server + TEXT, json=body).status_code == 400  # too long a prompt, and nothing else
    chunks = (b" " * 8192 for _ in range(3 * MAX_HEAD_BYTES // 8192))
    response = httpx.post(open_server + TEXT, content=chunks, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


def test_other_sites_are_allowed_nothing(open_server: str) -> None:
    headers = {"origin": "https://example.com", "access-control-request-method": "POST"}
    for response in (
        httpx.options(open_server + CHAT, headers=headers),
        httpx.post(open_server + CHAT, json=chat_body(), headers=headers),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_https_is_served_with_a_certificate(folder: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *made], check=True, capture_output=True)
    with http_server(FakeEngine(say(5)), folder, ssl_certfile=certificate, ssl_keyfile=key) as url:
        secure = url.replace("http://", "https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        assert httpx.post(secure + CHAT, json=chat_body(), verify=trust).status_code == 200
