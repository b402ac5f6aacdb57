"""What every benchmark does alike: name the device, time cases side by side, keep the results."""

import importlib.metadata
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts import CANNOT_RUN, ROOT
from configs.errors import ConfigError

RESULTS = ROOT / "benchmarks" / "results"


class CannotRun(Exception):
    """What a benchmark needs is not here. The message says what."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over the rounds, in seconds. On a shared machine the CPU time is the honest one."""

    wall: float
    cpu: float  # of the process, per thread
    walls: tuple[float, ...]  # of each round

    def json(self) -> dict[str, Any]:
        walls = [round(wall, 6) for wall in self.walls]
        return {"wall_s": round(self.wall, 6), "cpu_s_per_thread": round(self.cpu, 6), "walls_s": walls}


@dataclass(frozen=True, slots=True)
class Elapsed:
    """What a case took, in seconds, by the clocks of the process that did the work."""

    wall: float
    cpu: float  # over all threads


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name, or the processor's and its generation: "AMD EPYC, family 25 model 1, 2 threads"."""
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
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    for package in ("transformers", "triton", "tokenizers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def interleaved_medians(cases: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Timing]:
    """Time each case once per round, A-B-A-B, so that all of them meet the same disturbances.

    A case is given the number of its round, to rotate its inputs. One round more goes before, untimed.
    Where a case returns Elapsed, another process did the work: that counts, not what was seen from here.
    """
    threads = torch.get_num_threads()
    walls: dict[str, list[float]] = {name: [] for name in cases}
    cpus: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(-1, rounds):
        for name, run in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            done = run(index)
            took = Elapsed(time.perf_counter() - wall, time.process_time() - cpu)
            if isinstance(done, Elapsed):
                took = done
            if index >= 0:
                cpus[name].append(took.cpu / threads)
                walls[name].append(took.wall)
    return {
        name: Timing(statistics.median(walls[name]), statistics.median(cpus[name]), tuple(walls[name]))
        for name in cases
    }


def gemm_ceiling(dtype: torch.dtype, rounds: int = 3) -> float:
    """GFLOP/s of a matrix product, by CPU time; small enough for a processor that emulates the dtype."""
    size = 1024
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    timing = interleaved_medians({"gemm": lambda _: a @ b}, rounds)["gemm"]
    return 2 * size**3 / timing.cpu / 1e9


def git_commit() -> str | None:
    """The commit of this tree, "+changes" if files differ from it; None outside git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # Results of earlier benchmarks are files of this tree, too: they change no number.
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}+changes" if commit and changed else commit


def results_folder(device: torch.device | None = None) -> Path:
    """results/<device>: where the numbers of this device are kept."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def write_results(
    benchmark: str,
    results: Mapping[str, Any],
    device: torch.device | None = None,
    folder: Path | None = None,
) -> Path:
    """Write JSON to results/<device>/<benchmark>.json, with the device's name, versions, commit and command.

    Written whole or not at all: benchmarks save as they go, and may be stopped at any time.
    """
    folder = folder or results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    module = getattr(sys.modules["__main__"].__spec__, "name", f"benchmarks.{benchmark}")
    # Files by name only: the folders of a machine are nobody's business.
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    content = {
        "device": device_name(device),
        "versions": versions(),
        "commit": git_commit(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *words]),
        **results,
    }
    path = folder / f"{benchmark}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for a person: words to the left, numbers to the right."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bare CUDA machine: it still measures
        for line in ([title], headings, *rows):
            print("  ".join(map(_shown, line)))
        return

    table = Table(title=title, title_justify="left")
    for column, heading in enumerate(headings):
        numeric = any(isinstance(row[column], int | float) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_shown, row))
    # A file or a pipe has no width of its own: columns must not be cut to 80 characters there.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    return str(cell)


def exit_with(main: Callable[[], None]) -> None:
    """Run a benchmark's main. What it cannot do without ends it with the words for it and CANNOT_RUN."""
    try:
        main()
    except ConfigError as error:  # a plan or model as given: the words are for whoever gave it
        print(error, file=sys.stderr)
        sys.exit(2)
    except CannotRun as error:
        print(f"cannot run: {error}", file=sys.stderr)
        sys.exit(CANNOT_RUN)
