"""The page at /docs: the OpenAPI document as plain HTML. No scripts, nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from html import escape
from typing import Any

import msgspec
from fastapi.responses import Response

DOCS_PATHS = frozenset({"/docs", "/openapi.json"})
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_STYLE = (
    ":root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}body{max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}h2{margin-top:2.5rem}code{font:.9em ui-monospace,monospace;overflow-wrap:anywhere}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.25rem .75rem"
    " .25rem 0;border-top:1px solid #8884}summary{cursor:pointer;margin-top:.75rem}"
)


def docs_endpoints(document: dict[str, Any]) -> dict[str, Callable[[], Awaitable[Response]]]:
    """URL path to endpoint, for an OpenAPI document."""
    return {
        "/docs": _static(_page(document).encode(), "text/html"),
        "/openapi.json": _static(msgspec.json.encode(document), "application/json"),
    }


def _static(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def serve() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return serve


def _page(document: dict[str, Any]) -> str:
    info, schemas = document["info"], document["components"]["schemas"]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])} API</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>',
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f'<h2 id="{escape(path)}"><code>{method.upper()} {escape(path)}</code></h2>')
            parts.append(f"<p>{escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                parts += _fields(_named(operation["requestBody"]["content"]), schemas)
            parts += _replies(operation["responses"])
    parts.append("<h2>Objects</h2>")
    posts = [methods["post"] for methods in document["paths"].values() if "post" in methods]
    shown = {_named(post["requestBody"]["content"]) for post in posts if "requestBody" in post}
    for name in (name for name in schemas if name not in shown):
        parts.append(f'<h3 id="{name}"><code>{name}</code></h3>')
        parts.append(f"<p>{escape(schemas[name].get('description', ''))}</p>")
        parts += _fields(name, schemas)
    return "\n".join(parts)


def _named(content: dict[str, Any]) -> str:
    return str(content["application/json"]["schema"]["$ref"]).rpartition("/")[2]


def _fields(name: str, schemas: dict[str, Any]) -> list[str]:
    """The table of an object's fields."""
    required = schemas[name].get("required", [])
    rows = ["<table><tr><th>field<th>takes<th>if not given"]
    for field, schema in schemas[name].get("properties", {}).items():
        default = escape(msgspec.json.encode(schema["default"]).decode()) if "default" in schema else ""
        default = "needed" if field in required else f"<code>{default}</code>" if default else ""
        rows.append(f"<tr><td><code>{escape(field)}</code><td>{_kind(schema)}<td>{default}")
    return [*rows, "</table>"]


def _kind(schema: dict[str, Any]) -> str:
    """What a schema takes, in HTML."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(msgspec.json.encode(value).decode())}</code>" for value in values)
    kind = escape(str(schema.get("type", "anything")))
    limits = [f"{words} {schema[key]}" for key, words in _LIMITS.items() if key in schema]
    if kind == "array" and "items" in schema:
        kind = f"list of {_kind(schema['items'])}"
    return f"{kind} ({', '.join(limits)})" if limits else kind


_LIMITS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "characters from",
    "maxLength": "characters to",
    "minItems": "items from",
    "maxItems": "items to",
    "maxProperties": "entries to",
}


def _replies(replies: dict[str, Any]) -> list[str]:
    rows = [f"<tr><td>{status}<td>{escape(reply['description'])}" for status, reply in replies.items()]
    return ["<details><summary>Replies</summary><table>", *rows, "</table></details>"]
