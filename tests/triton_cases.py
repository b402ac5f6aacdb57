"""Runs files of cases in processes of their own: Triton chooses to interpret when it is imported."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_cases(*files: str, interpreted: bool) -> None:
    """Every case of these files must run and pass."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        _run(files, environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
        return
    # Compiling takes a GPU machine's time, on one of its many cores: all files at once.
    with ThreadPoolExecutor(len(files)) as threads:
        for done in [threads.submit(_run, (file,), environment) for file in files]:
            done.result()


def _run(files: tuple[str, ...], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]
