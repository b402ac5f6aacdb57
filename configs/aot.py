"""Compiles Triton kernels for GPUs that are not there, and keeps what came out in docs/kernels.md.

    python -m PACKAGE.kernels.aot             compile everything, rewrite the table of the package
    python -m PACKAGE.kernels.aot --check     compile everything, compare with the table

`PACKAGE.kernels.aot` lists the builds of a package; this does the rest.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE_FILE = Path(__file__).parents[1] / "docs" / "kernels.md"
END = "<!-- end -->"
COLUMNS = ("kernel", "registers", "spilled bytes", "shared bytes", "tensor core", "instructions")
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as its launcher would make it on that architecture."""

    name: str
    kernel: Any  # triton's JITFunction
    architecture: int
    types: dict[str, str]  # argument -> Triton's name of its type; None = passed as None
    constants: Mapping[str, int | float | bool]
    options: Mapping[str, int | bool | None]  # Triton's, as the launcher passes them
    tensor_core: str  # the instruction that must multiply, as disassembled; "" = nothing is multiplied


@dataclass(frozen=True, slots=True)
class Row:
    """What the compiler made of a build."""

    name: str
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes of shared memory per program
    tensor_core: str  # the instruction that multiplies, "" = none should
    instructions: int  # how many of them there are


def begin(package: str) -> str:
    """The line that a package's table starts after."""
    return f"<!-- begin: python -m {package}.kernels.aot -->"


def compile_build(build: Build) -> Row:
    """Compile to machine code and read it."""
    signature: dict[str, str] = {}
    constexprs: dict[str, int | float | bool | None] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for place, name in enumerate(build.kernel.arg_names):
        if name in build.types:
            signature[name] = build.types[name]
            # what the launcher's tensors have in common, and Triton looks for when it specialises
            is_pointer = signature[name].startswith("*")
            is_aligned = is_pointer and not build.kernel.params[place].do_not_specialize_on_alignment
            if name.startswith(("stride_q", "stride_out")) or is_aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constexprs[name] = build.constants.get(name)
    compiled = triton.compile(
        ASTSource(build.kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", build.architecture, 32),
        options=dict(build.options),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output("cuobjdump", "-res-usage", cubin.name)
        code = _output("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Row(
        name=build.name,
        registers=int(found[1]),
        spilled=int(found[2]),
        shared=int(compiled.metadata.shared),
        tensor_core=build.tensor_core,
        instructions=len(re.findall(rf"\b{build.tensor_core}\b", code)) if build.tensor_core else 0,
    )


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def complaints(row: Row, committed: Row | None, *, same_triton: bool) -> list[str]:
    """What is wrong with a row: spills and no tensor cores always, growth where versions agree."""
    found = []
    if row.spilled:
        found.append(f"{row.name}: {row.spilled} bytes of registers spilled, 0 allowed")
    if row.tensor_core and row.instructions == 0:
        found.append(f"{row.name}: no {row.tensor_core} instruction")
    if committed is None:
        found.append(f"{row.name}: not in {TABLE_FILE.name}; compile without --check")
    elif same_triton:
        for what, now, then in (
            ("registers", row.registers, committed.registers),
            ("bytes of shared memory", row.shared, committed.shared),
        ):
            if now > then:
                found.append(f"{row.name}: {now} {what}, {then} in {TABLE_FILE.name}")
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown, with the version of Triton that `read_table` looks for."""
    lines = [f"Triton {triton.__version__}, {len(rows)} builds.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * 3 + "---|---:|"]
    lines += ["| " + " | ".join(str(value) for value in astuple(row)) + " |" for row in rows]
    return "\n".join(lines)


def read_table(text: str, package: str) -> tuple[str, dict[str, Row]]:
    """The version of Triton and the rows of a package by name, from the text of the table's file."""
    body = text.split(begin(package))[1].split(END)[0]
    version = re.search(r"Triton (\S+),", body)
    assert version is not None, body[:100]
    rows = {}
    for line in body.splitlines():
        name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        if len(numbers) == 5 and numbers[0].isdigit():
            registers, spilled, shared, tensor_core, instructions = numbers
            rows[name] = Row(name, int(registers), int(spilled), int(shared), tensor_core, int(instructions))
    return version[1], rows


def write_table(text: str, package: str, rows: Sequence[Row]) -> str:
    """The text of the table's file with these rows in place of the package's."""
    before, after = text.split(begin(package))
    return f"{before}{begin(package)}\n{table(rows)}\n{END}{after.split(END, 1)[1]}"


def main(package: str, builds: Sequence[Build], arguments: Sequence[str]) -> int:
    """The command: exit status 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.kernels.aot",
        description="Compile the Triton kernels of a package for GPUs that are not there.",
    )
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--exactly", metavar="NAME", action="append", help="with --check: only this row")
    options = parser.parse_args(arguments)
    if options.exactly and not options.check:
        parser.error("--exactly needs --check: a part of the table cannot replace all of it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    if options.exactly:
        unknown = set(options.exactly) - {build.name for build in builds}
        if unknown:
            parser.error(f"no build is called {', '.join(sorted(unknown))}; {TABLE_FILE.name} lists them")
        builds = [build for build in builds if build.name in options.exactly]

    version, committed = read_table(TABLE_FILE.read_text(), package) if options.check else ("", {})
    same_triton = version == triton.__version__
    if options.check and not same_triton:
        print(
            f"The table is of Triton {version}, this is {triton.__version__}: only spills must be the same."
        )
    rows, problems = [], []
    for build in builds:
        row = compile_build(build)
        print(
            f"{row.name}: {row.registers} registers, {row.spilled} spilled, {row.shared} shared", flush=True
        )
        rows.append(row)
        if options.check:
            problems += complaints(row, committed.get(row.name), same_triton=same_triton)
        else:
            problems += complaints(row, row, same_triton=True)
    if not options.check:
        TABLE_FILE.write_text(write_table(TABLE_FILE.read_text(), package, rows))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
