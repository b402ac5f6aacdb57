"""The OpenAPI document of this server: every URL, what may be sent to it, and what comes back."""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from server.bounds import MAX_BIASES, MAX_PROMPTS, MAX_STOP_CHARACTERS
from server.chat_request import ChatCompletionRequest
from server.checking import Body
from server.responses_request import ResponsesRequest
from server.text_request import CompletionRequest
from server.tokens_request import DetokenizeRequest, TokenizeRequest
from server.version import farspan_version

Schema = dict[str, Any]

POSTS: dict[str, tuple[type[Body], str, bool]] = {  # what is sent, what it is for, may the reply be a stream?
    "/v1/chat/completions": (ChatCompletionRequest, "The next message of a chat.", True),
    "/v1/completions": (CompletionRequest, "How a text goes on.", True),
    "/v1/responses": (ResponsesRequest, "The next message of a chat, in OpenAI's newer form.", True),
    "/tokenize": (TokenizeRequest, "The token ids of a text, or of a chat as the model would see it.", False),
    "/detokenize": (DetokenizeRequest, "The text of token ids.", False),
}
ADMIN_POSTS: dict[str, str] = {  # without a body; there where there is an admin key
    "/admin/drain": "Take no new requests; what is open goes on to its end.",
    "/admin/resume": "Take requests again.",
    "/admin/cache/clear": "Forget the beginnings of prompts that nobody reads now.",
}
GETS: dict[str, str] = {
    "/v1/models": "The one model, with what it takes and under which plans.",
    "/v1/models/{name}": "The same, by its name.",
    "/v1/plans": "What each loaded plan does in each layer. The first is the default.",
    "/tokenizer_info": "What evaluation tools need in place of a tokenizer of their own.",
    "/version": "The version that runs.",
    "/stats": "The engine at this moment.",
    "/metrics": "Series for Prometheus.",
    "/health": "Are requests served now? Needs no key.",
    "/readyz": "The same.",
    "/livez": "Does the serving process run? Needs no key.",
}
OPEN = ("/health", "/readyz", "/livez")  # need no key
_REFUSALS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No API key, or a wrong one.",
    "403": "This needs the admin key.",
    "404": "No such model, plan or URL.",
    "405": "This URL does not take this method.",
    "408": "The request's own `timeout` has passed.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "This API key has all the open requests it may have.",
    "431": "The head of the request is too large.",
    "500": "A step failed with this request in it, or a mistake of ours.",
    "503": "Loading, full or dead; `Retry-After` says when to ask again.",
}
_TEXT: Schema = {"type": "string"}
# Fields that take more forms than they are kept in.
_AS_SENT: dict[tuple[str, str], list[Schema]] = {
    ("ChatMessage", "content"): [_TEXT],
    ("ChatCompletionRequest", "tool_choice"): [{"enum": ["none", "auto", "required"]}],
    ("ChatCompletionRequest", "stop"): [_TEXT | {"minLength": 1, "maxLength": MAX_STOP_CHARACTERS}],
    ("CompletionRequest", "stop"): [_TEXT | {"minLength": 1, "maxLength": MAX_STOP_CHARACTERS}],
    ("StructuredOutputs", "json"): [_TEXT],
    ("Item", "content"): [_TEXT],
    ("ResponsesRequest", "input"): [_TEXT],
    ("ResponsesRequest", "tool_choice"): [{"enum": ["none", "auto", "required"]}],
}
_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS: Schema = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_PROMPTS,
    "items": {"anyOf": [_TEXT, _IDS]},
}
_PROMPT: Schema = {"anyOf": [_TEXT, _IDS, _PROMPTS]}


def openapi(model: str, plans: Sequence[str], *, locked: bool, has_admins: bool = False) -> Schema:
    """The whole document. Anybody may read it: with API keys (`locked`) it does not name what is served."""
    schemas = _schemas()
    if not locked:
        for sent, _, _ in POSTS.values():
            fields, required = (schemas[sent.__name__].get(part, {}) for part in ("properties", "required"))
            for field, known in {"model": [model], "plan": plans}.items():
                if field in fields:
                    fields[field] = {"enum": [*known] if field in required else [*known, None]}
    paths: Schema = {}
    for path, (sent, words, streams) in POSTS.items():
        body = {"required": True, "content": _json({"$ref": f"#/components/schemas/{sent.__name__}"})}
        paths[path] = {"post": _operation(path, words, streams=streams) | {"requestBody": body}}
    for path, words in GETS.items():
        paths[path] = {"get": _operation(path, words)}
    if has_admins:
        for path, words in ADMIN_POSTS.items():
            paths[path] = {"post": _operation(path, words) | {"security": [{"key": []}]}}
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT | {"minLength": 1}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Farspan", "version": farspan_version()},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if locked else [],
    }


def _operation(path: str, words: str, *, streams: bool = False) -> Schema:
    content = {"text/plain": {"schema": _TEXT}} if path == "/metrics" else _json({"type": "object"})
    if streams:
        content["text/event-stream"] = {}  # a schema would be of each event's data, which has many forms
    replies: Schema = {"200": {"description": "As asked.", "content": content}}
    refusal = _json({"$ref": "#/components/schemas/Error"})
    replies |= {status: {"description": why, "content": refusal} for status, why in _REFUSALS.items()}
    operation: Schema = {"summary": words, "responses": replies}
    return operation | {"security": []} if path in OPEN else operation


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _schemas() -> Schema:
    """What may be sent, by the names of the models that check it; and the envelope of errors."""
    mode: JsonSchemaMode = "validation"
    models = [(model, mode) for model, _, _ in POSTS.values()]
    _, found = models_json_schema(models, ref_template="#/components/schemas/{model}")
    schemas: Schema = found["$defs"]
    for (model, field), forms in _AS_SENT.items():
        fields = schemas[model]["properties"]
        kept = {key: value for key, value in fields[field].items() if key not in ("title", "default")}
        default = {"default": fields[field]["default"]} if "default" in fields[field] else {}
        fields[field] = {"anyOf": [*forms, kept]} | default
    schemas["CompletionRequest"]["properties"]["prompt"] = _PROMPT
    chat = schemas["ChatCompletionRequest"]["properties"]
    for field, schema in schemas["ResponsesRequest"]["properties"].items():
        if not schema.keys() - {"title", "default"}:  # checked as in a chat
            schemas["ResponsesRequest"]["properties"][field] = chat[field]
    for sent in ("ChatCompletionRequest", "CompletionRequest"):
        bias = schemas[sent]["properties"]["logit_bias"]
        bias |= {"maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^[0-9]{1,19}$"}}
    schemas["ChatMessage"]["required"].remove("content")  # an assistant that called tools may say nothing
    for request, _, _ in POSTS.values():
        _let_null_be_silence(schemas[request.__name__])
    text_or_null = {"type": ["string", "null"]}
    error = {"message": _TEXT, "type": _TEXT, "param": text_or_null, "code": text_or_null}
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": list(error), "properties": error}},
    }
    return schemas


def _let_null_be_silence(schema: Schema) -> None:
    """Null is taken where a field may be left out."""
    for field, takes in schema["properties"].items():
        if field not in schema.get("required", []) and {"type": "null"} not in takes.get("anyOf", []):
            default = {"default": takes["default"]} if "default" in takes else {}
            kept = {key: value for key, value in takes.items() if key != "default"}
            schema["properties"][field] = {"anyOf": [kept, {"type": "null"}]} | default
