"""Tool calls read while they come: each is known as soon as its arguments begin, and these pass through."""

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

import msgspec

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called, with the beginning of its arguments or all of them."""

    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """Goes on with the arguments of the call before it."""

    text: str


Part = str | ToolCall | MoreArguments  # text for the reader, or a call


class At(Enum):
    """Where in a call its reader is."""

    HEAD = "head"
    ARGUMENTS = "arguments"
    TAIL = "tail"


class CallReader:
    """Reads one `{"name": ..., "arguments": {...}}` of a known function, up to the end of its arguments."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._depth = 0  # of brackets
        self._in_string = self._escaped = False
        self.held = ""  # not decided in the head; in the tail, what follows the arguments
        self.at = At.HEAD

    def feed(self, text: str) -> list[Part]:
        self.held += text
        if self.at is At.TAIL:
            return []
        if self.at is At.ARGUMENTS:
            more = self._arguments()
            return [MoreArguments(more)] if more else []
        match = _HEAD.match(self.held)
        name = None if match is None else _decoded(match[1])
        if match is None or name is None or name not in self._names:
            return []
        self.held, self.at = self.held[match.end() :], At.ARGUMENTS
        return [ToolCall(name, self._arguments())]

    def _arguments(self) -> str:
        """What is held of them. They end with their last bracket, or where no JSON goes on."""
        for index, letter in enumerate(self.held):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
            if self._depth == 0 or (letter == "<" and not self._in_string):
                end = index + (letter != "<")
                found, self.held, self.at = self.held[:end], self.held[end:], At.TAIL
                return found
        found, self.held = self.held, ""
        return found


class CallsInARow:
    """Nothing but calls, with certain letters and space between them. What is no call is text, to the end."""

    def __init__(self, names: Collection[str], between: str) -> None:
        self._names = names
        self._between = between + " \t\r\n"
        self._reader: CallReader | None = None  # of the call that is open
        self._held = ""  # between calls
        self._is_text = False
        self.has_calls = False

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while True:
            if self._is_text:
                return [*parts, text] if text else parts
            if self._reader is not None:
                parts += self._reader.feed(text)
                self.has_calls |= self._reader.at is not At.HEAD
                tail = self._reader.held.lstrip() if self._reader.at is At.TAIL else ""
                if not tail:
                    return parts
                text, self._reader = tail.removeprefix("}"), None
            self._held += text
            begins = self._held.lstrip(self._between)
            if not begins:
                return parts
            self._is_text = begins[0] != "{"
            if not self._is_text:
                self._reader = CallReader(self._names)
            text, self._held = begins if self.has_calls or not self._is_text else self._held, ""

    def take_held(self) -> str:
        """What may have become a call and has not, at the end."""
        held = self._held if self._reader is None or self._reader.at is not At.HEAD else self._reader.held
        self._held, self._reader = "", None
        return "" if self.has_calls and not held.strip(self._between) else held


def _decoded(name: str) -> str | None:
    try:
        return msgspec.json.decode(name, type=str)
    except msgspec.MsgspecError:
        return None
