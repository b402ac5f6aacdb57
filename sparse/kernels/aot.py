"""The builds of the prefill kernels: `python -m sparse.kernels.aot` compiles them, see configs/aot.py."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import fields

import torch

from configs.aot import ARCHITECTURES, Build, main
from configs.features import NO_FEATURES, Features
from sparse.antidiagonals import STRIDES
from sparse.kernels import (
    triton_antidiagonals,
    triton_attention,
    triton_descent,
    triton_energy,
    triton_estimator,
    triton_lines,
    triton_means,
    triton_pooled,
)

# mma.sync, wgmma, tcgen05.mma as disassembled: what 64 rows or more are multiplied by
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
HEAD_DIMS = (64, 80, 96, 128, 256)

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


def builds() -> Iterator[Build]:
    """Every head size and tile with the part that needs most registers; the others where a head has 128."""
    for architecture in ARCHITECTURES:
        for head_dim, pack in itertools.product(HEAD_DIMS, (1, 4)):
            yield attention_build(architecture, head_dim, pack, unit=1)
        for unit, pack in itertools.product((None, 0, 8), (1, 4)):
            yield attention_build(architecture, 128, pack, unit)
        yield attention_build(architecture, 128, 4, unit=1, dtype="fp16")
        yield attention_build(architecture, 64, 4, unit=1, pages="i8")
        for pages in ("i8", "fp8e4nv") if architecture >= 90 else ("i8",):
            yield attention_build(architecture, 128, 4, unit=1, pages=pages)
            yield from estimator_builds(architecture, 128, pages)
        for head_dim, features in FEATURED:
            yield attention_build(architecture, head_dim, 4, unit=1, features=features)
        for head_dim in HEAD_DIMS:
            yield from estimator_builds(architecture, head_dim)
            yield from page_builds(architecture, head_dim)
        for pages in ("i8", "fp8e4nv") if architecture >= 90 else ("i8",):
            yield means_build(architecture, 128, pages)
        for stride in STRIDES:
            yield antidiagonals_build(architecture, 128, stride)
        for head_dim in (64, 256):
            yield antidiagonals_build(architecture, head_dim)
        yield antidiagonals_build(architecture, 128, pages="i8")
        yield from lines_builds(architecture)
        for head_dim in HEAD_DIMS:
            yield descents_build(architecture, head_dim)
        yield descents_build(architecture, 128, stride=4)
        for pages in ("i8", "fp8e4nv") if architecture >= 90 else ("i8",):
            yield descents_build(architecture, 128, pages=pages)
        yield pieces_build(architecture)
        for head_dim in HEAD_DIMS:
            yield pooled_build(architecture, head_dim)
        yield pooled_build(architecture, 128, interleaved=True)
        for pages in ("i8", "fp8e4nv") if architecture >= 90 else ("i8",):
            yield pooled_build(architecture, 128, pages=pages)


def attention_build(
    architecture: int,
    head_dim: int,
    pack: int,
    unit: int | None,
    features: Features = NO_FEATURES,
    dtype: str = "bf16",
    pages: str | None = None,  # codes; None = as dtype says
) -> Build:
    """Query blocks of 64, one head per tile or four packed; unit as in triton_attention.constants."""
    kernel = triton_attention._attend_kernel
    query_block = 128 if unit is None else 64
    tile = triton_attention.tile_for(architecture, head_dim, pack * query_block)
    types = dict.fromkeys(("q", "out"), f"*{dtype}")
    types |= dict.fromkeys(("k_pool", "v_pool"), f"*{pages or dtype}")
    types |= dict.fromkeys(("k_scales", "v_scales"), "*fp32")
    types |= dict.fromkeys(("pages", "counts", "indices", "unit_counts", "unit_indices"), "*i32")
    types |= dict.fromkeys(("order", "starts", "unit_starts"), "*i64")
    types |= {"sinks": "*fp32", "lse": "*fp32", "factor": "fp32"}
    types |= dict.fromkeys(("start", "num_rows", "num_blocks"), "i32")
    types |= {name: "i32" for name in kernel.arg_names if name.startswith("stride_")}
    absent = set() if features.sinks is not None else {"sinks"}
    absent |= set() if pages else {"k_scales", "v_scales"}
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
        name=f"attention sm_{architecture} {dtype} {shape}: {part}{extras}{f' of {pages}' if pages else ''}",
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
        tensor_core=TENSOR_CORE[architecture],
    )


def estimator_builds(architecture: int, head_dim: int, pages: str | None = None) -> Iterator[Build]:
    """The rows' attention, the merge of its splits, and the sums by line; groups of 4 query heads."""
    types = dict.fromkeys(("q", "out"), "*bf16") | {"pages": "*i32", "factor": "fp32"}
    types |= dict.fromkeys(("k_pool", "v_pool"), f"*{pages or 'bf16'}")
    if pages:
        types |= dict.fromkeys(("k_scales", "v_scales"), "*fp32")
    types |= dict.fromkeys(("part_out", "part_lse", "lse", "columns", "diagonals"), "*fp32")
    types |= dict.fromkeys(("first", "num_rows", "num_pages", "num_splits", "num_runs", "run"), "i32")
    multiplied = triton_estimator.constants(head_dim=head_dim, group=4, interpreted=False)
    merged = triton_estimator.merge_constants(head_dim)
    options = triton_estimator.options(head_dim)
    tensor_core = TENSOR_CORE[architecture]
    for part, kernel, constants, chosen, multiplies in (
        ("attention", triton_estimator._attend_kernel, multiplied, options, tensor_core),
        ("merge", triton_estimator._merge_kernel, merged, triton_estimator.MERGE_OPTIONS, ""),
        ("lines", triton_estimator._lines_kernel, multiplied, options, tensor_core),
    ):
        if pages and part == "merge":
            continue  # reads no pages
        strides = {name: "i32" for name in kernel.arg_names if name.startswith("stride_")}
        yield Build(
            name=f"estimator sm_{architecture} bf16 D{head_dim}: {part}{f' of {pages}' if pages else ''}",
            kernel=kernel,
            architecture=architecture,
            types={name: type_ for name, type_ in types.items() if name in kernel.arg_names} | strides,
            constants=constants,
            options=chosen,
            tensor_core=multiplies,
        )


