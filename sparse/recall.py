"""What a selection costs and what it misses: cells read, and attention recall on a few sampled rows."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE
from sparse.attention import held_tokens
from sparse.base import Chunk, KeyView
from sparse.selection import ALL, Selection, mask_from_lists

SAMPLED_ROWS = 16  # per chunk


def recall_rows(chunk: Chunk, selection: Selection) -> Tensor:
    """Rows of a chunk to judge its selection by: [R] int64 ascending, on the host, R <= 16.

    A hash of the position chooses, so neither load nor content does. Rows that the estimator saw or whose
    output is exact are never among them: they would praise the selection they made.
    """
    num_exact = 0 if selection.exact is None else selection.exact.lse.shape[1]
    num_rows = chunk.length - max(selection.estimator_rows, num_exact)
    hashes = _splitmix64(np.arange(chunk.start, chunk.start + num_rows, dtype=np.uint64))
    return torch.from_numpy(np.sort(np.argsort(hashes, kind="stable")[:SAMPLED_ROWS]))


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood's mixer (OOPSLA 2014): uint64 to uint64, modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def recall(
    q: Tensor,
    keys: KeyView,
    chunk: Chunk,
    selection: Selection,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Share of the attention of the sampled rows that falls on selected keys: [Hq, R] float32 in [0, 1].

    exp(lse_selected - lse_full), over the keys that are held; no host sync. q [Hq, Tq, D] after RoPE. What a
    sink draws falls on no key and does not count.
    """
    rows = recall_rows(chunk, selection).to(q.device)
    num_tokens = chunk.start + chunk.length
    if selection.is_dense or rows.shape[0] == 0:
        return torch.ones(q.shape[0], rows.shape[0], device=q.device)
    k = keys.contiguous()[0][:, :num_tokens].float()  # [Hkv, N, D]
    num_kv_heads = k.shape[0]
    sampled = q[:, rows].float().view(num_kv_heads, -1, q.shape[2])  # [Hkv, G * R, D]
    scores = (scale * (sampled @ k.mT)).view(num_kv_heads, -1, rows.shape[0], num_tokens)  # [Hkv, G, R, N]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.arange(num_tokens, device=q.device) > (chunk.start + rows)[:, None]  # [R, N]
    held = held_tokens(keys, num_tokens)
    if held is not None:
        hidden = hidden | ~held[:, None, None]
    scores.masked_fill_(hidden, float("-inf"))
    full = scores.logsumexp(-1)
    selected = _by_group(selected_keys(selection, chunk, rows), num_kv_heads)
    part = scores.masked_fill_(~selected, float("-inf")).logsumexp(-1)
    share = (part - full.masked_fill(full == float("-inf"), 0)).exp()  # nothing held: 0, not NaN
    recalled: Tensor = share.clamp_max(1).flatten(0, 1)
    return recalled


