"""Parts: benchmarks and tests, one after another, each in its own process. Starts where torch is missing."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CANNOT_RUN = 3  # exit code of a part that misses something it needs: left out, not failed
TAIL = 12  # lines of output kept with the outcome of a part


@dataclass(frozen=True)
class Part:
    """One command: `python ARGUMENTS`."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()  # modules that must be importable
    seconds: float | None = None  # its share of the time; None = as long as it takes
    unless: str | None = None  # a reason not to run it at all

    @property
    def missing(self) -> str | None:
        """Why this part cannot run here, or None."""
        if self.unless is not None:
            return self.unless
        absent = [name for name in self.needs if not _is_there(name)]
        return f"not installed: {', '.join(absent)}" if absent else None


@dataclass(frozen=True)
class Outcome:
    """What came of one part."""

    part: str
    status: str  # passed | failed | out of time | skipped
    reason: str | None
    seconds: float
    tail: tuple[str, ...]  # the last lines it wrote


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def run_parts(
    parts: Sequence[Part], save: Callable[[list[Outcome]], object], total: float | None = None
) -> list[Outcome]:
    """Run what can run, in order, `save` after each. total: seconds for all of them together."""
    outcomes: list[Outcome] = []
    ends = None if total is None else time.monotonic() + total
    for part in parts:
        limits = [part.seconds] if part.seconds is not None else []
        if ends is not None:
            limits.append(ends - time.monotonic())
        limit = min(limits, default=None)
        reason = part.missing
        if reason is None and limit is not None and limit <= 0:
            reason = f"the {total:.0f} seconds for all parts are over"
        if reason is not None:
            print(f"\n=== {part.name}: skipped: {reason}", flush=True)
            outcomes.append(Outcome(part.name, "skipped", reason, 0.0, ()))
        else:
            print(f"\n=== {part.name}: python {' '.join(part.arguments)}", flush=True)
            outcomes.append(_run(part, limit))
        save(outcomes)
    return outcomes


def _run(part: Part, limit: float | None) -> Outcome:
    """Show the output as it comes, and end the part with all it started when its time is over."""
    began = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL)
    late = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-u", *part.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def stop() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(threading.TIMEOUT_MAX if limit is None else limit, stop)
    timer.daemon = True
    timer.start()
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line.rstrip())
        code = process.wait()
    timer.cancel()
    seconds = round(time.monotonic() - began, 1)
    if late.is_set():
        return Outcome(part.name, "out of time", f"stopped after {limit:.0f} s", seconds, tuple(tail))
    if code == CANNOT_RUN:
        return Outcome(part.name, "skipped", "cannot run here, see its last lines", seconds, tuple(tail))
    if code != 0:
        return Outcome(part.name, "failed", f"exit code {code}", seconds, tuple(tail))
    return Outcome(part.name, "passed", None, seconds, tuple(tail))


def as_json(outcomes: Sequence[Outcome]) -> dict[str, object]:
    return {"parts": [asdict(outcome) for outcome in outcomes]}


HEADINGS = ("part", "status", "seconds", "reason")


def as_rows(outcomes: Sequence[Outcome]) -> list[tuple[object, ...]]:
    """Under HEADINGS."""
    return [(outcome.part, outcome.status, outcome.seconds, outcome.reason) for outcome in outcomes]


def failed(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.status in ("failed", "out of time") for outcome in outcomes)
