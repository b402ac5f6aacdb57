"""Break-even: from which length on a plan's prompts are computed faster sparse than dense; measured once per
device, model shape and method, and kept in a file."""

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.model import PAGE_SIZE, ModelInfo
from configs.native import cache_root, processor
from engine.attention_timing import AttentionTimer, Times
from engine.kernels import Kernels
from engine.plans import ResolvedPlan
from engine.rope import Rope
from kvcache.cache import KVCache

log = logging.getLogger(__name__)

SECONDS = 10.0  # for one plan: what is not found by then counts as not there
SHORTEST = 512  # tokens of the first length that is tried; below, there is nothing to win
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
    facts = facts_of(plan, model, kernels, cache.pool.k)

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
        log.warning("plan %s: not faster than dense up to %d tokens; it runs dense", plan.name, longest)
        return model.max_length  # prompts are shorter than the context
    log.info("plan %s: prompts below %d tokens run dense", plan.name, found)
    return found


def find(compare: Compare, chunk: int, window: int, longest: int, is_late: Callable[[], bool]) -> int | None:
    """From which prompt length on sparse is faster, in whole pages; None if it is not, up to `longest`.

    A prompt costs the sum of its chunks. Whole chunks are timed where lengths that double end, and those between
    are interpolated, so that all the timing takes little longer than the last chunk of the longest prompt. Ends
    once sparse was faster at two lengths in a row, or when it is late.
    """
    whole: dict[int, Times] = {}  # by start
    ratios: dict[int, float] = {}  # by prompt length: sparse over dense

    def ratio(length: int) -> float:
        start = _start_of_last_chunk(length, chunk, window)
        last = compare(start, length - start)
        if length - start == chunk:
            whole[start] = last
        starts = np.arange(0, start, chunk)
        sparse, dense = (
            seconds + (float(np.interp(starts, known, times).sum()) if start else 0.0)
            for seconds, known, times in (
                (last.sparse, sorted(whole), [whole[at].sparse for at in sorted(whole)]),
                (last.dense, sorted(whole), [whole[at].dense for at in sorted(whole)]),
            )
        )
        return sparse / dense

    wins = 0
    for length in _lengths(chunk, longest):
        ratios[length] = ratio(length)
        wins = wins + 1 if ratios[length] < 1 else 0
        if wins == 2 or is_late():
            break
    for _ in range(HALVINGS):
        low, high = _bracket(ratios)
        middle = (low + high) // 2 // PAGE_SIZE * PAGE_SIZE
        if low < middle < high and not is_late():
            ratios[middle] = ratio(middle)
    return _crossing(ratios)