def selected_keys(selection: Selection, chunk: Chunk, rows: Tensor) -> Tensor:
    """The keys that the lists give to some rows of a chunk, before causality: bool [H, R, N]. rows [R]."""
    num_tokens = chunk.start + chunk.length
    blocks = (chunk.start + rows) // selection.query_block - chunk.start // selection.query_block
    pages = mask_from_lists(selection.pages, blocks, -(-num_tokens // PAGE_SIZE))
    mask = pages.repeat_interleave(PAGE_SIZE, dim=-1)[..., :num_tokens]
    if selection.gathered is not None:
        unit = selection.gathered.unit
        units = mask_from_lists(selection.gathered, blocks, -(-num_tokens // unit))
        mask = mask | units.repeat_interleave(unit, dim=-1)[..., :num_tokens]
    return mask | (selection.pages.counts[:, blocks] == ALL)[..., None]


def _by_group(mask: Tensor, num_kv_heads: int) -> Tensor:
    """[H, ...] for H of 1, Hkv or Hq as [1 or Hkv, 1 or G, ...]."""
    return mask.view(min(num_kv_heads, mask.shape[0]), -1, *mask.shape[1:])


def raise_to_floor(selection: Selection, recalled: Tensor, floor: float) -> Selection:
    """Read ALL for heads whose mean recall is below a floor; for a shared list, if any head is. No host sync.

    recalled [Hq, R]. A chunk too short to sample (R = 0) is left as it is.
    """
    if selection.is_dense or recalled.shape[1] == 0:
        return selection
    low = (recalled.mean(1) < floor).view(selection.pages.num_heads, -1).any(1)[:, None]  # [H, 1]
    pages = replace(selection.pages, counts=selection.pages.counts.masked_fill(low, ALL))
    gathered = selection.gathered
    if gathered is not None:
        gathered = replace(gathered, counts=gathered.counts.masked_fill(low, 0))
    return replace(selection, pages=pages, gathered=gathered)


def causal_cells(chunk: Chunk, num_query_heads: int, window: int | None = None) -> int:
    """(query, key) pairs that dense attention computes for a chunk, over all heads."""
    growing = chunk.length  # rows that see one key more than the row before
    if window is not None:
        growing = min(max(window - chunk.start, 0), chunk.length)
    cells = growing * chunk.start + growing * (growing + 1) // 2
    if window is not None:
        cells += (chunk.length - growing) * window
    return num_query_heads * cells


def read_cells(selection: Selection, chunk: Chunk, num_query_heads: int, window: int | None = None) -> Tensor:
    """(query, key) pairs that a selection computes for a chunk, over all heads: 0-d int64. No host sync."""
    return read_cells_by_head(selection, chunk, num_query_heads, window).sum()


def read_cells_by_head(
    selection: Selection,
    chunk: Chunk,
    num_query_heads: int,
    window: int | None = None,
    delta: int | None = None,
) -> Tensor:
    """(query, key) pairs that a selection computes for a chunk: [Hq] int64. No host sync.

    Counted at the tiles: every key of a listed page or unit that a row may see, wanted or not. Exact rows
    count as dense, since their estimator read every key; so does every delta-th row, if there is a correction
    by such rows. A layer with a window is read densely within it.
    """
    device = selection.pages.counts.device
    if selection.is_dense:
        return torch.full((num_query_heads,), causal_cells(chunk, 1, window), device=device)
    assert window is None, window
    num_exact = 0 if selection.exact is None else selection.exact.lse.shape[1]
    visible = chunk.start + 1 + torch.arange(chunk.length, device=device)  # [Tq] keys that each row may see
    listed = visible[: chunk.length - num_exact]
    blocks = (listed - 1) // selection.query_block - chunk.start // selection.query_block
    lists = selection.pages
    counts, starts = lists.counts[:, blocks].long(), lists.starts[:, blocks]  # [H, rows]
    # Only the last pages of a list can reach into the query block, where a row does not see all 64 keys.
    num_last = selection.query_block // PAGE_SIZE
    cells = PAGE_SIZE * (counts - num_last).clamp_min(0)
    for place in range(1, num_last + 1):
        if lists.indices.shape[0]:
            page = lists.indices[(starts + counts - place).clamp(0, lists.indices.shape[0] - 1)]
            cells += torch.where(counts >= place, (listed - PAGE_SIZE * page).clamp(0, PAGE_SIZE), 0)
    if selection.gathered is not None:
        cells += selection.gathered.unit * selection.gathered.counts[:, blocks]
    if selection.correction is not None:  # a mean is read as one key
        cells += selection.correction.left_out.sum(-1)[:, blocks]
    cells = torch.where(counts == ALL, listed, cells)
    if delta is not None:
        cells[:, ::delta] = listed[::delta]
    shared_by = num_query_heads // lists.num_heads
    return cells.sum(-1).repeat_interleave(shared_by) + visible[chunk.length - num_exact :].sum()
