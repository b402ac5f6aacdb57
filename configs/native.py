"""Compiling a C++ source of ours once per machine: for this processor and torch, kept in the user's cache.

    python -m configs.native engine/*.cpp

compiles now what the first start would.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HEADERS = Path(__file__).parent  # native.h
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-fopenmp",
)
TIMEOUT = 300.0  # seconds for one compilation; it takes about ten


logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """A source could not be compiled or loaded here; the message says why."""


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`, or None where it cannot be had: the log says why, once, and torch serves."""
    try:
        return load_library(source)
    except BuildError as error:
        logger.warning("%s is not compiled, torch serves in its place: %s", source.name, error)
        return None


def compiler() -> str | None:
    """GCC's C++ compiler, if there is one: the kernels use its vector extensions and OpenMP."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def load_library(source: Path, *flags: str) -> ctypes.CDLL:
    """The compiled `source`, from the cache or built now. Processes that ask at once build it once.

    Headers beside the source and those of torch are found; torch's libraries are linked. Raises BuildError.
    """
    compiler_path, torch_folder = compiler(), _torch_folder()
    if compiler_path is None:
        raise BuildError("no C++ compiler: install g++, or name one in CXX")
    command = [
        compiler_path,
        *FLAGS,
        *flags,
        *_torch_flags(torch_folder),
        f"-I{HEADERS}",
        f"-I{source.parent}",
    ]
    try:
        file = cache_folder() / f"{source.stem}-{_key(source, command)}.so"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, or with the process
                if not file.exists():
                    _compile([*command, str(source), *_torch_libraries(torch_folder)], file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise BuildError(str(error)) from error


def cache_root() -> Path:
    """What is made once per machine is kept below: $FARSPAN_CACHE, else ~/.cache/farspan."""
    root = os.environ.get("FARSPAN_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "farspan"


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return cache_root() / "kernels"


def _compile(command: list[str], file: Path) -> None:
    """Run the compiler; the file appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built = Path(folder) / file.name
        try:
            result = subprocess.run(
                [*command, "-o", str(built)], capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {TIMEOUT:.0f} s") from error
        if result.returncode != 0:
            raise BuildError(f"{command[0]} failed:\n{result.stderr[:4000]}")
        built.replace(file)


def _torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _torch_flags(torch_folder: Path) -> list[str]:
    include = torch_folder / "include"
    return [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]


def _torch_libraries(torch_folder: Path) -> list[str]:
    """torch itself and the OpenMP it brings: a second copy of that would start a second pool of threads."""
    libraries = torch_folder / "lib"
    openmp = [str(path) for path in sorted(libraries.glob("libgomp*.so*"))]
    return [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", *openmp]


def _key(source: Path, command: list[str]) -> str:
    """Changes with anything that could change the library: text, flags, compiler, torch, processor."""
    texts = [
        path.read_bytes() for path in (source, *sorted({*source.parent.glob("*.h"), *HEADERS.glob("*.h")}))
    ]
    binary = os.stat(command[0])
    facts = [
        *command,
        str(binary.st_size),
        str(binary.st_mtime_ns),
        importlib.metadata.version("torch"),
        processor(),
    ]
    digest = hashlib.sha256()
    for part in (*texts, *(fact.encode() for fact in facts)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]


def processor() -> str:
    """What the first processor says of itself that decides which instructions `-march=native` may use."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def main(arguments: list[str]) -> None:
    """Compile these sources; one that cannot be is no failure, for torch serves in its place."""
    for argument in arguments:
        source = Path(argument).absolute()
        print(f"{argument}: {'compiled' if library(source) else 'torch serves in its place'}")


if __name__ == "__main__":
    main(sys.argv[1:])
