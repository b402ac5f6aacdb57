"""The kernels of a device, each compared with the torch code that defines it before anything is served."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE, ModelInfo
from engine.kernels import Kernels
from engine.rope import Rotation
from kvcache.cache import CacheSize, KVCache
from kvcache.decode import UNITS, RowSelection
from kvcache.pool import pages_for
from kvcache.quest import PER_PAGE, Quest, write_bounds
from kvcache.state import NewKeys, StateRegistry
from sparse.antidiagonals import STRIDES
from sparse.base import Chunk
from sparse.descent import Funnel
from sparse.estimator import estimate
from sparse.head_patterns import NUM_LOCAL, HeadGroup
from sparse.page_rules import visible_pages
from sparse.page_scores import block_pages, mean_pages
from sparse.selection import Selection, dense, lists_from_mask, mask_from_lists, num_query_blocks

log = logging.getLogger(__name__)

LENGTH = 333  # tokens of the sequence that is tried: neither whole pages nor whole query blocks
START = 130  # of its last chunk
NUM_ROWS = 50  # that the estimator looks at
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # of the norm of the difference


def checked(
    kernels: Kernels,
    model: ModelInfo,
    dtype: torch.dtype,
    device: torch.device,
    page_dtype: torch.dtype | None = None,  # of quantised pages
) -> Kernels:
    """These kernels, with torch in the place of those that fail or err on this device, as the log says."""
    twins = Kernels()
    for name, trial in TRIALS.items():
        kernel, twin = map(attrgetter(name), (kernels, twins))
        reason = None
        if kernel is not twin:
            cases = [_draw(model, dtype, device, page_dtype) for _ in range(2)]
            reason = _complaint(trial, kernel, twin, cases, TOLERANCES[dtype])
        if reason is not None:
            log.warning("kernel %s is not used on %s, torch serves in its place: %s", name, device, reason)
            kernels = kernels.with_kernel(name, twin)
    return kernels


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One random sequence of one layer of a model, in pages; the same whenever it is drawn."""

    cache: KVCache
    q: Tensor  # [Hq, LENGTH, D]
    k: Tensor  # [Hkv, LENGTH, D]
    v: Tensor
    destinations: Tensor  # [Hkv, LENGTH]
    features: tuple[Features, ...]  # that layers of the model have


