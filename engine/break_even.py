"""Break-even: from which length on a plan's prompts are computed faster sparse than dense; measured once per
device, model shape and method, and kept in a file."""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.native import cache_root, processor
from engine.attention_timing import AttentionTimer, Times
from engine.kernels import Kernels
from engine.plans import ResolvedPlan
from engine.rope import Rope
from kvcache.cache import KVCache

log = logging.getLogger(__name__)

SECONDS = 10.0  # for one plan: what is not found by then counts as not there
SHORTEST = 512  # tokens of the first length that is timed; below, there is nothing to win
HALVINGS = 2  # of the interval in which sparse begins to be faster
MASK_LENGTH = 32768  # tokens of a text whose mask stands for the policy's

Compare = Callable[[int, int], Times]  # the last chunk of a prompt: where it starts, how long it is


@dataclass(frozen=True, slots=True)
class BreakEven:
    """What was found out, as it is kept."""

    dense_below: int | None  # tokens; None = nowhere up to `longest`
    longest: int  # tokens that were asked about


def measured(
    plans: dict[str, ResolvedPlan], model: ModelInfo, cache: KVCache, kernels: Kernels, rope: Rope
) -> dict[str, ResolvedPlan]:
    """These plans, with a number of tokens where `dense_below` is auto."""
    return {
        name: plan
        if plan.dense_below is not None
        else plan.with_dense_below(_measured(plan, model, cache, kernels, rope))
        for name, plan in plans.items()
    }


