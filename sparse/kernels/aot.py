"""Compiles the Triton kernels for GPUs that are not there, and keeps what came out in docs/kernels.md.

python -m sparse.kernels.aot                    compile everything, rewrite the table
python -m sparse.kernels.aot --check            compile everything, compare with the table
python -m sparse.kernels.aot --check --only "sm_90 D128"     the rows whose name contains this
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse.kernels import triton_attention
from sparse.kernels.triton_attention import NO_FEATURES, Features

TABLE_FILE = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: python -m sparse.kernels.aot -->", "<!-- end -->"
COLUMNS = ("kernel", "registers", "spilled bytes", "shared bytes", "tensor core", "instructions")
ARCHITECTURES = (80, 90, 100)
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # mma.sync, wgmma, tcgen05.mma as disassembled
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# what families ask for together: gpt-oss, Mistral, Gemma 2 27B and 9B, Gemma 3; then all at once
FEATURED = (
    (64, Features(window=128, sinks=torch.empty(1))),
    (128, Features(window=4096)),
    (128, Features(window=4096, softcap=50.0)),
    (256, Features(window=4096, softcap=50.0)),
    (256, Features(window=4096)),
    (64, Features(window=4096, softcap=50.0, sinks=torch.empty(1))),
    (128, Features(window=4096, softcap=50.0, sinks=torch.empty(1))),
)


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as its launcher would make it on that architecture."""

    name: str
    kernel: Any  # triton's JITFunction
    architecture: int
    types: dict[str, str]  # argument -> Triton's name of its type; None = passed as None
    constants: dict[str, int | float | bool]
    options: dict[str, int | bool | None]  # Triton's, as the launcher passes them


@dataclass(frozen=True, slots=True)
class Row:
    """What the compiler made of a build."""

    name: str
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes of shared memory per program
    tensor_core: str  # the instruction that multiplies
    instructions: int  # how many of them there are


def builds() -> Iterator[Build]:
    """Every head size and tile with the part that needs most registers; the others where a head has 128."""
    for architecture in ARCHITECTURES:
        for head_dim, pack in itertools.product((64, 80, 96, 128, 256), (1, 4)):
            yield attention_build(architecture, head_dim, pack, unit=1)
        for unit, pack in itertools.product((None, 0, 8), (1, 4)):
            yield attention_build(architecture, 128, pack, unit)
        yield attention_build(architecture, 128, 4, unit=1, dtype="fp16")
        for head_dim, features in FEATURED:
            yield attention_build(architecture, head_dim, 4, unit=1, features=features)


def attention_build(
    architecture: int,
    head_dim: int,
    pack: int,
    unit: int | None,
    features: Features = NO_FEATURES,
    dtype: str = "bf16",
) -> Build:
    """Query blocks of 64, one head per tile or four packed; unit as in triton_attention.constants."""
    kernel = triton_attention._attend_kernel
    query_block = 128 if unit is None else 64
    tile = triton_attention.tile_for(architecture, head_dim, pack * query_block)
    types = dict.fromkeys(("q", "k_pool", "v_pool", "out"), f"*{dtype}")
    types |= dict.fromkeys(("pages", "counts", "indices", "unit_counts", "unit_indices"), "*i32")
    types |= dict.fromkeys(("order", "starts", "unit_starts"), "*i64")
    types |= {"sinks": "*fp32", "lse": "*fp32", "factor": "fp32"}
    types |= dict.fromkeys(("start", "num_rows", "num_blocks"), "i32")
    types |= {name: "i32" for name in kernel.arg_names if name.startswith("stride_")}
    absent = set() if features.sinks is not None else {"sinks"}
    if unit is None:
        absent |= {"order", "starts", "counts", "indices"}
    if not unit:
        absent |= {"unit_starts", "unit_counts", "unit_indices"}
    part = "dense" if unit is None else f"pages, units of {unit}" if unit else "pages"
    extras = "".join(
        f" +{field.name}" for field in fields(features) if getattr(features, field.name) is not None
    )
    shape = f"D{head_dim}, {tile.rows} rows of {pack} head{'s' if pack > 1 else ''}"
    return Build(
        name=f"attention sm_{architecture} {dtype} {shape}: {part}{extras}",
        kernel=kernel,
        architecture=architecture,
        types={name: type_ for name, type_ in types.items() if name not in absent},
        constants=triton_attention.constants(
            head_dim=head_dim,
            group=4,
            pack=pack,
            share=1,
            query_block=query_block,
            rows=tile.rows,
            unit=unit,
            features=features,
            interpreted=False,
        ),
        options=tile.options(),
    )


