"""Tool calls in what a model says: as Hermes and Qwen write them, as Llama 3 does, or forced by a grammar."""

import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


Part = str | ToolCall  # text for the reader, or a call


class ToolParser(Protocol):
    """Takes an answer apart as it comes. What only looks like a call is text."""

    def feed(self, text: str) -> list[Part]: ...

    def flush(self) -> list[Part]:
        """What was held back, at the end."""


class NoCalls:
    """There are no tools: everything is text."""

    def feed(self, text: str) -> list[Part]:
        return [text] if text else []

    def flush(self) -> list[Part]:
        return []


class HermesCalls:
    """Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several between text."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""  # not decided: perhaps the beginning of a tag, or space before one
        self._inside = False
        self._found = False

    def feed(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while True:
            before, tag, after = self._held.partition(_CLOSE if self._inside else _OPEN)
            if not tag:
                break
            if self._inside:
                call = _call(before, self._names)
                parts.append(call or f"{_OPEN}{before}{_CLOSE}")
                self._found |= call is not None
            elif before.strip():
                parts.append(before.rstrip())
            self._held, self._inside = after, not self._inside
        if not self._inside:
            certain = _certain(self._held, _OPEN)
            if certain:
                parts.append(self._held[:certain])
                self._held = self._held[certain:]
        return parts

    def flush(self) -> list[Part]:
        held, self._held = self._held, ""
        if not self._inside:
            return [held] if held.strip() or (held and not self._found) else []
        return [_call(held, self._names) or f"{_OPEN}{held}"]  # models may stop without the last tag


class LlamaCalls:
    """Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, or several with `;` between."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> list[Part]:
        self._held += text
        begins = self._held.lstrip()
        if not self._is_text and begins:
            self._is_text = begins[0] != "{"
        if not self._is_text:
            return []
        held, self._held = self._held, ""
        return [held] if held else []

    def flush(self) -> list[Part]:
        held, self._held = self._held, ""
        calls = [_call(one, self._names) for one in _objects(held)]
        found = [call for call in calls if call is not None]
        if found and len(found) == len(calls):
            return list(found)
        return [held] if held.strip() else []


class ForcedCalls:
    """The grammar of the answer allows calls only: the arguments of one function, or a list of calls."""

    def __init__(self, names: Collection[str], named: str | None) -> None:
        self._names = names
        self._named = named
        self._text = ""

    def feed(self, text: str) -> list[Part]:
        self._text += text
        return []

    def flush(self) -> list[Part]:
        if self._named is not None:
            return [ToolCall(self._named, self._text.strip())]
        try:
            calls = [_call_of(one, self._names) for one in msgspec.json.decode(self._text)]
        except (msgspec.MsgspecError, TypeError):  # cut off at the limit of the answer
            return [self._text] if self._text else []
        return [call for call in calls if call is not None]


def _call(text: str, names: Collection[str]) -> ToolCall | None:
    try:
        return _call_of(msgspec.json.decode(text), names)
    except (msgspec.MsgspecError, RecursionError):
        return None


def _call_of(content: Any, names: Collection[str]) -> ToolCall | None:
    if not isinstance(content, dict) or content.get("name") not in names:
        return None
    arguments = content.get("arguments", content.get("parameters", {}))
    if isinstance(arguments, str):  # some models quote them
        return ToolCall(content["name"], arguments)
    return ToolCall(content["name"], msgspec.json.encode(arguments).decode())


def _objects(text: str) -> list[str]:
    """The JSON objects of a text with `;` between them, which may stand inside strings, too."""
    found, start, depth, in_string, escaped = [], 0, 0, False, False
    for index, letter in enumerate(text):
        if in_string:
            in_string = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            in_string = True
        elif letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
        elif letter == ";" and depth == 0:
            found.append(text[start:index])
            start = index + 1
    return [one for one in [*found, text[start:]] if one.strip()]


def _certain(text: str, tag: str) -> int:
    """Characters that belong to no tag, whatever follows; space before one is no text."""
    end = len(text)
    for count in range(min(len(tag) - 1, end), 0, -1):
        if tag.startswith(text[end - count :]):
            end -= count
            break
    return len(text[:end].rstrip())