def means_build(architecture: int, head_dim: int, pages: str | None = None) -> Build:
    """Means of pages in bf16, or of codes."""
    types = {"pool": f"*{pages or 'bf16'}", "pages": "*i32", "means": "*fp32"}
    types |= {"scales": "*fp32"} if pages else {}
    types |= dict.fromkeys(("num_tokens", "num_pages", "stride_pages"), "i32")
    return Build(
        name=f"means sm_{architecture} {pages or 'bf16'} D{head_dim}",
        kernel=triton_means._means_kernel,
        architecture=architecture,
        types=types,
        constants=triton_means.constants(head_dim),
        options=triton_means.OPTIONS,
        tensor_core="",
    )


def page_builds(architecture: int, head_dim: int) -> Iterator[Build]:
    """Means of pages, and queries times means in groups of 4 query heads."""
    yield means_build(architecture, head_dim)
    types = {"q": "*bf16", "means": "*fp32", "energy": "*fp32", "factor": "fp32"}
    types |= dict.fromkeys(("start", "num_rows", "num_blocks", "num_pages"), "i32")
    yield Build(
        name=f"energy sm_{architecture} bf16 D{head_dim}",
        kernel=triton_energy._energy_kernel,
        architecture=architecture,
        types=types | dict.fromkeys(("stride_q_head", "stride_q_row"), "i32"),
        constants=triton_energy.constants(head_dim=head_dim, group=4, interpreted=False),
        options=triton_energy.options(head_dim),
        tensor_core=TENSOR_CORE[architecture],
    )


def antidiagonals_build(
    architecture: int, head_dim: int, stride: int = 16, pages: str | None = None
) -> Build:
    """Sums over antidiagonals by page, in groups of 4 query heads; over pages in bf16, or of codes."""
    kernel = triton_antidiagonals._antidiagonals_kernel
    types = {"q": "*bf16", "k_pool": f"*{pages or 'bf16'}", "pages": "*i32", "log_sums": "*fp32"}
    types |= {"factor": "fp32"} | ({"k_scales": "*fp32"} if pages else {})
    types |= dict.fromkeys(("start", "num_rows", "first_square", "num_squares", "num_pages"), "i32")
    shape = f"D{head_dim}, {stride} apart{f' of {pages}' if pages else ''}"
    return Build(
        name=f"antidiagonals sm_{architecture} bf16 {shape}",
        kernel=kernel,
        architecture=architecture,
        types=types | {name: "i32" for name in kernel.arg_names if name.startswith("stride_")},
        constants=triton_antidiagonals.constants(
            head_dim=head_dim, group=4, stride=stride, interpreted=False
        ),
        options=triton_antidiagonals.options(head_dim),
        tensor_core=TENSOR_CORE[architecture],
    )


def lines_builds(architecture: int) -> Iterator[Build]:
    """The walks over columns and over diagonals, and the lists: the same for every model."""
    types = dict.fromkeys(("sums", "bars"), "*fp32") | {"rooms": "*i64"}
    types |= dict.fromkeys(("floors", "ceils"), "*i8")
    names = ("ids", "counts", "id_counts", "pages", "page_counts", "columns", "column_counts")
    types |= dict.fromkeys(names, "*i32")
    sizes = ("num_lines", "width", "num_marks", "first_page", "num_blocks", "page_width", "column_width")
    types |= dict.fromkeys(sizes, "i32")
    for part, kernel, options in (
        ("columns", triton_lines._columns_kernel, triton_lines.WALK_OPTIONS),
        ("diagonals", triton_lines._diagonals_kernel, triton_lines.WALK_OPTIONS),
        ("lists", triton_lines._lists_kernel, triton_lines.LIST_OPTIONS),
    ):
        yield Build(
            name=f"lines sm_{architecture}: {part}",
            kernel=kernel,
            architecture=architecture,
            types={name: type_ for name, type_ in types.items() if name in kernel.arg_names},
            constants=triton_lines.constants(part),
            options=options,
            tensor_core="",
        )


def descents_build(architecture: int, head_dim: int, stride: int = 1, pages: str | None = None) -> Build:
    """Descents of groups of 4 query heads by means of `stride` queries; over pages in bf16, or of codes."""
    kernel = triton_descent._descents_kernel
    types = {"means": "*bf16", "k_pool": f"*{pages or 'bf16'}", "pages": "*i32", "pieces": "*i32"}
    types |= {"best": "*fp32"} | ({"k_scales": "*fp32"} if pages else {})
    types |= dict.fromkeys(("num_pieces", "num_blocks", "width", "num_rounds", "first_end"), "i32")
    rows = f"means of {stride}" if stride > 1 else "single queries"
    return Build(
        name=f"descents sm_{architecture} bf16 D{head_dim}, {rows}{f' of {pages}' if pages else ''}",
        kernel=kernel,
        architecture=architecture,
        types=types | {name: "i32" for name in kernel.arg_names if name.startswith("stride_")},
        constants=triton_descent.constants(head_dim=head_dim, group=4, stride=stride, interpreted=False),
        options=triton_descent.OPTIONS,
        tensor_core=TENSOR_CORE[architecture] if head_dim <= 128 else "HMMA",  # 32 pieces: too few for wgmma
    )


def pieces_build(architecture: int) -> Build:
    """The pieces that go on after a stage: the same for every model."""
    types = {"best": "*fp32", "bars": "*fp32", "rooms": "*i64", "pieces": "*i32", "kept": "*i32"}
    names = ("num_pieces", "num_blocks", "most", "stride_list", "stride_block")
    return Build(
        name=f"descents sm_{architecture}: pieces",
        kernel=triton_descent._keep_kernel,
        architecture=architecture,
        types=types | dict.fromkeys(names, "i32"),
        constants={"BLOCK": triton_descent.KEEP},
        options=triton_descent.KEEP_OPTIONS,
        tensor_core="",
    )


def pooled_build(
    architecture: int, head_dim: int, interleaved: bool = False, pages: str | None = None
) -> Build:
    """Largest, smallest and mean of rotated keys in bf16, or of codes."""
    types = {"k_pool": f"*{pages or 'bf16'}", "pages": "*i32"} | ({"k_scales": "*fp32"} if pages else {})
    types |= dict.fromkeys(("cos", "sin", "pooled"), "*fp32")
    types |= dict.fromkeys(("num_tokens", "num_pages", "num_heads", "first", "stride_pages"), "i32")
    return Build(
        name=f"pooled sm_{architecture} {pages or 'bf16'} D{head_dim}{', neighbours' if interleaved else ''}",
        kernel=triton_pooled._pool_kernel,
        architecture=architecture,
        types=types,
        constants=triton_pooled.constants(head_dim=head_dim, half=head_dim // 2, interleaved=interleaved),
        options=triton_pooled.OPTIONS,
        tensor_core="",
    )


if __name__ == "__main__":
    sys.exit(main("sparse", list(builds()), sys.argv[1:]))