def _measured(plan: ResolvedPlan, model: ModelInfo, cache: KVCache, kernels: Kernels, rope: Rope) -> int:
    """Tokens, from the file or by measuring."""
    longest = min(model.max_length, cache.pool.num_pages // cache.num_rows * PAGE_SIZE)
    facts = facts_of(plan, model, kernels, cache.pool.k, cache.dtype)

    def measure() -> int | None:
        log.warning(
            "plan %s: measuring from which length on it is faster than dense: seconds, once", plan.name
        )
        timer = AttentionTimer(plan, model, cache, kernels, rope)
        first = min(SHORTEST, plan.chunk, longest)
        timer.compare(0, first, rounds=1)  # what is compiled or loaded on first use does not count
        began = time.monotonic()
        return find(
            timer.compare, plan.chunk, plan.window, longest, lambda: time.monotonic() - began > SECONDS
        )

    found = kept_or(measure, facts, longest, cache_root() / "break_even")
    if found is None:
        log.warning("plan %s runs dense: up to %d tokens nothing shows it to be faster", plan.name, longest)
        return model.max_length  # prompts are shorter than the context
    log.info("plan %s: prompts below %d tokens run dense", plan.name, found)
    return found


def find(compare: Compare, chunk: int, window: int, longest: int, is_late: Callable[[], bool]) -> int | None:
    """From which prompt length on sparse is faster, in whole pages; None if it is not, up to `longest`.

    A prompt costs the sum of its chunks. Lengths double, their last chunks are timed, and whole chunks
    between are interpolated: all of it takes little longer than the last chunk of the longest prompt. Ends
    once sparse was faster at two lengths in a row, or when it is late.
    """
    whole: dict[int, Times] = {}  # whole chunks, by start

    def ratio(length: int) -> float:
        """Time of a prompt, sparse over dense."""
        start = _start_of_last_chunk(length, chunk, window)
        last = compare(start, length - start)
        if length - start == chunk:
            whole[start] = last
        if start > max(whole, default=-chunk) + chunk:  # so that nothing lies beyond what is known
            whole[start - chunk] = compare(start - chunk, chunk)
        known = sorted(whole)
        starts = np.arange(0, start, chunk)
        sparse = np.interp(starts, known, [whole[at].sparse for at in known]).sum() if start else 0.0
        dense = np.interp(starts, known, [whole[at].dense for at in known]).sum() if start else 0.0
        return float((last.sparse + sparse) / (last.dense + dense))

    ratios: dict[int, float] = {}  # by prompt length
    wins = 0
    for length in _lengths(chunk, longest):
        ratios[length] = ratio(length)
        wins = wins + 1 if ratios[length] < 1 else 0
        if wins == 2 or is_late():
            break
    for _ in range(HALVINGS):
        low, high = _begins(ratios)
        if high is None or low == 0 or is_late():
            break
        middle = (low + high) // 2 // PAGE_SIZE * PAGE_SIZE
        if low < middle < high:
            ratios[middle] = ratio(middle)
    return _crossing(ratios)


def _lengths(chunk: int, longest: int) -> list[int]:
    """Prompts to time: doubling, of whole chunks where there is more than one."""
    lengths = []
    length = min(SHORTEST, chunk)
    while length < min(chunk, longest):
        lengths.append(length)
        length *= 2
    length = chunk
    while length < longest:
        lengths.append(length)
        length *= 2
    last = longest // chunk * chunk or longest // PAGE_SIZE * PAGE_SIZE
    return [*(length for length in lengths if length < last), last]


def _start_of_last_chunk(length: int, chunk: int, window: int) -> int:
    """Where Sequence.chunk_end lets the last chunk of a prompt begin."""
    return max(0, (length - window) // chunk * chunk)


def _begins(ratios: dict[int, float]) -> tuple[int, int | None]:
    """The last length at which sparse was not faster (0: it always was), and the next one that was timed."""
    lengths = sorted(ratios)
    lost = [place for place, length in enumerate(lengths) if ratios[length] >= 1]
    if not lost:
        return 0, lengths[0]
    after = lost[-1] + 1
    return lengths[lost[-1]], lengths[after] if after < len(lengths) else None


def _crossing(ratios: dict[int, float]) -> int | None:
    """Where the ratio falls below 1 for good, on a straight line between two lengths, in whole pages."""
    low, high = _begins(ratios)
    if high is None or low == 0:
        return high
    share = (ratios[low] - 1) / (ratios[low] - ratios[high])
    return min(high, math.ceil((low + share * (high - low)) / PAGE_SIZE) * PAGE_SIZE)


def facts_of(
    plan: ResolvedPlan, model: ModelInfo, kernels: Kernels, k_pool: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """All that a break-even depends on, as JSON has it."""
    is_cuda = k_pool.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(k_pool.device) if is_cuda else processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "pages": str(k_pool.dtype).removeprefix("torch."),
        "versions": {name: _version(name) for name in ("torch", "triton", "farspan")},
        "kernels": _prefill_kernels(kernels),
        "layers": model.num_layers,
        "heads": [model.num_query_heads, model.num_kv_heads, model.head_dim],
        "windows": list(model.windows),
        "prefill": hashlib.sha256(plan.prefill_identity).hexdigest(),
        "mask": hashlib.sha256(plan.policy.prefill_key(MASK_LENGTH)).hexdigest(),
    }


def kept_or(
    measure: Callable[[], int | None], facts: dict[str, Any], longest: int, folder: Path
) -> int | None:
    """The break-even from this folder's file about these facts, or a new one, which is kept there."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    file = folder / f"{digest}.json"
    kept = _read(file, facts)
    if kept is not None and (kept.dense_below is not None or kept.longest >= longest):
        return kept.dense_below
    found = BreakEven(measure(), longest)
    try:
        _write(file, facts, found)
    except OSError as error:
        log.warning("a break-even is not kept, and measured again at the next start: %s", error)
    return found.dense_below


def _read(file: Path, facts: dict[str, Any]) -> BreakEven | None:
    """What a file says, or None if it cannot be read or is about something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    match content:
        case {"facts": found, "dense_below": int() | None as below, "longest": int() as longest}:
            return BreakEven(below, longest) if found == facts else None
    return None


def _write(file: Path, facts: dict[str, Any], found: BreakEven) -> None:
    """The file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"dense_below": found.dense_below, "longest": found.longest, "facts": facts}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as written:
        json.dump(content, written, indent=2)
    os.replace(written.name, file)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _prefill_kernels(kernels: Kernels) -> list[str]:
    """The names of those that a chunk is computed with."""
    index = (getattr(kernels.index, field.name) for field in fields(kernels.index))
    found = (kernels.attend, *index, kernels.moves.store)
    # what serves only some chunks, and passes others on, is an object: its class has the name
    named = (kernel if hasattr(kernel, "__qualname__") else type(kernel) for kernel in found)
    return [f"{each.__module__}.{each.__qualname__}" for each in named]
