"""KvpressScorer: teacher forcing through kvpress' SnapKV, in a process and an interpreter of its own."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import CannotRun
from benchmarks.parts import ROOT
from benchmarks.scoring import Scored
from engine.messages import Cost

SCRIPT = ROOT / "benchmarks" / "kvpress_peer.py"


class KvpressScorer:
    """Starts at once, ends with `close`. Raises CannotRun where that interpreter has no kvpress."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(SCRIPT), str(model), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise CannotRun(f"{python}: {error.strerror}") from error
        self._folder = tempfile.TemporaryDirectory()
        started = self._read()
        if "cannot" in started:
            self.close()
            raise CannotRun(started["cannot"])
        self.version: str = started["kvpress"]

    def score(
        self, budget: int, tokens: Sequence[int], prompt_length: int, positions: Sequence[int]
    ) -> Scored:
        """Logits at these positions, none of them before the prompt's last token."""
        assert min(positions) >= prompt_length - 1, "a press keeps its prompt's logits to itself"
        file = Path(self._folder.name, "logits.npy")
        asked = {
            "tokens": list(tokens),
            "prompt_length": prompt_length,
            "positions": list(positions),
            "budget": budget,
            "file": str(file),
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: there will be no answer
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        kept = float(self._read()["kept"])
        cost = Cost(
            plan=f"kvpress {budget}",
            prefill_read_fraction=1.0,
            attention_recall=None,
            attention_recall_p5=None,
            attention_recall_samples=0,
            kv_tokens_total=prompt_length,
            kv_tokens_kept=kept,
            kv_bytes=0,  # presses cut tensors: what that frees is nobody else's
            cached_tokens=0,
            queue_seconds=0.0,
            prefill_seconds=0.0,
        )
        return Scored(torch.from_numpy(np.load(file)), cost)

    def close(self) -> None:
        with suppress(BrokenPipeError), self._process:
            self._process.kill()  # it owns nothing that outlives it
        self._folder.cleanup()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("kvpress ended; its last words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer
