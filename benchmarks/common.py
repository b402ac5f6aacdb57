"""What every benchmark does alike: name the device, time cases side by side, keep the results."""

import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over the rounds, in seconds. On a shared machine the CPU time is the honest one."""

    wall: float
    cpu: float  # of the process, per thread


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name, or the processor's with what tells its generation: "AMD EPYC, family 25 model 1, 2 threads"."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} threads"
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()}, {threads}"
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return f"{platform.machine()}, {threads}"
    return f"{facts['model name']}, family {facts['cpu family']} model {facts['model']}, {threads}"


def versions() -> dict[str, str]:
    """What ran: the interpreter and libraries that speed depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def interleaved_medians(cases: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Timing]:
    """Time each case once per round, A-B-A-B, so that all of them meet the same disturbances.

    A case is given the number of its round, to rotate its inputs. One round more goes before, untimed.
    """
    threads = torch.get_num_threads()
    walls: dict[str, list[float]] = {name: [] for name in cases}
    cpus: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(-1, rounds):
        for name, run in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(index)
            if index >= 0:
                cpus[name].append((time.process_time() - cpu) / threads)
                walls[name].append(time.perf_counter() - wall)
    return {name: Timing(statistics.median(walls[name]), statistics.median(cpus[name])) for name in cases}


def gemm_ceiling(dtype: torch.dtype, rounds: int = 3) -> float:
    """GFLOP/s of a 2048^3 matrix product, by CPU time."""
    size = 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    timing = interleaved_medians({"gemm": lambda _: a @ b}, rounds)["gemm"]
    return 2 * size**3 / timing.cpu / 1e9


def write_results(benchmark: str, results: Mapping[str, Any], device: torch.device | None = None) -> Path:
    """Write JSON to results/<device>/<benchmark>.json, with the device's name, versions and command."""
    name = device_name(device)
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])
    content = {"device": name, "versions": versions(), "command": command, **results}
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
