"""The Triton kernels compile for GPUs that are not there, without spills, as docs/kernels.md says."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kvcache.kernels.aot
import sparse.kernels.aot
from configs import aot
from sparse.kernels.triton_attention import TILES

ROOT = Path(__file__).parents[1]
ROW = aot.Row("attention sm_90", 200, 0, 100_000, "HGMMA", 24)
BUILDS = {"sparse": list(sparse.kernels.aot.builds()), "kvcache": list(kvcache.kernels.aot.builds())}
# of each package, some that CI compiles: every architecture, and every kind of kernel
COMPILED = {
    "sparse": [
        "attention sm_80 bf16 D128, 64 rows of 1 head: pages, units of 1",
        "attention sm_90 bf16 D128, 128 rows of 4 heads: dense",
        "attention sm_100 bf16 D64, 128 rows of 4 heads: pages, units of 1",
        "estimator sm_90 bf16 D128: lines",
        "antidiagonals sm_90 bf16 D128, 16 apart",
        "descents sm_80 bf16 D128, means of 4",
    ],
    "kvcache": [
        "rows sm_80 bf16 D64, 4 heads, split +window +sinks",
        "rows sm_90 bf16 D128, 4 heads, split",
        "merge sm_90 bf16 D128",
        "gather sm_100 bf16 D128",
    ],
}


@pytest.mark.parametrize("package", BUILDS)
def test_a_build_for_each_architecture_is_what_the_table_says(package: str) -> None:
    names = COMPILED[package]
    # in a process of its own: Triton compiles only where TRITON_INTERPRET was unset when it was imported
    command = [sys.executable, "-m", f"{package}.kernels.aot", "--check"]
    done = subprocess.run(
        [*command, *(word for name in names for word in ("--exactly", name))],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 spilled") == len(names), done.stdout


@pytest.mark.parametrize("package", BUILDS)
def test_the_table_has_a_row_for_every_build_and_no_other(package: str) -> None:
    _, rows = aot.read_table(aot.TABLE_FILE.read_text(), package)
    assert list(rows) == [build.name for build in BUILDS[package]]


@pytest.mark.parametrize("package", BUILDS)
def test_nothing_in_the_table_spills_or_outgrows_its_gpu(package: str) -> None:
    _, rows = aot.read_table(aot.TABLE_FILE.read_text(), package)
    most_shared = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one program may have
    for build in BUILDS[package]:
        row = rows[build.name]
        assert row.spilled == 0 and row.tensor_core == build.tensor_core, row
        assert row.instructions > 0 or not row.tensor_core, row
        assert row.shared <= most_shared[build.architecture], row
        num_threads = 32 * (build.options["num_warps"] or 0)
        assert row.registers * num_threads <= 64 * 1024, row  # the registers of a multiprocessor


def test_every_tile_is_built() -> None:
    built = {(b.architecture, b.constants.get("BLOCK_M"), *b.options.values()) for b in BUILDS["sparse"]}
    tiles = {
        (architecture, tile.rows, *tile.options().values())
        for architecture, by_shape in TILES.items()
        for tile in by_shape.values()
    }
    assert tiles <= built


def test_what_the_check_objects_to() -> None:
    assert aot.complaints(ROW, ROW, same_triton=True) == []
    for worse in (replace(ROW, registers=201), replace(ROW, shared=100_001)):
        assert len(aot.complaints(worse, ROW, same_triton=True)) == 1
        assert aot.complaints(worse, ROW, same_triton=False) == []
    for broken in (replace(ROW, spilled=8), replace(ROW, instructions=0)):
        assert len(aot.complaints(broken, ROW, same_triton=False)) == 1
    copies = replace(ROW, tensor_core="", instructions=0)
    assert aot.complaints(copies, copies, same_triton=True) == []
    assert "not in kernels.md" in aot.complaints(ROW, None, same_triton=True)[0]


def test_the_table_reads_back_as_it_was_written_and_leaves_others_alone() -> None:
    text = f"# title\n{aot.begin('sparse')}\n{aot.END}\n# more\n{aot.begin('kvcache')}\n{aot.END}\nthe end\n"
    rows = [ROW, replace(ROW, name="store sm_80", tensor_core="", instructions=0)]
    text = aot.write_table(aot.write_table(text, "sparse", rows), "kvcache", rows[:1])
    for package, expected in (("sparse", rows), ("kvcache", rows[:1])):
        version, found = aot.read_table(text, package)
        assert version == aot.triton.__version__ and list(found.values()) == expected
    assert text.startswith("# title\n") and "\n# more\n" in text and text.endswith("\nthe end\n")


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--check"], {"TRITON_INTERPRET": "1"}, "unset it"),
        (["--exactly", "anything"], {}, "--check"),
        (["--check", "--exactly", "no such build"], {}, "no build"),
    ],
)
def test_refusals_say_what_to_do(
    arguments: list[str],
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        aot.main("kvcache", BUILDS["kvcache"], arguments)
    assert says in capsys.readouterr().err
