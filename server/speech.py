"""Speech: an answer's text taken apart into reasoning, text and tool calls, as it comes."""

from dataclasses import dataclass, field
from typing import Literal

from server.calls_in_text import MoreArguments, Part, ToolCall
from server.toolcalls import NoCalls, ToolParser

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Said:
    """One part of an answer. Arguments belong to the call before them."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str = ""
    call: ToolCall | None = None


@dataclass(slots=True)
class Speech:
    """Of one answer. Reasoning stands between `<think>` and `</think>`, at the beginning only."""

    tools: ToolParser = field(default_factory=NoCalls)
    reasoning: Literal["none", "may come", "open", "over"] = "none"  # open: the prompt ended with `<think>`
    _held: str = ""

    def feed(self, text: str) -> list[Said]:
        if self.reasoning == "over":  # what separates it from the answer belongs to neither
            text = text.lstrip()
            if not text:
                return []
            self.reasoning = "none"
        if self.reasoning == "none":
            return self._spoken(text)
        self._held += text
        if self.reasoning == "may come":
            begins = self._held.lstrip()
            if not begins or (_OPEN.startswith(begins) and begins != _OPEN):
                return []
            if not begins.startswith(_OPEN):
                return self._no_more()
            self.reasoning, self._held = "open", begins[len(_OPEN) :]
        thought, tag, rest = self._held.partition(_CLOSE)
        if tag:
            self.reasoning, self._held = "over", ""
            return [*_thought(thought), *self.feed(rest)]
        certain = len(self._held) - _possible_beginning(self._held)
        thought, self._held = self._held[:certain], self._held[certain:]
        return _thought(thought)

    def flush(self) -> list[Said]:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        said = _thought(held) if self.reasoning == "open" else self._spoken(held)
        return [*said, *self._parts(self.tools.flush())]

    def _no_more(self) -> list[Said]:
        self.reasoning = "none"
        held, self._held = self._held, ""
        return self._spoken(held)

    def _spoken(self, text: str) -> list[Said]:
        return self._parts(self.tools.feed(text))

    @staticmethod
    def _parts(parts: list[Part]) -> list[Said]:
        return [_said(part) for part in parts]


def _said(part: Part) -> Said:
    match part:
        case ToolCall():
            return Said("call", call=part)
        case MoreArguments(text=text):
            return Said("arguments", text)
        case _:
            return Said("content", part)


def _thought(text: str) -> list[Said]:
    return [Said("reasoning", text)] if text else []


def _possible_beginning(text: str) -> int:
    """Characters at the end that may begin the closing tag."""
    return next((n for n in range(min(len(text), len(_CLOSE) - 1), 0, -1) if _CLOSE.startswith(text[-n:])), 0)
