"""What methods that score whole pages look at: keys by page, their means, and queries by page."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.model import PAGE_SIZE
from configs.quantised import dequantise
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


def mean_keys(keys: KeyView, num_tokens: int) -> Tensor:
    """The mean key of each page, over the tokens there are: [Hkv, P, D] float32 (float64 if keys are)."""
    return _means(key_pages(keys, num_tokens), num_tokens)


def mean_values(keys: KeyView, num_tokens: int) -> Tensor:
    """The mean value of each page, over the tokens there are: [Hkv, P, D] float32 (float64 if values are)."""
    return _means(_pages_of(keys, keys.v_pool, keys.v_scales, num_tokens), num_tokens)


def _means(x: Tensor, num_tokens: int) -> Tensor:
    """x [Hkv, P, 64, D], zeros behind the last token -> [Hkv, P, D]."""
    sums = x.sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
    first = PAGE_SIZE * torch.arange(x.shape[1], device=x.device)
    return sums / (num_tokens - first).clamp_max(PAGE_SIZE)[:, None]


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
