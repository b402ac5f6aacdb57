"""`make gpu` and the GPU benchmark, as far as a machine without a GPU can show them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.parts import CANNOT_RUN, ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_device_make_gpu_says_what_it_would_run() -> None:
    done = run("benchmarks.gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    for part in gpu.parts():
        assert part.name in done.stdout


def test_without_torch_make_gpu_still_says_what_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert gpu.without_device() == "torch is not installed"


def test_every_part_fits_into_nine_minutes() -> None:
    seconds = [part.seconds for part in gpu.parts()]
    assert None not in seconds and sum(filter(None, seconds)) <= gpu.SECONDS < 9 * 60


def test_only_files_with_gpu_tests_are_collected() -> None:
    files = gpu.gpu_test_files()
    assert "tests/benchmarks/test_gpu.py" not in files
    assert all((ROOT / file).is_file() for file in files)


def test_the_gpu_benchmark_refuses_a_machine_without_one() -> None:
    done = run("benchmarks.gpu_attention", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode == CANNOT_RUN and "no CUDA device" in done.stderr


def test_the_gpu_benchmark_runs_interpreted(tmp_path: Path) -> None:
    done = run(
        *("benchmarks.gpu_attention", "--lengths", "256", "--heads", "4", "2", "--head-dim", "16"),
        *("--dtype", "float32", "--rounds", "1", "--out", str(tmp_path)),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads((tmp_path / "gpu_attention.json").read_text())["rows"]}
    assert rows["dense"]["density"] == rows["dense, chunks of 8192"]["density"] == 1
    # two query blocks of 128: the pages of the first, and of the second its own and page 0 of two past ones
    assert rows["sparse 5%"]["density"] == pytest.approx((128 * 129 / 2 * 2 + 128 * 64) / (256 * 257 / 2))
    assert rows["half dense, half 2%"]["density"] == pytest.approx((1 + rows["sparse 5%"]["density"]) / 2)
