"""The kernels compile for GPUs that are not there, without spills, as docs/kernels.md says."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sparse.kernels import aot
from sparse.kernels.triton_attention import TILES

ROOT = Path(__file__).parents[2]
ROW = aot.Row("attention sm_90", 200, 0, 100_000, "HGMMA", 24)


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton compiles only where TRITON_INTERPRET was unset when it was imported."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "sparse.kernels.aot", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def test_a_build_for_each_architecture_is_what_the_table_says() -> None:
    names = [
        "sm_80 bf16 D128, 64 rows of 1 head: pages, units of 1",
        "sm_90 bf16 D128, 128 rows of 4 heads: dense",
        "sm_90 bf16 D128, 128 rows of 4 heads: pages, units of 1",
        "sm_100 bf16 D64, 128 rows of 4 heads: pages, units of 1",
    ]
    done = run_aot("--check", *(word for name in names for word in ("--exactly", f"attention {name}")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 spilled") == len(names), done.stdout


def test_the_table_has_a_row_for_every_build_and_no_other() -> None:
    _, rows = aot.read_table(aot.TABLE_FILE.read_text())
    assert list(rows) == [build.name for build in aot.builds()]


def test_nothing_in_the_table_spills_or_outgrows_its_gpu() -> None:
    _, rows = aot.read_table(aot.TABLE_FILE.read_text())
    most_shared = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one program may have
    for build in aot.builds():
        row = rows[build.name]
        assert row.spilled == 0 and row.instructions > 0, row
        assert row.shared <= most_shared[build.architecture], row
        num_threads = 32 * (build.options["num_warps"] or 0)
        assert row.registers * num_threads <= 64 * 1024, row  # the registers of a multiprocessor


def test_every_tile_is_built() -> None:
    built = {(b.architecture, b.constants["BLOCK_M"], *b.options.values()) for b in aot.builds()}
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
    assert "not in kernels.md" in aot.complaints(ROW, None, same_triton=True)[0]


def test_the_table_reads_back_as_it_was_written() -> None:
    rows = [ROW, replace(ROW, name="attention sm_80", tensor_core="HMMA")]
    version, found = aot.read_table(f"# title\n{aot.BEGIN}\n{aot.table(rows)}\n{aot.END}\n")
    assert version == aot.triton.__version__ and list(found.values()) == rows


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--check"], {"TRITON_INTERPRET": "1"}, "unset it"),
        (["--exactly", "anything"], {}, "--check"),
        (["--check", "--exactly", "no such build"], {}, "no build"),
    ],
)
def test_refusals_say_what_to_do(arguments: list[str], environment: dict[str, str], says: str) -> None:
    done = run_aot(*arguments, **environment)
    assert done.returncode == 2 and says in done.stderr, done.stderr
