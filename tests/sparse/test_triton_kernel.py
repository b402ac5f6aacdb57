"""The Triton attention kernel, in a process of its own: Triton chooses to interpret when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CASES = "tests/sparse/triton_attention_cases.py"


def run_cases(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", CASES, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]


def test_cases_hold_in_the_interpreter() -> None:
    run_cases({**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.gpu
def test_cases_hold_on_the_gpu() -> None:
    run_cases({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
