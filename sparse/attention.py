"""Block-sparse attention in torch: the definition of what a Selection means; on CPU, what serves."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import PAGE_SIZE
from configs.quantised import dequantise
from sparse.base import Chunk, KeyView
from sparse.correction import corrected
from sparse.selection import ALL, BlockLists, Selection

SCORE_ELEMS = (
    1 << 24
)  # scores held at once by the dense fallback: 64 MiB in fp32, whatever the prompt's length


@dataclass(frozen=True, slots=True)
class Attended:
    """What attention gives for the rows of a chunk. A row that reads nothing has out 0 and lse -inf."""

    out: Tensor  # [Hq, Tq, D] in the dtype of q
    lse: Tensor  # [Hq, Tq] float32, natural log of the sum of exp(logit), the sink's included


class Attend(Protocol):
    """Attention of a chunk over what a selection names: see `attend`."""

    def __call__(
        self,
        q: Tensor,
        keys: KeyView,
        chunk: Chunk,
        selection: Selection,
        *,
        scale: float,
        features: Features = NO_FEATURES,
    ) -> Attended: ...


def attend(
    q: Tensor,
    keys: KeyView,
    chunk: Chunk,
    selection: Selection,
    *,
    scale: float,
    features: Features = NO_FEATURES,
) -> Attended:
    """Attention of a chunk over the keys that a selection names. q [Hq, Tq, D] after RoPE, any strides.

    Dropped pages are absent: never read, whoever selects them. Exact rows are taken as they are. Gathered
    units and a window exclude each other: units are read without looking at where they lie.
    """
    assert features.window is None or selection.gathered is None, "gathered units on a layer with a window"
    assert q.shape[1] == chunk.length and keys.num_tokens >= chunk.start + chunk.length, (q.shape, chunk)
    if selection.is_dense:
        return attend_dense(q, chunk.start, keys, scale=scale, features=features)
    exact = selection.exact
    num_listed = chunk.length - (0 if exact is None else exact.lse.shape[1])  # the exact rows need no work
    listed = _attend_lists(q[:, :num_listed], chunk.start, keys, selection, scale, features)
    if exact is None:
        return Attended(*corrected(listed.out, listed.lse, q, chunk, selection, scale, features))
    out = torch.cat([listed.out, exact.out.to(q.dtype)], dim=1)
    return Attended(out, torch.cat([listed.lse, exact.lse], dim=1))


def attend_dense(
    q: Tensor, start: int, keys: KeyView, *, scale: float, features: Features = NO_FEATURES
) -> Attended:
    """Attention of the rows at positions [start, start + T) over every causal key held, within the window if
    there is one. q [Hq, T, D]."""
    k, v = (x[:, : start + q.shape[1]].to(q.dtype) for x in keys.contiguous())  # [Hkv, N, D]
    grouped = q.view(k.shape[0], -1, *q.shape[1:])  # [Hkv, G, T, D]
    held = held_tokens(keys, start + q.shape[1])
    if q.device.type != "cpu" or held is not None or features.window or features.softcap:
        out, lse = _dense_by_rows(grouped, k, v, start, held, scale, features)
    else:
        # The chunk's own keys are causal from its first row on; the past needs no mask at all.
        out, lse = _flash(grouped, k[:, start:], v[:, start:], scale, is_causal=True)
        if start:
            past = _flash(grouped, k[:, :start], v[:, :start], scale, is_causal=False)
            out, lse = _merge(past, (out, lse))
    return with_sinks(out.flatten(0, 1), lse.flatten(0, 1), features.sinks, q.dtype)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Attended:
    """out [Hq, T, D] and lse [Hq, T] once a sink has taken its share of each row. sinks [Hq]."""
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out, lse = out * (lse - whole).exp()[..., None], whole
    return Attended(out.to(dtype), lse.float())


def held_tokens(keys: KeyView, num_tokens: int) -> Tensor | None:
    """Which of the first tokens each row holds: bool [Hkv, num_tokens], or None where it is known to be all.

    Only on CPU is it known for free; elsewhere asking would wait for the device.
    """
    held = keys.pages[:, : -(-num_tokens // PAGE_SIZE)] >= 0
    if held.device.type == "cpu" and bool(held.all()):
        return None
    return held.repeat_interleave(PAGE_SIZE, dim=1)[:, :num_tokens]


def _attend_lists(
    q: Tensor, start: int, keys: KeyView, selection: Selection, scale: float, features: Features
) -> Attended:
    """The rows q [Hq, T, D] from position `start`: the page that each lies in, and the listed keys before."""
    if q.shape[1] == 0:
        return Attended(torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32))
    own = _attend_own_pages(q, start, keys, selection, scale, features)
    out, lse = _merge(own, _attend_past(q, start, keys, selection, scale, features))
    return with_sinks(out, lse, features.sinks, q.dtype)


def _attend_own_pages(
    q: Tensor, start: int, keys: KeyView, selection: Selection, scale: float, features: Features
) -> tuple[Tensor, Tensor]:
    """The page that each row lies in, if its list names it: the only one that needs a causal mask."""
    num_heads, length, head_dim = q.shape
    num_kv_heads = keys.pages.shape[0]
    first_page, end_page = start // PAGE_SIZE, (start + length - 1) // PAGE_SIZE + 1
    blocks = torch.arange(first_page, end_page, device=q.device)  # [R] the pages that rows lie in
    pages = keys.pages[:, first_page:end_page].long()  # [Hkv, R]
    rows = slice(start - first_page * PAGE_SIZE, start - first_page * PAGE_SIZE + length)
    padded = q.new_zeros(num_heads, blocks.shape[0] * PAGE_SIZE, head_dim)
    padded[:, rows] = q
    by_page = padded.view(num_kv_heads, -1, blocks.shape[0], PAGE_SIZE, head_dim).transpose(1, 2)
    ids = pages.clamp_min(0)
    k, v = keys.k_pool[ids], keys.v_pool[ids]  # [Hkv, R, 64, D]
    if keys.k_scales is not None and keys.v_scales is not None:
        k, v = dequantise(k, keys.k_scales[ids], q.dtype), dequantise(v, keys.v_scales[ids], q.dtype)
    # What was never written or is dropped may hold anything, and 0 * NaN is NaN.
    positions = blocks[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=q.device)
    v = v.masked_fill((positions >= start + length)[..., None] | (pages < 0)[..., None, None], 0)

    named = _names_page(selection, start, blocks)  # [H, R]
    named = named.view(min(named.shape[0], num_kv_heads), -1, blocks.shape[0]).transpose(1, 2)
    named = named & (pages >= 0)[..., None]  # [Hkv, R, G or 1]
    places = torch.arange(PAGE_SIZE, device=q.device)
    unseen = _unseen(places, places, features.window)
    hidden = unseen | ~named[..., None, None]  # [Hkv, R, G or 1, 64, 64]
    out, lse = softmax_attention(
        by_page.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), hidden.flatten(0, 1), scale, features.softcap
    )  # [Hkv * R, G, 64, D], [Hkv * R, G, 64]
    out = out.view(by_page.shape).transpose(1, 2).reshape(padded.shape)
    lse = lse.view(by_page.shape[:-1]).transpose(1, 2).reshape(padded.shape[:-1])
    return out[:, rows], lse[:, rows]


def _unseen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys lie after a query or behind its window: bool [T, N], from positions [T] and [N]."""
    distance = queries[:, None] - keys
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _names_page(selection: Selection, start: int, blocks: Tensor) -> Tensor:
    """Do the lists for the rows of page blocks[r] name that page itself? bool [H, R]."""
    lists = selection.pages
    query_blocks = blocks * PAGE_SIZE // selection.query_block - start // selection.query_block
    counts, starts = lists.counts[:, query_blocks], lists.starts[:, query_blocks]
    named = counts == ALL
    if lists.indices.shape[0]:
        for place in (1, 2):  # ascending, and a query block spans two pages at most
            ids = lists.indices[(starts + counts - place).clamp(0, lists.indices.shape[0] - 1)]
            named = named | ((counts >= place) & (ids == blocks))
    return named


