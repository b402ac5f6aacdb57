"""What this process may take of its machine: cores and memory, within the limits of its container."""

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def cores(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """CPUs that it may run on, or as much time as so many have, rounded up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _folders(proc, groups, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # of cgroups v2: "max", or microseconds
        if not quota:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # v1 says -1 where there is no limit
            found = min(found, max(1, math.ceil(int(quota) / int(period))))
    return found


def free_memory(proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Bytes that it can still get, by the kernel's own estimate; None where no kernel tells."""
    lines = _read(proc / "meminfo").splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not available:
        return None
    left = [_left(folder) for folder in _folders(proc, groups, "memory")]
    return max(0, min(available + [count for count in left if count is not None]))


def reuse_freed_memory(up_to: int) -> bool:
    """Let this process keep blocks of up to so many bytes that it frees, and use them again.

    By default, the C library gives large ones back and asks anew, and the kernel zeroes them, page by page.
    False where the library cannot be asked (not glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, up_to) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def _left(folder: Path) -> int | None:
    """Bytes to the limit of this control group, if it has one. Files that were read once make way."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file "),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        most, taken = _read(folder / limit), _read(folder / used)
        if most.isdecimal() and taken.isdecimal():
            lines = _read(folder / "memory.stat").splitlines()
            reclaimable = sum(int(line.removeprefix(cached)) for line in lines if line.startswith(cached))
            return int(most) - int(taken) + reclaimable
    return None


def _folders(proc: Path, groups: Path, controller: str) -> Iterator[Path]:
    """Those of this process's control group and of all that it lies in: the limits of each hold."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = groups / controller if controllers else groups  # cgroups v2 has one tree for all
        inside = top / path.lstrip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(top))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