def compile_build(build: Build) -> Row:
    """Compile to machine code and read it."""
    signature: dict[str, str] = {}
    constexprs: dict[str, int | float | bool | None] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for place, name in enumerate(build.kernel.arg_names):
        if name in build.types:
            signature[name] = build.types[name]
            # what the launcher's tensors have in common, and Triton looks for when it specialises
            if name.startswith(("stride_q", "stride_out")) or signature[name].startswith("*"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constexprs[name] = build.constants.get(name)
    compiled = triton.compile(
        ASTSource(build.kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", build.architecture, 32),
        options=build.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output("cuobjdump", "-res-usage", cubin.name)
        code = _output("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    tensor_core = TENSOR_CORE[build.architecture]
    return Row(
        name=build.name,
        registers=int(found[1]),
        spilled=int(found[2]),
        shared=int(compiled.metadata.shared),
        tensor_core=tensor_core,
        instructions=len(re.findall(rf"\b{tensor_core}\b", code)),
    )


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def complaints(row: Row, committed: Row | None, *, same_triton: bool) -> list[str]:
    """What is wrong with a row: spills and no tensor cores always, growth where versions agree."""
    found = []
    if row.spilled:
        found.append(f"{row.name}: {row.spilled} bytes of registers spilled, 0 allowed")
    if row.instructions == 0:
        found.append(f"{row.name}: no {row.tensor_core} instruction")
    if committed is None:
        found.append(f"{row.name}: not in {TABLE_FILE.name}; run python -m sparse.kernels.aot")
    elif same_triton:
        for what, now, then in (
            ("registers", row.registers, committed.registers),
            ("bytes of shared memory", row.shared, committed.shared),
        ):
            if now > then:
                found.append(f"{row.name}: {now} {what}, {then} in {TABLE_FILE.name}")
    return found


def table(rows: list[Row]) -> str:
    """Markdown, with the version of Triton that `read_table` looks for."""
    lines = [f"Triton {triton.__version__}, {len(rows)} builds.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * 3 + "---|---:|"]
    lines += ["| " + " | ".join(str(value) for value in astuple(row)) + " |" for row in rows]
    return "\n".join(lines)


def read_table(text: str) -> tuple[str, dict[str, Row]]:
    """The version of Triton and the rows by name, from the text of the table's file."""
    body = text.split(BEGIN)[1].split(END)[0]
    version = re.search(r"Triton (\S+),", body)
    assert version is not None, body[:100]
    rows = {}
    for line in body.splitlines():
        if line.startswith("| attention"):
            name, registers, spilled, shared, tensor_core, instructions = line.strip("| ").split(" | ")
            rows[name] = Row(name, int(registers), int(spilled), int(shared), tensor_core, int(instructions))
    return version[1], rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sparse.kernels.aot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--exactly", metavar="NAME", action="append", help="with --check: only this row")
    options = parser.parse_args(arguments)
    if options.exactly and not options.check:
        parser.error("--exactly needs --check: a part of the table cannot replace all of it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    chosen = list(builds())
    if options.exactly:
        unknown = set(options.exactly) - {build.name for build in chosen}
        if unknown:
            parser.error(f"no build is called {', '.join(sorted(unknown))}; {TABLE_FILE.name} lists them")
        chosen = [build for build in chosen if build.name in options.exactly]

    version, committed = read_table(TABLE_FILE.read_text()) if options.check else ("", {})
    same_triton = version == triton.__version__
    if options.check and not same_triton:
        print(
            f"The table is of Triton {version}, this is {triton.__version__}: only spills must be the same."
        )
    rows, problems = [], []
    for build in chosen:
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
        text = TABLE_FILE.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        TABLE_FILE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
