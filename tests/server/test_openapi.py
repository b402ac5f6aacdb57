"""The OpenAPI document says what is there: every route, every field, nothing else."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import openapi as documented
from server.chat_request import ChatCompletionRequest
from server.docs_page import DOCS_PATHS
from server.openapi import openapi
from server.page import PAGE_PATHS
from tests.server.builders import FakeEngine, http_server, routes, say


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi("tiny", ["sparse", "dense"], locked=True)


def test_every_route_is_in_the_document_and_nothing_else(folder: Path, document: dict[str, Any]) -> None:
    there = {
        (path.replace(":path", ""), method.lower())
        for path, method in routes(FakeEngine(say(5)), folder)
        if path not in PAGE_PATHS | DOCS_PATHS
    }
    assert there == {(path, method) for path, methods in document["paths"].items() for method in methods}


def test_every_reference_leads_somewhere_and_every_field_is_there(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    names = re.findall(r"#/components/schemas/(\w+)", str(document))
    assert set(names) == set(schemas)
    chat = schemas["ChatCompletionRequest"]
    assert set(chat["properties"]) == set(ChatCompletionRequest.model_fields)
    assert chat["additionalProperties"] is False and set(chat["required"]) == {"model", "messages"}
    responses = schemas["ResponsesRequest"]["properties"]
    assert responses["temperature"] == chat["properties"]["temperature"]
    assert all(schema.keys() - {"title", "default"} for schema in responses.values())


def test_the_page_has_every_url_and_field_and_loads_nothing_from_elsewhere(
    folder: Path, document: dict[str, Any]
) -> None:
    with http_server(FakeEngine(say(5)), folder, api_keys=("secret",)) as url:
        page, raw = httpx.get(f"{url}/docs"), httpx.get(f"{url}/openapi.json")
    assert raw.json() == document and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text and not re.search("(?:src|href)=.?(?:https?:)?//", page.text)
    for path in document["paths"]:
        assert f"{path}</code></h2>" in page.text
    for name in ("repetition_penalty", "max_output_tokens", "tool_call_id"):
        assert f"<code>{name}</code>" in page.text
    assert "to 20" in page.text and "below 2147483648" in page.text


def test_without_keys_the_document_names_what_is_served(folder: Path, document: dict[str, Any]) -> None:
    with http_server(FakeEngine(say(5)), folder) as url:
        named = httpx.get(f"{url}/openapi.json").json()
    fields = named["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["model"] == {"enum": ["tiny"]} and fields["plan"] == {"enum": ["sparse", "dense", None]}
    assert named["security"] == [] and document["security"] == [{"key": []}]
    assert "sparse" not in str(document)


def test_what_an_open_route_says_of_itself_is_so(folder: Path, document: dict[str, Any]) -> None:
    with http_server(FakeEngine(say(5)), folder, api_keys=("secret",)) as url:
        for path, methods in document["paths"].items():
            if "get" in methods:
                status = httpx.get(url + path.replace("{name}", "tiny")).status_code
                assert (status == 200) == (methods["get"].get("security") == []), path
                assert (path in documented.OPEN) == (status == 200)