def _draw(
    model: ModelInfo, dtype: torch.dtype, device: torch.device, page_dtype: torch.dtype | None
) -> _Case:
    heads, kv_heads = model.num_query_heads, model.num_kv_heads
    cache = one_sequence(model, LENGTH, dtype, device, page_dtype)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, LENGTH, model.head_dim, generator=generator).to(device, dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    windows = {model.window(layer) for layer in range(model.num_layers)}
    # a window longer than the sequence would mask nothing
    features = tuple(Features(window and min(window, LENGTH // 2)) for window in windows)
    return _Case(cache, q, k, v, cache.prefill_destinations(0, 0, LENGTH)[0], features)


def one_sequence(
    model: ModelInfo,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    page_dtype: torch.dtype | None = None,
) -> KVCache:
    """Of one layer of a model, with pages for so many tokens of a sequence in slot 0, and for one more."""
    pages = model.num_kv_heads * pages_for(length + 1)
    cache = KVCache(
        replace(model, num_layers=1),
        CacheSize(pages, 1, length + PAGE_SIZE),
        dtype=dtype,
        device=device,
        states=StateRegistry(),
        page_dtype=page_dtype,
    )
    slot = cache.admit(pages)
    assert slot == 0
    cache.reserve(slot, length)
    cache.sync()
    return cache


def _attend(kernel: Any, case: _Case) -> list[Tensor]:
    """Everything, under every window; lists of pages and gathered units, which go with no window."""
    case.cache.write(case.k, case.v, case.destinations)
    keys = case.cache.view(0, 0, LENGTH)
    chunk = Chunk(START, LENGTH - START, LENGTH, LENGTH + 1, slot=0)
    q = case.q[:, START:]
    scale = q.shape[2] ** -0.5
    attended = [
        kernel(q, keys, chunk, dense(q.device), scale=scale, features=features) for features in case.features
    ]
    attended.append(kernel(q, keys, chunk, _lists(case, chunk), scale=scale))
    return [tensor for each in attended for tensor in (each.out, each.lse)]


def _lists(case: _Case, chunk: Chunk) -> Selection:
    """Per KV head: random pages of the past and the block's own, and every third key of two other pages."""
    num_heads, num_pages = case.k.shape[0], pages_for(LENGTH)
    own = START // PAGE_SIZE + torch.arange(num_query_blocks(START, chunk.length, PAGE_SIZE))[:, None]
    page = torch.arange(num_pages)
    pages = torch.rand(num_heads, *own.shape[:1], num_pages, generator=torch.Generator().manual_seed(1)) < 0.5
    pages = (pages & (page < own)) | (page == own)
    key = torch.arange(num_pages * PAGE_SIZE)
    alone = (key % 3 == 0) & (key // PAGE_SIZE < own) & ~pages.repeat_interleave(PAGE_SIZE, dim=2)
    device = case.k.device
    return Selection(
        PAGE_SIZE, lists_from_mask(pages.to(device), PAGE_SIZE), lists_from_mask(alone.to(device), 1)
    )


def _attend_rows(kernel: Any, case: _Case) -> list[Tensor]:
    cache = case.cache
    cache.write(case.k, case.v, case.destinations)
    cache.advance(0, LENGTH - 1)
    cache.sync()
    rows = cache.decode_rows([0])
    everything: list[tuple[Features, RowSelection | None]] = [(features, None) for features in case.features]
    selections = [(NO_FEATURES, _every_third(rows.held[0], unit)) for unit in UNITS]
    return [
        kernel(
            case.q[None, :, -1],
            cache.pool.k,
            cache.pool.v,
            rows.pages[0],
            rows.held[0],
            scale=case.q.shape[2] ** -0.5,
            max_held=rows.max_held,
            features=features,
            selection=selection,
            k_scales=cache.pool.k_scales,
            v_scales=cache.pool.v_scales,
        )
        for features, selection in (*everything, *selections)
    ]


def _best_units(kernel: Any, case: _Case) -> list[Tensor]:
    cache, size = case.cache, case.q.shape[2]
    bounds = torch.zeros(cache.pool.num_pages, PER_PAGE, 2, size, device=case.q.device)
    positions = torch.arange(LENGTH, device=case.q.device)
    write_bounds(bounds, NewKeys(0, case.k, case.destinations, positions, None, is_chunk=True))
    pages, held = cache.table.device[0], torch.full((1, len(case.k)), LENGTH, dtype=torch.int32)
    return [kernel(case.q[None, :, -1], bounds, pages, held.to(case.q.device), Quest(read=128, window=20))]


def _every_third(held: Tensor, unit: int) -> RowSelection:
    """Every third unit of each row, the newest among them. held [B, Hkv], the same in all rows."""
    newest = (LENGTH - 1) // unit
    ids = torch.arange(newest % 3, newest + 1, 3, dtype=torch.int32, device=held.device)
    return RowSelection(ids.expand(*held.shape, -1), torch.full_like(held, len(ids)), unit)


def _estimate(kernel: Any, case: _Case) -> list[Tensor]:
    case.cache.write(case.k, case.v, case.destinations)
    keys = case.cache.view(0, 0, LENGTH)
    seen = kernel(case.q[:, -NUM_ROWS:], LENGTH - NUM_ROWS, keys, scale=case.q.shape[2] ** -0.5)
    return [seen.columns, seen.diagonals, seen.out, seen.lse]


def _line_lists(kernel: Any, case: _Case) -> list[Tensor]:
    """Of all heads, every second with diagonals that it need not read, so that columns lie between them."""
    case.cache.write(case.k, case.v, case.destinations)
    keys, num_heads, first_page = case.cache.view(0, 0, LENGTH), len(case.q), START // PAGE_SIZE
    seen = estimate(case.q[:, -NUM_ROWS:], LENGTH - NUM_ROWS, keys, scale=case.q.shape[2] ** -0.5)
    heads = torch.arange(num_heads, device=case.q.device)
    budgets = (torch.full_like(heads, 60), NUM_LOCAL + heads % 2 * 40)
    lists = kernel(seen, HeadGroup(heads, budgets, (60, NUM_LOCAL + 40)), first_page)
    blocks = torch.arange(pages_for(LENGTH) - first_page, device=case.q.device)
    return [
        mask_from_lists(lists.pages, blocks, pages_for(LENGTH)),
        mask_from_lists(lists.columns, blocks, LENGTH),
    ]


def _mean_pages(kernel: Any, case: _Case) -> list[Tensor]:
    case.cache.write(case.k, case.v, case.destinations)
    keys = case.cache.view(0, 0, LENGTH)
    return [kernel(keys, LENGTH), kernel(keys, LENGTH, values=True)]


def _log_energy(kernel: Any, case: _Case) -> list[Tensor]:
    case.cache.write(case.k, case.v, case.destinations)
    mean_k = mean_pages(case.cache.view(0, 0, LENGTH), LENGTH)
    chunk = Chunk(START, LENGTH - START, LENGTH, LENGTH + 1, slot=0)
    energy: Tensor = kernel(case.q[:, START:], mean_k, chunk, scale=case.q.shape[2] ** -0.5)
    return [energy[:, visible_pages(block_pages(chunk, energy.device), energy.shape[2])]]


def _antidiagonal_mass(kernel: Any, case: _Case) -> list[Tensor]:
    case.cache.write(case.k, case.v, case.destinations)
    keys = case.cache.view(0, 0, LENGTH)
    chunk = Chunk(START, LENGTH - START, LENGTH, LENGTH + 1, slot=0)
    q, scale = case.q[:, START:], case.q.shape[2] ** -0.5
    return [kernel(q, keys, chunk, stride=stride, scale=scale) for stride in STRIDES]


def _pruned_pieces(kernel: Any, case: _Case) -> list[Tensor]:
    """Over signs: their products are exact in every dtype, so that nothing is almost a tie."""
    case.cache.write(case.k.sign(), case.v, case.destinations)
    keys = case.cache.view(0, 0, LENGTH)
    chunk = Chunk(START, LENGTH - START, LENGTH, LENGTH + 1, slot=0)
    masks = []
    for num_lists in sorted({1, len(case.k)}):
        funnel = Funnel((32, 8), (96, 32), (4, 1), PAGE_SIZE, 0, num_lists)
        units = kernel(case.q[:, START:].sign(), keys, chunk, funnel).long() // 8
        masks.append(torch.zeros(*units.shape[:2], LENGTH, device=units.device).scatter_(2, units, 1.0))
    return masks


def _pool_pages(kernel: Any, case: _Case) -> list[Tensor]:
    case.cache.write(case.k, case.v, case.destinations)
    keys, size = case.cache.view(0, 0, LENGTH), case.k.shape[2] // 4 * 2  # some dimensions are not rotated
    frequencies = 1e4 ** (-torch.arange(0, size, 2, device=case.k.device) / size)
    rotations = [Rotation(frequencies, 1.0, interleaved) for interleaved in (False, True)]
    return [kernel(keys, LENGTH, rotation) for rotation in (None, *rotations)]


def _store(kernel: Any, case: _Case) -> list[Tensor]:
    kernel(case.cache.pool, case.k, case.v, case.destinations)
    return case.cache.pool.by_token


def _move_kept(kernel: Any, case: _Case) -> list[Tensor]:
    case.cache.write(case.k, case.v, case.destinations)
    num_heads, device = case.k.shape[0], case.k.device
    keep = torch.rand(num_heads, LENGTH, generator=torch.Generator().manual_seed(1)).to(device) < 0.4
    counts = keep.sum(1, dtype=torch.int32)
    ids = torch.full((num_heads, int(counts.max())), -1, dtype=torch.int32, device=device)
    pages = case.cache.table.device[0, 0]
    kernel(case.cache.pool, keep, counts, pages, pages, ids)
    return [*case.cache.pool.by_token, ids]


TRIALS: dict[str, Callable[[Any, _Case], list[Tensor]]] = {
    "attend": _attend,
    "attend_rows": _attend_rows,
    "index.estimate": _estimate,
    "index.line_lists": _line_lists,
    "index.mean_pages": _mean_pages,
    "index.log_energy": _log_energy,
    "index.antidiagonal_mass": _antidiagonal_mass,
    "index.pruned_pieces": _pruned_pieces,
    "index.pool_pages": _pool_pages,
    "moves.store": _store,
    "moves.move_kept": _move_kept,
    "best_units": _best_units,
}


def _complaint(
    trial: Callable[[Any, _Case], list[Tensor]],
    kernel: Any,
    twin: Any,
    cases: list[_Case],
    tolerance: float,
) -> str | None:
    """What is wrong with a kernel, or None. Two equal cases: a trial writes into the one it is given."""
    expected = trial(twin, cases[0])
    try:
        found = trial(kernel, cases[1])
    except Exception as error:  # whatever a compiler or a launcher raises: the twin serves
        return in_a_line(error)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape, (got.shape, want.shape)
        error_norm = float((got.double() - want.double()).norm() / want.double().norm())
        if not error_norm <= tolerance:  # NaN never passes
            return f"it differs from torch by {error_norm:.1e} of the norm, {tolerance:.0e} is allowed"
    return None


def in_a_line(error: Exception) -> str:
    """The kind of an error and how its words begin: compilers tell long stories."""
    return " ".join([type(error).__name__ + ":", *str(error).strip().splitlines()[:1]])
