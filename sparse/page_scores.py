"""What methods that score whole pages look at: keys by page, what they come to, and queries by page."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.model import PAGE_SIZE
from configs.quantised import dequantise
from configs.rotation import Rotation
from sparse.base import Chunk, KeyView

SCORE_ELEMS = 1 << 23  # scores held at once: 32 MiB in fp32, whatever the prompt's length


def block_pages(chunk: Chunk, device: torch.device) -> Tensor:
    """The page that the rows of each query block of 64 lie in: [B] int64."""
    end = chunk.start + chunk.length
    return torch.arange(chunk.start // PAGE_SIZE, -(-end // PAGE_SIZE), device=device)


def key_pages(keys: KeyView, num_tokens: int) -> Tensor:
    """The first num_tokens keys by page: [Hkv, P, 64, D]. Zeros behind the last; dropped pages hold anything.

    Copies keys alone: `contiguous` would copy the values, too.
    """
    return _pages_of(keys, keys.k_pool, keys.k_scales, num_tokens)


def _pages_of(keys: KeyView, pool: Tensor, scales: Tensor | None, num_tokens: int) -> Tensor:
    """The first num_tokens keys or values by page: [Hkv, P, 64, D]. Zeros behind the last."""
    num_pages = -(-num_tokens // PAGE_SIZE)
    ids = keys.pages[:, :num_pages].clamp_min(0)
    x = pool.index_select(0, ids.flatten())
    if scales is not None:
        x = dequantise(x, scales.index_select(0, ids.flatten()), keys.dtype)
    x = x.view(*ids.shape, PAGE_SIZE, -1)
    x[:, -1, num_tokens - (num_pages - 1) * PAGE_SIZE :] = 0
    return x


def held_pages(keys: KeyView, num_tokens: int) -> Tensor:
    """Which of the pages with the first num_tokens keys are there: bool [Hkv, P]."""
    return keys.pages[:, : -(-num_tokens // PAGE_SIZE)] >= 0


class MeanPages(Protocol):
    """The means of the keys or values of each page: see `mean_pages`."""

    def __call__(self, keys: KeyView, num_tokens: int, *, values: bool = False) -> Tensor: ...


def mean_pages(keys: KeyView, num_tokens: int, *, values: bool = False) -> Tensor:
    """The mean key (or value) of each page, over the first num_tokens: [Hkv, P, D] float32 (float64 if they
    are). Of dropped pages, anything.
    """
    pool, scales = (keys.v_pool, keys.v_scales) if values else (keys.k_pool, keys.k_scales)
    x = _pages_of(keys, pool, scales, num_tokens)
    sums = x.sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
    first = PAGE_SIZE * torch.arange(x.shape[1], device=x.device)
    return sums / (num_tokens - first).clamp_max(PAGE_SIZE)[:, None]


class PoolPages(Protocol):
    """Largest, smallest and mean of the keys of each page before RoPE: see `pool_pages`."""

    def __call__(self, keys: KeyView, num_tokens: int, rotation: Rotation | None) -> Tensor: ...


def pool_pages(keys: KeyView, num_tokens: int, rotation: Rotation | None) -> Tensor:
    """`pooled_keys` of what a sequence holds: [Hkv, P, 3 D] float32. Of dropped pages, anything."""
    return pooled_keys(key_pages(keys, num_tokens), num_tokens, rotation)


def pooled_keys(k: Tensor, num_tokens: int, rotation: Rotation | None) -> Tensor:
    """Largest, smallest and mean of the keys of each page before RoPE, side by side: [Hkv, P, 3 D] float32.

    k [Hkv, P, 64, D] after RoPE. The last page counts the tokens that it has.
    """
    step = max(1, SCORE_ELEMS // k[:, 0].numel())  # pages at once: in fp32 keys take twice their room
    pieces = [
        _pooled(k[:, page : page + step], page * PAGE_SIZE, num_tokens, rotation)
        for page in range(0, k.shape[1], step)
    ]
    return torch.cat(pieces, dim=1)


def _pooled(k: Tensor, start: int, num_tokens: int, rotation: Rotation | None) -> Tensor:
    """`pooled_keys` of some pages, the first of which begins at position `start`."""
    num_heads, num_pages = k.shape[:2]
    k = k.flatten(1, 2).float()  # [Hkv, P * 64, D]
    positions = start + torch.arange(k.shape[1], device=k.device)
    if rotation is not None:
        k = rotation.undo(k, positions)
    behind = (positions >= num_tokens)[:, None]
    largest, smallest, total = (
        k.masked_fill(behind, fill).view(num_heads, num_pages, PAGE_SIZE, -1)
        for fill in (float("-inf"), float("inf"), 0.0)
    )
    counts = (num_tokens - positions[::PAGE_SIZE]).clamp_max(PAGE_SIZE)
    return torch.cat((largest.amax(2), smallest.amin(2), total.sum(2) / counts[:, None]), dim=-1)


class LogEnergy(Protocol):
    """How well the queries of a block suit mean keys: see `log_energy`."""

    def __call__(self, q: Tensor, mean_k: Tensor, chunk: Chunk, *, scale: float) -> Tensor: ...


def log_energy(q: Tensor, mean_k: Tensor, chunk: Chunk, *, scale: float) -> Tensor:
    """Log of the sum of exp(scale * q . mean key) over the rows and query heads of a block: [Hkv, B, P].

    q [Hq, Tq, D], mean_k [Hkv, P, D] float32. In logs, so that no score is too large or too small. Of pages
    after the rows' own, anything.
    """
    num_kv_heads, num_pages, head_dim = mean_k.shape
    rows = query_pages(q, chunk.start)  # [Hq, B, 64, D]
    num_heads, num_blocks = rows.shape[:2]
    rows = rows.view(num_kv_heads, -1, num_blocks, PAGE_SIZE, head_dim)
    absent = ~rows_present(chunk, q.device)  # [B, 64]
    energy = mean_k.new_empty(num_kv_heads, num_blocks, num_pages)
    step = max(1, SCORE_ELEMS // (num_heads * PAGE_SIZE * num_pages))
    for block in range(0, num_blocks, step):
        piece = slice(block, block + step)
        some = rows[:, :, piece].to(mean_k.dtype)
        scores = scale * some.flatten(1, 3) @ mean_k.mT
        scores = scores.view(num_kv_heads, -1, some.shape[2], PAGE_SIZE, num_pages)
        scores.masked_fill_(absent[piece][..., None], float("-inf"))
        energy[:, piece] = scores.transpose(1, 2).flatten(2, 3).logsumexp(2)
    return energy


def query_pages(q: Tensor, start: int) -> Tensor:
    """The rows q [H, T, D] from position `start`, by page: [H, B, 64, D], zeros where the chunk has none."""
    before = start % PAGE_SIZE
    behind = -(before + q.shape[1]) % PAGE_SIZE
    padded = pad(q, (0, 0, before, behind)) if before or behind else q
    return padded.reshape(q.shape[0], -1, PAGE_SIZE, q.shape[2])


def rows_present(chunk: Chunk, device: torch.device) -> Tensor:
    """Which rows of `query_pages` belong to the chunk: bool [B, 64]."""
    first = chunk.start // PAGE_SIZE * PAGE_SIZE
    end = chunk.start + chunk.length
    positions = torch.arange(first, -(-end // PAGE_SIZE) * PAGE_SIZE, device=device)
    return ((positions >= chunk.start) & (positions < end)).view(-1, PAGE_SIZE)
