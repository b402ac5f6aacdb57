"""Tool calls in what a model says: as Hermes and Qwen write them, as Llama 3 does, or forced by a grammar."""

from collections.abc import Collection
from typing import Any, Protocol

import msgspec

from server.calls_in_text import At, CallReader, CallsInARow, MoreArguments, Part, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


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
        self._held = ""  # outside of calls; not decided: perhaps the beginning of a tag, or space before one
        self._reader: CallReader | None = None  # inside
        self._found = False

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while True:
            if self._reader is None:
                self._held += text
                before, tag, text = self._held.partition(_OPEN)
                if not tag:
                    certain = _certain(self._held, _OPEN)
                    parts += [self._held[:certain]] if certain else []
                    self._held = self._held[certain:]
                    return parts
                parts += [before.rstrip()] if before.strip() else []
                self._held, self._reader = "", CallReader(self._names)
            parts += self._reader.feed(text)
            inside, tag, text = self._reader.held.partition(_CLOSE)
            if not tag or self._reader.at is At.ARGUMENTS:
                return parts
            if self._reader.at is At.HEAD:
                call = _call(inside, self._names)
                self._found |= call is not None
                parts.append(call or f"{_OPEN}{inside}{_CLOSE}")
            else:
                self._found = True
            self._reader = None

    def flush(self) -> list[Part]:
        held, self._held, reader, self._reader = self._held, "", self._reader, None
        if reader is None:
            return [held] if held.strip() or (held and not self._found) else []
        if reader.at is not At.HEAD:
            return []
        return [_call(reader.held, self._names) or f"{_OPEN}{reader.held}"]  # without the last tag


class LlamaCalls:
    """Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, or several with `;` between."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._calls = CallsInARow(names, ";")

    def feed(self, text: str) -> list[Part]:
        return self._calls.feed(text)

    def flush(self) -> list[Part]:
        held = self._calls.take_held()
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
        self._has_begun = False
        self._calls = CallsInARow(names, "[,]")

    def feed(self, text: str) -> list[Part]:
        if self._named is None:
            return self._calls.feed(text)
        if self._has_begun:
            return [MoreArguments(text)] if text else []
        text = text.lstrip()
        self._has_begun = bool(text)
        return [ToolCall(self._named, text)] if text else []

    def flush(self) -> list[Part]:
        held = self._calls.take_held()
        try:
            calls = [_call_of(one, self._names) for one in msgspec.json.decode(f"[{held}")] if held else []
        except (msgspec.MsgspecError, TypeError):  # cut off at the limit of the answer
            return [held]
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
