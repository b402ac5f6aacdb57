"""PeerProcess: one peer in a process and an interpreter of its own, with its own threads and packages."""

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from benchmarks.common import CannotRun, Elapsed
from benchmarks.parts import ROOT
from benchmarks.peers import Setting

SCRIPT = ROOT / "benchmarks" / "peers.py"


class PeerProcess:
    """Starts at once, and ends with `close`. Raises CannotRun if this peer cannot run here."""

    def __init__(self, name: str, setting: Setting, python: str) -> None:
        self.name = name
        # How OpenMP waits was chosen for us (benchmarks/__init__.py); a peer waits as it was made to.
        ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(SCRIPT), name, json.dumps(asdict(setting))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise CannotRun(f"{python}: {error.strerror}") from error
        self.versions = self._read() or {"cannot": "it ended while it loaded; its last words are above"}
        if "cannot" in self.versions:
            self.close()
            raise CannotRun(f"{name}: {self.versions['cannot']}")

    def first_token(self, prompt: Sequence[int]) -> tuple[int, Elapsed]:
        """The token, and the time as the peer's own process saw it."""
        return self._ask(prompt)

    def decode(self, steps: int) -> tuple[int, Elapsed]:
        """The last token of so many steps behind the last prompt and its first token, and their time."""
        return self._ask(steps)

    def _ask(self, line: Sequence[int] | int) -> tuple[int, Elapsed]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: there will be no answer
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        answer = self._read()
        if answer is None:
            raise RuntimeError(f"{self.name}: it ended; its last words are above")
        return answer["token"], Elapsed(answer["wall"], answer["cpu"])

    def close(self) -> None:
        with suppress(BrokenPipeError), self._process:
            self._process.kill()  # it owns nothing that outlives it

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer
