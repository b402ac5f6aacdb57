"""The builds of the cache's kernels: `python -m kvcache.kernels.aot` compiles them, see configs/aot.py."""

import sys
from collections.abc import Iterator
from dataclasses import fields

import torch

from configs.aot import ARCHITECTURES, Build, main
from configs.features import NO_FEATURES, Features
from configs.quantised import FP8, INT8
from kvcache.decode import UNITS
from kvcache.kernels import triton_compact, triton_decode, triton_store

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUP = 4  # query heads per KV head
# what families ask for together: gpt-oss, Mistral, Gemma 2
FEATURED = (
    (64, Features(window=128, sinks=torch.empty(1))),
    (128, Features(window=4096)),
    (256, Features(window=4096, softcap=50.0)),
)


def builds() -> Iterator[Build]:
    """Every head size; features, dtypes and a wide group where families have them."""
    for architecture in ARCHITECTURES:
        for head_dim in HEAD_DIMS:
            yield rows_build(architecture, head_dim)
            yield merge_build(architecture, head_dim)
            yield from copy_builds(architecture, head_dim)
        for codes in ("i8", "fp8e4nv") if architecture >= 90 else ("i8",):
            yield rows_build(architecture, 128, codes=codes)
            yield rows_build(architecture, 128, unit=UNITS[0], codes=codes)
            yield from copy_builds(architecture, 128, codes)
        yield rows_build(architecture, 128, split=False)
        yield rows_build(architecture, 128, dtype="fp16")
        yield rows_build(architecture, 128, group=32)
        for unit in UNITS:
            yield rows_build(architecture, 128, unit=unit)
        yield rows_build(architecture, 64, unit=UNITS[0])
        for head_dim, features in FEATURED:
            yield rows_build(architecture, head_dim, features=features)


def rows_build(
    architecture: int,
    head_dim: int,
    *,
    group: int = GROUP,
    split: bool = True,
    features: Features = NO_FEATURES,
    unit: int = 0,
    dtype: str = "bf16",
    codes: str | None = None,  # that pages hold; None = as dtype says
) -> Build:
    """Decode over rows, before the merge if they are split."""
    kernel = triton_decode._rows_kernel
    types = {"q": f"*{dtype}", "pages": "*i32", "held": "*i32"}
    types |= dict.fromkeys(("k_pool", "v_pool"), f"*{codes or dtype}")
    if codes:
        types |= dict.fromkeys(("k_scales", "v_scales"), "*fp32")
    types |= {"out": "*fp32" if split else f"*{dtype}", "lse": "*fp32", "factor": "fp32", "num_splits": "i32"}
    types |= {name: "i32" for name in kernel.arg_names if name.startswith("stride_")}
    types["num_ids"] = "i32"
    if unit:
        types |= {"ids": "*i32", "counts": "*i32"}
    if features.sinks is not None:
        types["sinks"] = "*fp32"
    names = [field.name for field in fields(features) if getattr(features, field.name) is not None]
    extras = "".join(f" +{name}" for name in names) + (f" +units of {unit}" if unit else "")
    extras += f" of {codes}" if codes else ""
    return Build(
        name=f"rows sm_{architecture} {dtype} D{head_dim}, {group} heads{', split' if split else ''}{extras}",
        kernel=kernel,
        architecture=architecture,
        types=types,
        constants=triton_decode.constants(
            num_kv_heads=8,
            group=group,
            head_dim=head_dim,
            split=split,
            features=features,
            unit=unit,
            lse=split,
            interpreted=False,
        ),
        options=triton_decode.build_for(head_dim).options(),
        tensor_core="HMMA",  # 16 rows: too few for wgmma and tcgen05
    )


def merge_build(architecture: int, head_dim: int) -> Build:
    """The merge of split rows."""
    return Build(
        name=f"merge sm_{architecture} bf16 D{head_dim}",
        kernel=triton_decode._merge_kernel,
        architecture=architecture,
        types={
            "part_out": "*fp32",
            "part_lse": "*fp32",
            "lengths": "*i32",
            "out": "*bf16",
            "num_splits": "i32",
        },
        constants=triton_decode.merge_constants(
            group=GROUP, head_dim=head_dim, window=None, unit=0, lse=False
        ),
        options=triton_decode.MERGE_BUILD.options(),
        tensor_core="",
    )


def copy_builds(architecture: int, head_dim: int, pages: str = "bf16") -> Iterator[Build]:
    """Storing new tokens, and the two halves of a compaction, which moves codes as bytes."""
    of_codes = pages != "bf16"
    moved = "*i8" if of_codes else "*bf16"
    tokens = dict.fromkeys(("k", "v"), "*bf16") | dict.fromkeys(("k_kept", "v_kept"), moved)
    tables = dict.fromkeys(("ranks", "old", "new", "ids", "counts"), "*i32")
    types = tokens | tables | {"keep": "*i1", "destinations": "*i64"}
    scales = ("k_scales", "v_scales", "k_scales_kept", "v_scales_kept")
    types |= dict.fromkeys(scales, "*fp32")
    page_dtype = {"bf16": torch.bfloat16, "i8": INT8, "fp8e4nv": FP8}[pages]
    compact = triton_compact.constants(head_dim)
    for part, kernel, constants, options in (
        (
            "store",
            triton_store._store_kernel,
            triton_store.constants(head_dim, page_dtype),
            triton_store.OPTIONS,
        ),
        ("gather", triton_compact._gather_kernel, compact, triton_compact.OPTIONS),
        ("scatter", triton_compact._scatter_kernel, compact, triton_compact.OPTIONS),
    ):
        if part != "store" and pages == "fp8e4nv":
            continue  # bytes, as of int8
        of_pool = f"*{pages}" if part == "store" else moved
        types |= {"k_pool": of_pool, "v_pool": of_pool}
        arguments = [
            name for name in kernel.arg_names if not name.isupper() and (of_codes or name not in scales)
        ]
        yield Build(
            name=f"{part} sm_{architecture} {pages} D{head_dim}",
            kernel=kernel,
            architecture=architecture,
            types={argument: types.get(argument, "i32") for argument in arguments},
            constants=constants,
            options=options,
            tensor_core="",
        )


if __name__ == "__main__":
    sys.exit(main("kvcache", list(builds()), sys.argv[1:]))
