"""Admin routes: there only with an admin key, open only to it, and what they do."""

from pathlib import Path

import httpx
import pytest

from configs.errors import ConfigError
from configs.schema import ServerConfig
from server.auth import Keys
from server.openapi import ADMIN_POSTS
from tests.server.builders import PATIENCE, FakeEngine, chat_body, events, http_server, say, then, until

CHAT = "/v1/chat/completions"
KEY, ADMIN = "an-api-key", "the-admin-key"


def with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "admins").write_text(f"# ours\n{ADMIN}\n")
    return tmp_path / "admins"


@pytest.mark.parametrize("locked", [False, True])
def test_only_the_admin_key_opens_admin_routes(folder: Path, file: Path, locked: bool) -> None:
    keys = (KEY,) if locked else ()
    with http_server(FakeEngine(say(5)), folder, api_keys=keys, admin_key_file=file) as url:
        for path in ("/admin", "/admin/", "/admin/drain", "/admin/nowhere"):
            for headers in ({}, with_key("wrong"), with_key(ADMIN.upper()), {"x-api-key": ADMIN}):
                assert httpx.post(url + path, headers=headers).status_code == 401, (path, headers)
        if locked:
            refused = httpx.post(f"{url}/admin/drain", headers=with_key(KEY))
            assert refused.status_code == 403 and refused.json()["error"]["code"] == "permission_denied"
        assert httpx.get(f"{url}/admin/drain", headers=with_key(ADMIN)).status_code == 405
        assert httpx.post(f"{url}/admin/nowhere", headers=with_key(ADMIN)).status_code == 404
        assert httpx.get(f"{url}/metrics", headers=with_key(ADMIN)).status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == (401 if locked else 200)


def test_without_an_admin_key_there_are_no_admin_routes(folder: Path) -> None:
    with http_server(FakeEngine(say(5)), folder, api_keys=(KEY,)) as url:
        assert httpx.post(f"{url}/admin/drain", headers=with_key(KEY)).status_code == 404


def test_a_drained_server_ends_what_is_open_and_takes_nothing_new(folder: Path, file: Path) -> None:
    engine = FakeEngine(then(say(5), None))
    with http_server(engine, folder, admin_key_file=file) as url:
        with httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=PATIENCE) as open_stream:
            parts = open_stream.iter_text()
            next(parts)
            drained = httpx.post(f"{url}/admin/drain", headers=with_key(ADMIN))
            assert drained.json() == {"draining": True, "open_requests": 1}
            assert httpx.get(f"{url}/readyz").json()["error"]["code"] == "draining"
            refused = httpx.post(url + CHAT, json=chat_body())
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert httpx.get(f"{url}/livez").status_code == 200
            assert not engine.aborted, "what was open was cut off"
        until(lambda: engine.aborted)
        assert httpx.post(f"{url}/admin/drain", headers=with_key(ADMIN)).json()["open_requests"] == 0
        engine.script = say(5, 6)
        assert httpx.post(f"{url}/admin/resume", headers=with_key(ADMIN)).json()["draining"] is False
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert events(httpx.post(url + CHAT, json=chat_body(stream=True), timeout=PATIENCE).text)


def test_a_full_server_can_be_looked_at_and_drained(folder: Path, file: Path) -> None:
    engine = FakeEngine(then(say(5), None))
    limits = {"max_open_requests": 1, "max_requests_per_key": 1}
    with http_server(engine, folder, api_keys=(KEY,), admin_key_file=file, **limits) as url:
        body, headers = chat_body(stream=True), with_key(KEY)
        with httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=PATIENCE) as open_stream:
            parts = open_stream.iter_text()
            next(parts)
            assert httpx.post(url + CHAT, json=chat_body(), headers=with_key(ADMIN)).status_code == 503
            for path in ("/metrics", "/stats", "/v1/models"):
                assert httpx.get(url + path, headers=headers).status_code == 200, path
            drained = httpx.post(f"{url}/admin/drain", headers=with_key(ADMIN))
            assert drained.json() == {"draining": True, "open_requests": 1}


def test_the_prefix_cache_is_cleared_for_the_admin_key_only(folder: Path, file: Path) -> None:
    engine = FakeEngine(say(5))
    with http_server(engine, folder, api_keys=(KEY,), admin_key_file=file) as url:
        path = f"{url}/admin/cache/clear"
        assert httpx.post(path).status_code == 401
        assert httpx.post(path, headers=with_key(KEY)).status_code == 403
        assert httpx.get(path, headers=with_key(ADMIN)).status_code == 405
        cleared = httpx.post(path, headers=with_key(ADMIN))
        assert cleared.status_code == 200 and cleared.json() == {"pages": 10, "host_pages": 3}
        engine.is_ready = False
        refused = httpx.post(path, headers=with_key(ADMIN))
        assert refused.status_code == 503 and refused.headers["retry-after"]


def test_admin_routes_are_in_the_openapi_document_where_they_exist(folder: Path, file: Path) -> None:
    for given, expected in (({"admin_key_file": file}, set(ADMIN_POSTS)), ({}, set())):
        with http_server(FakeEngine(say(5)), folder, **given) as url:
            paths = httpx.get(f"{url}/openapi.json").json()["paths"]
            assert {path for path in paths if path.startswith("/admin")} == expected
            for path in expected:
                assert paths[path]["post"]["security"] == [{"key": []}]
                assert f"{path}</code></h2>" in httpx.get(f"{url}/docs").text
                assert httpx.post(url + path, headers=with_key(ADMIN)).status_code == 200


def test_admin_keys_come_from_file_and_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSPAN_ADMIN_KEY", "other third")
    keys = Keys.of(ServerConfig(admin_key_file=file))
    assert all(keys.is_admin(f"Bearer {key}") for key in (ADMIN, "other", "third"))
    assert not keys.is_admin("Bearer fourth") and not keys.are_needed
    monkeypatch.setenv("FARSPAN_ADMIN_KEY", "ö")
    with pytest.raises(ConfigError, match="admin_key_file"):
        Keys.of(ServerConfig())
