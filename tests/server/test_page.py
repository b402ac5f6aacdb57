"""The page's files: open without a key, nothing from elsewhere, nothing inline."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.docs_page import DOCS_PATHS
from server.page import FOLDER, PAGE_PATHS
from tests.server.builders import PATIENCE, FakeEngine, http_server, say


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[httpx.Client]:
    """A client without a key of a server that wants one."""
    with (
        http_server(FakeEngine(say(5)), folder, api_keys=("key",)) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


def test_every_file_is_served_without_a_key_and_with_its_type(locked: httpx.Client) -> None:
    assert len(PAGE_PATHS) == len(list(FOLDER.iterdir()))
    kinds = {"": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in PAGE_PATHS:
        found = locked.get(path)
        assert found.status_code == 200
        assert found.headers["content-type"].startswith(kinds[Path(path).suffix])
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        again = locked.get(path, headers={"if-none-match": found.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_what_the_page_asks_for_needs_the_key(locked: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/plans", "/stats"):
        assert locked.get(path).status_code == 401
        assert locked.get(path, headers={"authorization": "Bearer key"}).status_code == 200


def test_files_name_only_what_is_served_here() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text()
        elsewhere = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)
        assert set(elsewhere) <= {"http://www.w3.org"}, file.name  # the name of SVG
        assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son[a-z]+=|eval\(|innerHTML", text), file.name
        for target in re.findall(r"""(?:src|href)="([^"#]+)"|from "([^"]+)"|url\(["']?([^)"']+)""", text):
            name = next(filter(None, target)).removeprefix("./").removeprefix("page/")
            assert f"/page/{name}" in PAGE_PATHS or f"/{name}" in DOCS_PATHS, (file.name, name)
