"""Plug-ins built by name from the options that a plan gives them, each option checked."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from configs.errors import ConfigError, nearest
from configs.schema import parse_count

_Plugin = TypeVar("_Plugin")


def build(
    kinds: Mapping[str, type[_Plugin]], name: str, options: dict[str, Any], where: str, key: str
) -> _Plugin:
    """The plug-in of this name, with its options checked one by one: names, then types, then its own
    rules."""
    if name not in kinds:
        raise ConfigError(f"{where}.{key}: no {key} {name!r}; {nearest(name, kinds)}")
    kind = cast(Any, kinds[name])
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    values = {}
    for option, value in options.items():
        if option not in fields:
            raise ConfigError(
                f"{where}.{option}: {name} has no such option; {nearest(option, [*fields, key])}"
            )
        try:
            values[option] = _typed(fields[option].type, value)
        except (ValidationError, ValueError) as error:
            words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"{where}.{option}: {words} (got {value!r})") from error
    try:
        return cast(_Plugin, kind(**values))
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error


def _typed(kind: Any, value: Any) -> Any:
    """A YAML value as the option's type: no string for a number, no yes for 1; files and counts (4K) as
    people write them."""
    if kind is int:
        value = parse_count(value)
    strict = Path not in (kind, *getattr(kind, "__args__", ()))
    return TypeAdapter(kind, config=ConfigDict(strict=strict)).validate_python(value)
