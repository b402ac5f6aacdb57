"""A process takes no more cores and memory than its container may have, in either kind of control groups."""

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configs.machine import cores, free_memory

GIB = 2**30
ROOT = Path(__file__).parents[2]


def machine(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """64 GiB free on the host; this process in these control groups, which have these files."""
    proc, tree = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    return proc, tree


NEW = {
    "memory.max": "max\n",
    "pod/memory.max": f"{16 * GIB}\n",
    "pod/memory.current": f"{5 * GIB}\n",
    "pod/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 9\n",
    "pod/one/memory.max": "max\n",
    "pod/one/memory.current": f"{4 * GIB}\n",
}
OLD = {
    "memory/memory.limit_in_bytes": f"{16 * GIB}\n",
    "memory/memory.usage_in_bytes": f"{5 * GIB}\n",
    "memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n",
}


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/pod/one\n", NEW, 12 * GIB),
        ("0::/\n", NEW, 64 * GIB),
        ("5:devices:/x\n4:memory:/docker/of/the/host\n", OLD, 12 * GIB),
        ("4:cpu,memory:/\n", OLD, 12 * GIB),
        ("4:memory:/\n", {**OLD, "memory/memory.limit_in_bytes": "9223372036854771712\n"}, 64 * GIB),
        ("0::/\n", {"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}, 0),
        ("", {}, 64 * GIB),
    ],
    ids=["v2, of the pod", "v2, none", "v1", "v1, beside others", "v1, none", "more than all", "no groups"],
)
def test_free_memory_ends_at_the_limit_of_the_container(
    tmp_path: Path, groups: str, files: dict[str, str], free: int
) -> None:
    assert free_memory(*machine(tmp_path, groups, files)) == free


def test_free_memory_is_not_guessed(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/one\n", {"one/cpu.max": "250000 100000\n"}, 3),
        ("0::/one\n", {"one/cpu.max": "max 100000\n", "cpu.max": "10000 100000\n"}, 1),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("", {}, 8),
    ],
    ids=["v2", "v2, of the pod", "v1", "v1, none", "no groups"],
)
def test_cores_are_those_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert cores(*machine(tmp_path, groups, files)) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_used_again() -> None:
    """In a process of its own: the setting holds for good."""
    script = textwrap.dedent("""
        import ctypes
        import resource
        from configs.machine import reuse_freed_memory

        libc, size = ctypes.CDLL(None), 48 << 20
        libc.malloc.restype = ctypes.c_void_p

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
            ctypes.memset(block, 1, size)
            libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        faults()
        assert faults() > 20, "given back, and asked for anew"  # pages, large ones perhaps
        assert reuse_freed_memory(1 << 28)
        faults()
        assert faults() < 10
    """)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
