"""HiP's funnel: pieces of a prompt that go on from stage to stage, by what descents into them find."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from configs.descent import Scores, descend
from configs.model import PAGE_SIZE
from sparse.base import Chunk, KeyView
from sparse.page_scores import SCORE_ELEMS, block_pages, held_pages, key_pages, query_pages, rows_present

READ_COST = 56  # reading a key by its index takes as long as multiplying it with so many queries


@dataclass(frozen=True, slots=True)
class Funnel:
    """Stages, and the keys that they begin with. A stage takes pieces of its width, and leaves the best."""

    widths: Sequence[int]  # keys of a piece, by stage
    keep: Sequence[int]  # keys that each stage leaves
    strides: Sequence[int]  # neighbouring queries that a stage takes as one, their mean
    first: int  # the first key that is chosen from, the begin of a page
    reach: int  # pages before a query block's own at which what it chooses from ends
    num_lists: int  # 1 if all heads choose together, Hkv if those of a KV head do

    def ends(self, block_page: Tensor) -> Tensor:
        """Where the keys end that query blocks choose from: [B] of block_page [B]; may lie before first."""
        return (block_page - self.reach) * PAGE_SIZE

    def last(self, num_tokens: int) -> int:
        """The largest of them, in a prompt of so many tokens so far."""
        return ((num_tokens - 1) // PAGE_SIZE - self.reach) * PAGE_SIZE

    def num_pieces(self, num_tokens: int) -> list[int]:
        """How many pieces each stage takes."""
        counts = [-(-(self.last(num_tokens) - self.first) // self.widths[0])]
        for before, kept, width in zip(self.widths, self.keep, self.widths[1:], strict=False):
            counts.append(min(counts[-1], kept // before) * (before // width))
        return counts

    def pieces(self, stage: int, num_tokens: int, left: Tensor | None, device: torch.device) -> Tensor:
        """Where the pieces begin that a stage takes: int64 [..., C], from those before it, [..., n]."""
        width = self.widths[stage]
        if left is None:
            return torch.arange(self.first, self.last(num_tokens), width, device=device)
        return (left[..., None] + torch.arange(0, self.widths[stage - 1], width, device=device)).flatten(-2)


class PrunePieces(Protocol):
    """The pieces that the last stage of a funnel leaves: see `pruned_pieces`."""

    def __call__(self, q: Tensor, keys: KeyView, chunk: Chunk, funnel: Funnel) -> Tensor: ...


def pruned_pieces(q: Tensor, keys: KeyView, chunk: Chunk, funnel: Funnel) -> Tensor:
    """Where the pieces begin that the last stage leaves to each query block, ascending: [H, B, U] integers.

    q [Hq, Tq, D]; H = funnel.num_lists. Some may lie at or behind the block's end. A piece is worth the best
    score that a descent into it meets, for any of the heads that choose together. Ties: the lower piece.
    """
    num_tokens = chunk.start + chunk.length
    k, held = key_pages(keys, num_tokens), held_pages(keys, num_tokens)
    rows, present = query_pages(q, chunk.start), rows_present(chunk, q.device)
    ends = funnel.ends(block_pages(chunk, q.device))[:, None]  # [B, 1]
    tabled, step = _way(funnel, num_tokens, q, k)
    found = []
    for block in range(0, ends.shape[0], step):
        some = slice(block, block + step)
        num_pages = min(chunk.start // PAGE_SIZE + block + step, k.shape[1])  # up to these blocks
        search = _Search(rows[:, some], present[some], k, held, num_pages, tabled)
        found.append(_prune(funnel, num_tokens, search, ends[some]))
    return torch.cat(found, dim=1)


def _prune(funnel: Funnel, num_tokens: int, search: "_Search", ends: Tensor) -> Tensor:
    """The same, of the query blocks that end at ends [b, 1]: [H, b, U]."""
    left = None
    for stage, width in enumerate(funnel.widths):
        left = funnel.pieces(stage, num_tokens, left, ends.device).expand(funnel.num_lists, len(ends), -1)
        most = funnel.keep[stage] // width
        if left.shape[2] <= most:
            continue  # all go on, whatever they score
        each = left.repeat_interleave(search.rows.shape[0] // funnel.num_lists, dim=0)  # [Hq, b, C]
        scores = search.scores(funnel.strides[stage])
        best = descend(scores, each, torch.minimum(each + width, ends), width)
        best = best.view(funnel.num_lists, -1, *best.shape[1:]).amax(1)  # of the heads that choose together
        order = best.sort(dim=-1, descending=True, stable=True).indices[..., :most]
        left = left.gather(2, order).sort(dim=-1).values
    assert left is not None, "a funnel has a stage"
    return left


def _way(funnel: Funnel, num_tokens: int, q: Tensor, k: Tensor) -> tuple[frozenset[int], int]:
    """Strides whose stages had better score all keys first, and how many query blocks to take at once."""
    num_keys, head_dim = k.shape[1] * PAGE_SIZE, k.shape[3]
    counts = funnel.num_pieces(num_tokens)
    probes: dict[int, int] = {}  # by stride, of one query block
    for count, width, stride in zip(counts, funnel.widths, funnel.strides, strict=True):
        probes[stride] = probes.get(stride, 0) + 2 * width.bit_length() * count
    tabled = {
        stride
        for stride, number in probes.items()
        if number * (PAGE_SIZE // stride + READ_COST) > num_keys * (PAGE_SIZE // stride)
    }
    sizes = [
        num_keys * (PAGE_SIZE // stride)
        if stride in tabled
        else 2 * max(counts) * (head_dim + PAGE_SIZE // stride)
        for stride in probes
    ]
    return frozenset(tabled), max(1, SCORE_ELEMS // (q.shape[0] * max(sizes)))


@dataclass(frozen=True, slots=True)
class _Search:
    """Some query blocks, and the scores of keys for them."""

    rows: Tensor  # [Hq, b, 64, D]
    present: Tensor  # [b, 64] bool
    k: Tensor  # [Hkv, P, 64, D]
    held: Tensor  # [Hkv, P] bool
    num_pages: int  # up to the last of these blocks
    tabled: frozenset[int]  # strides for which all keys are scored first
    known: dict[int, Scores] = field(default_factory=dict)  # by stride: stages may share them

    def scores(self, stride: int) -> Scores:
        if stride not in self.known:
            queries = mean_queries(self.rows, self.present, stride)
            if stride in self.tabled:
                k, held = self.k[:, : self.num_pages], self.held[:, : self.num_pages]
                self.known[stride] = tabled_scores(queries, k, held)
            else:
                self.known[stride] = probed_scores(queries, self.k, self.held)
        return self.known[stride]


def mean_queries(rows: Tensor, present: Tensor, stride: int) -> Tensor:
    """Means of `stride` neighbouring queries: [Hq, B, 64 / stride, D]. rows [Hq, B, 64, D], zeros if absent.

    present bool [B, 64]. Where the chunk has no row of a mean, it repeats the nearest mean that it has.
    """
    counts = present.view(present.shape[0], -1, stride).sum(-1)  # [B, R]
    sums = rows.view(*rows.shape[:2], -1, stride, rows.shape[3]).sum(3)
    means = sums / counts.clamp_min(1)[..., None].to(rows.dtype)
    place = torch.arange(counts.shape[1], device=rows.device)
    first = torch.where(counts > 0, place, counts.shape[1]).amin(-1, keepdim=True)
    last = torch.where(counts > 0, place, -1).amax(-1, keepdim=True)
    nearest = torch.minimum(torch.maximum(place, first), last)  # [B, R]
    return means.gather(2, nearest[None, :, :, None].expand_as(means))


def probed_scores(queries: Tensor, k: Tensor, held: Tensor) -> Scores:
    """Scores computed for the keys that are asked for. queries [Hq, B, R, D], k [Hkv, P, 64, D].

    held bool [Hkv, P]: keys of dropped pages score -inf.
    """
    num_heads, num_blocks, _, head_dim = queries.shape
    keys = k.flatten(0, 2)  # [Hkv * P * 64, D]
    dropped = ~held.flatten()
    kv_head = torch.arange(num_heads, device=k.device) // (num_heads // k.shape[0])
    first = (kv_head * k.shape[1] * PAGE_SIZE)[:, None, None]  # of each head's keys
    columns = queries.flatten(0, 1).mT  # [Hq * B, D, R]

    def scores(positions: Tensor) -> Tensor:
        places = first + positions
        probed = keys.index_select(0, places.flatten()).view(num_heads * num_blocks, -1, head_dim)
        best = (probed.to(queries.dtype) @ columns).amax(-1).view(positions.shape).float()
        return best.masked_fill(dropped[places // PAGE_SIZE], float("-inf"))

    return scores


def tabled_scores(queries: Tensor, k: Tensor, held: Tensor) -> Scores:
    """The same, looked up in the scores of all keys: one product, without a key read by its index."""
    num_heads, num_blocks, num_queries, _ = queries.shape
    num_kv_heads, num_pages = held.shape
    rows = queries.reshape(num_kv_heads, -1, queries.shape[3])
    products = rows @ k.flatten(1, 2).mT.to(queries.dtype)  # [Hkv, G * B * R, P * 64]
    table = products.view(num_kv_heads, -1, num_blocks, num_queries, num_pages * PAGE_SIZE).amax(3).float()
    dropped = (~held).repeat_interleave(PAGE_SIZE, dim=1)[:, None, None]
    table = table.masked_fill_(dropped, float("-inf")).flatten(0, 1)  # [Hq, B, P * 64]
    return lambda positions: table.gather(2, positions)
