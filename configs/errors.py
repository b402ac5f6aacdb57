"""ConfigError: something a person configured is wrong. Says the path of the key, what was seen and what
would fit."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Refused before anything was loaded; `farspan` prints the message and exits with code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that help after a wrong name: the closest right one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}"
