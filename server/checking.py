"""A JSON body checked strictly against what may be sent; what is not served is refused in words."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from configs.errors import nearest
from engine.errors import BadRequest
from server.bounds import SHOWN


class Body(BaseModel):
    """What all that clients send has in common."""

    # Strict: no "1" for 1, no true for 1, no 1.0 for 1. Inputs stay out of pydantic's own messages.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


_Body = TypeVar("_Body", bound=Body)


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object. msgspec is strict where Python's json is not: no NaN, no lone surrogates."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        words = f"We could not parse the JSON body of your request: {str(error)[:SHOWN]}"
        raise BadRequest(words, code="invalid_json") from error
    if not isinstance(content, dict):
        raise BadRequest(f"The JSON body must be an object, not {_kind(content)}.", code="invalid_json")
    return content


def check(model: type[_Body], content: dict[str, Any], nothing: Mapping[str, tuple[Any, ...]]) -> _Body:
    asked = {}
    for name, value in content.items():
        if name in model.model_fields:
            if value is not None:  # null is OpenAI's "as if I had not said it"
                asked[name] = value
        elif name not in nothing:
            hint = nearest(name[:SHOWN], model.model_fields)
            raise _unsupported(name, f"Unrecognized request argument supplied: {name[:SHOWN]!r}; {hint}")
        elif value is not None and not any(_same(value, neutral) for neutral in nothing[name]):
            raise _unsupported(name, f"Unsupported parameter: {name!r} with this value is not served.")
    try:
        return model.model_validate(asked)
    except ValidationError as error:
        raise _bad_field(error) from error


def _unsupported(name: str, words: str) -> BadRequest:
    return BadRequest(words, param=name[:SHOWN], code="unsupported_parameter")


def _bad_field(error: ValidationError) -> BadRequest:
    """The first complaint of pydantic in OpenAI's form."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(map(str, first["loc"]))[:SHOWN]
    words = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "missing":
            return BadRequest(
                f"Missing required parameter: {path!r}.", param=path, code="missing_required_parameter"
            )
        case "extra_forbidden":
            return BadRequest(f"Unsupported parameter: {path!r}.", param=path, code="unsupported_parameter")
        case "value_error" if not path:
            return BadRequest(f"{words}.", code="invalid_value")
        case kind:
            code = "invalid_type" if kind.endswith("_type") else "invalid_value"
            return BadRequest(
                f"Invalid value for {path!r}: {words} (got {_shown(first['input'])}).", param=path, code=code
            )


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: 0 and 0.0 are, 0 and false are not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _kind(value: Any) -> str:
    return {str: "a string", list: "an array", dict: "an object", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


def _shown(value: Any) -> str:
    """A short echo of what was sent: numbers and short strings as they are, the rest by kind."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**64:
        return repr(value)
    return repr(value) if isinstance(value, str) and len(value) <= 40 else _kind(value)
