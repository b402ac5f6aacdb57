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
    everything = gpu.gpu_test_files(["."])
    assert "tests/benchmarks/test_gpu.py" not in everything
    assert all((ROOT / file).is_file() for file in everything)
    run_by_parts = [word for part in gpu.parts() for word in part.arguments if word.startswith("tests/")]
    assert sorted(run_by_parts) == everything  # each once


def test_the_steps_benchmark_runs_interpreted_without_graphs(tmp_path: Path) -> None:
    done = run(
        *("benchmarks.gpu_steps", "--rows", "2x40", "--steps", "2", "--layers", "1", "--heads", "4", "2"),
        *("--head-dim", "16", "--mlp", "64", "--vocab", "100", "--dtype", "float32", "--out", str(tmp_path)),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "gpu_steps.json").read_text())["rows"]
    assert (row["batch"], row["tokens"]) == (2, 40) and row["plain"] > 0 and row["graphs"] is None


def test_the_attention_benchmark_runs_interpreted(tmp_path: Path) -> None:
    done = run(
        *("benchmarks.gpu_attention", "--lengths", "256", "--heads", "2", "2", "--head-dim", "16"),
        *("--dtype", "float32", "--rounds", "1", "--out", str(tmp_path)),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_attention.json").read_text())
    rows = {row["case"]: row for row in results["rows"]}
    assert [row["case"] for row in results["index"]] == [
        "estimator, 64 rows",
        "select for 128 rows, estimator included",
        "attention over what was selected",
    ]
    assert rows["dense"]["density"] == rows["dense, chunks of 8192"]["density"] == 1
    # two query blocks of 128: the pages of the first, and of the second its own and page 0 of two past ones
    assert rows["sparse 5%"]["density"] == pytest.approx((128 * 129 / 2 * 2 + 128 * 64) / (256 * 257 / 2))
    assert rows["half dense, half 2%"]["density"] == pytest.approx((1 + rows["sparse 5%"]["density"]) / 2)


@pytest.mark.parametrize("pages", [(), ("--page-dtype", "int8")], ids=["as computed", "int8"])
def test_the_decode_benchmark_runs_interpreted(tmp_path: Path, pages: tuple[str, ...]) -> None:
    done = run(
        *("benchmarks.gpu_decode", "--rows", "1x200", "2x70", "--layers", "2", "--heads", "4", "2"),
        *("--head-dim", "16", "--dtype", "float32", "--rounds", "1", "--compact", "128"),
        *("--compact-layers", "2", "--out", str(tmp_path), *pages),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_decode.json").read_text())
    rows = {(row["case"], row["batch"], row["tokens"]): row for row in results["rows"]}
    assert set(rows) == {(case, *each) for case in ("attention", "step") for each in ((1, 200), (2, 70))}
    head = 16 + 4 if pages else 16 * 4  # bytes, and of int8 a scale
    keys_and_values = 2 * 2 * 2 * head  # layers, KV heads, keys and values
    assert rows["attention", 2, 70]["gb"] == pytest.approx(2 * 70 * keys_and_values / 1e9)
    assert rows["step", 2, 70]["gb"] > rows["attention", 2, 70]["gb"]
    assert {each["moves"] for each in results["compaction"]} == {"triton", "torch"}
    assert all(20 < each["kept"] < 45 for each in results["compaction"])


@pytest.mark.parametrize("benchmark", ["gpu_attention", "gpu_decode", "gpu_steps"])
def test_the_gpu_benchmarks_refuse_a_machine_without_one(benchmark: str) -> None:
    done = run(f"benchmarks.{benchmark}", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode == CANNOT_RUN and "no CUDA device" in done.stderr
