"""How a command that cannot do what it was asked ends: one message, and a code that scripts tell apart."""

import sys
from typing import NoReturn

FAILED = 1  # it was tried, and did not work: the server said no, an answer broke off, a port is taken
REFUSED = 2  # something given is wrong: a flag, a file, a plan, a model
UNREACHABLE = 3  # no server answers, or it is not ready
INTERRUPTED = 130  # by Ctrl-C


def fail(message: str, code: int) -> NoReturn:
    """Say why on standard error, and leave."""
    if message:
        print(f"farspan: {message}", file=sys.stderr)
    raise SystemExit(code)