def _attend_past(
    q: Tensor, start: int, keys: KeyView, selection: Selection, scale: float, features: Features
) -> tuple[Tensor, Tensor]:
    """The listed keys before the page that each row lies in: page by page of rows, list by list."""
    num_heads, length, _ = q.shape
    out = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=out.dtype)
    num_kv_heads, num_lists = keys.pages.shape[0], selection.pages.num_heads
    group = num_heads // max(num_lists, num_kv_heads)  # query heads that share both their keys and their list
    reader = _PastReader(keys, selection, start)
    for page in range(start // PAGE_SIZE, (start + length - 1) // PAGE_SIZE + 1):
        rows = slice(max(0, page * PAGE_SIZE - start), (page + 1) * PAGE_SIZE - start)
        for part in range(num_heads // group):
            heads = slice(part * group, (part + 1) * group)
            k, v, positions = reader.read(
                part * num_lists * group // num_heads, part * num_kv_heads * group // num_heads, page
            )
            if k.shape[0] == 0:
                continue
            k, v = k[None].to(q.dtype), v[None].to(q.dtype)
            queries = q[None, heads, rows]
            if q.is_cpu and not features.window and not features.softcap:
                got = _flash(queries, k, v, scale, is_causal=False)
            else:
                hidden = None
                if features.window is not None:
                    first = start + rows.start
                    own = torch.arange(first, first + queries.shape[2], device=q.device)
                    hidden = _unseen(own, positions, features.window)
                got = softmax_attention(queries, k, v, hidden, scale, features.softcap)
            out[heads, rows], lse[heads, rows] = got[0][0], got[1][0]
    return out, lse


class _PastReader:
    """Copies the listed keys before a page of rows out of the pool. The lists' lengths go to the host."""

    def __init__(self, keys: KeyView, selection: Selection, start: int) -> None:
        self.dtype = keys.dtype
        self.k_pool, self.k_scales = keys.k_pool, keys.k_scales
        self.v_pool, self.v_scales = keys.v_pool, keys.v_scales
        self.table = keys.pages[:, : -(-keys.num_tokens // PAGE_SIZE)].long()
        self.any_dropped = bool((self.table < 0).any())
        self.query_block = selection.query_block
        self.first_block = start // selection.query_block
        self.pages, self.units = _HostLists(selection.pages), None
        if selection.gathered is not None:
            self.units = _HostLists(selection.gathered)
        self.offsets = torch.arange(PAGE_SIZE, device=self.table.device)

    def read(self, head: int, kv_head: int, page: int) -> tuple[Tensor, Tensor, Tensor]:
        """What list `head` gives to the rows of a page, of the keys before it: k and v [n, D], n may be 0;
        and the positions of those that stand in pages."""
        query_block = page * PAGE_SIZE // self.query_block - self.first_block
        blocks = self.pages.read(head, query_block)
        tokens = self.offsets[:0]
        if blocks is None:
            blocks = torch.arange(page, device=self.table.device)
        else:
            blocks = blocks[: blocks.shape[0] - int((blocks[-2:] >= page).sum())]
            if self.units is not None:
                tokens = self._tokens(head, kv_head, query_block)
        pages = self.table[kv_head, blocks]
        if self.any_dropped:
            blocks, pages, tokens = blocks[pages >= 0], pages[pages >= 0], tokens[tokens >= 0]
        positions = (blocks[:, None] * PAGE_SIZE + self.offsets).flatten()
        k = self._read(self.k_pool, self.k_scales, pages, tokens)
        return k, self._read(self.v_pool, self.v_scales, pages, tokens), positions

    def _tokens(self, head: int, kv_head: int, query_block: int) -> Tensor:
        """Places of the gathered keys in the flattened pool, negative where dropped: [n] int64."""
        assert self.units is not None
        units = self.units.read(head, query_block)
        assert units is not None, "only pages may be ALL"
        positions = (units[:, None] * self.units.unit + self.offsets[: self.units.unit]).flatten()
        return self.table[kv_head, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE

    def _read(self, pool: Tensor, scales: Tensor | None, pages: Tensor, tokens: Tensor) -> Tensor:
        """Whole pages, then single tokens: [64 * pages + tokens, D]."""
        copy = self._copy(pool, pages, tokens)
        if scales is None:
            return copy
        return dequantise(copy, self._copy(scales.unsqueeze(-1), pages, tokens).squeeze(-1), self.dtype)

    def _copy(self, pool: Tensor, pages: Tensor, tokens: Tensor) -> Tensor:
        """As they lie in a pool [num_pages, 64, D]."""
        if tokens.shape[0] == 0:
            return pool.index_select(0, pages).flatten(0, 1)
        num_paged = pages.shape[0] * PAGE_SIZE
        copy = pool.new_empty(num_paged + tokens.shape[0], pool.shape[2])
        torch.index_select(pool, 0, pages, out=copy[:num_paged].view(-1, *pool.shape[1:]))
        torch.index_select(pool.flatten(0, 1), 0, tokens, out=copy[num_paged:])
        return copy


class _HostLists:
    """Block lists whose starts and counts are Python integers."""

    def __init__(self, lists: BlockLists) -> None:
        self.starts: list[list[int]] = lists.starts.tolist()
        self.counts: list[list[int]] = lists.counts.tolist()
        self.indices = lists.indices.long()
        self.unit = lists.unit

    def read(self, head: int, block: int) -> Tensor | None:
        """[n] int64; None means ALL."""
        start, count = self.starts[head][block], self.counts[head][block]
        return None if count == ALL else self.indices[start : start + count]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """torch's CPU flash attention, which gives the lse too. q [H, G, T, D]; k, v [H, N, D]; T, N > 0."""
    expanded = (q.shape[0], q.shape[1], k.shape[1], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q if q.stride(-1) == 1 else q.contiguous(),
        k[:, None].expand(expanded),
        v[:, None].expand(expanded),
        0.0,
        is_causal,
        scale=scale,
    )
    return out, lse


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its formula, in fp32 (fp64 if given). q [H, G, T, D], k and v [H, N, D].

    hidden bool, broadcasts to [H, G, T, N]; the values of hidden keys must be finite. Gives
    out [H, G, T, D] and lse [H, G, T] in the dtype of the computation.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    scores = ((q.to(dtype) * scale).flatten(1, 2) @ k.mT).view(*q.shape[:3], -1)  # [H, G, T, N]
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(
        top == float("-inf"), 0
    )  # a row without keys: exp(-inf - 0) = 0, where -inf - -inf is NaN
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1)
    out = (weights.flatten(1, 2) @ v).view(q.shape)
    return out / total.clamp_min(torch.finfo(dtype).tiny)[..., None], top[..., 0] + total.log()


def _dense_by_rows(
    q: Tensor, k: Tensor, v: Tensor, start: int, held: Tensor | None, scale: float, features: Features
) -> tuple[Tensor, Tensor]:
    """Causal attention in pieces of rows that keep the scores small. q [Hkv, G, T, D], held [Hkv, N]."""
    num_heads, length, window = q.shape[0] * q.shape[1], q.shape[2], features.window
    reach = k.shape[1] if window is None else min(window, k.shape[1])
    step = max(16, min(reach, SCORE_ELEMS // (num_heads * reach)))  # a piece reads `reach` keys and its own
    pieces = []
    for first in range(0, length, step):
        rows = q[:, :, first : first + step]
        end = start + first + rows.shape[2]  # the keys that the last of these rows sees
        begin = 0 if window is None else max(0, start + first - window + 1)
        positions = torch.arange(begin, end, device=q.device)
        hidden = _unseen(positions[-rows.shape[2] :], positions, window)  # [rows, end - begin]
        if held is not None:
            hidden = hidden | ~held[:, None, None, begin:end]
        piece = softmax_attention(rows, k[:, begin:end], v[:, begin:end], hidden, scale, features.softcap)
        pieces.append(piece)
    outs, lses = zip(*pieces, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax out of two over disjoint keys: pairs of out [..., D] and lse [...]."""
    lse = torch.logaddexp(a[1], b[1])
    finite = lse.masked_fill(lse == float("-inf"), 0)  # neither part has a key: both weights come out as 0
    out = a[0] * (a[1] - finite).exp()[..., None] + b[0] * (b[1] - finite).exp()[..., None]
    return out, lse
