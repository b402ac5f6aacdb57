"""What a mask of pages leaves of a selection: intersected exactly, page of queries by page, on the device."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.model import PAGE_SIZE
from sparse.base import Chunk
from sparse.selection import ALL, BlockLists, Selection, lists_from_mask, mask_from_lists


def intersect(selection: Selection, mask: Tensor, chunk: Chunk) -> Selection:
    """The keys of a selection that lie in pages of a causal mask, bool [Hkv, B, P]. B: pages of queries.

    Query blocks become 64 rows, since every page of queries has a mask of its own. Rows that were computed
    exactly, over every key, read all that the mask names instead, and so do the others of their page.
    """
    if selection.is_dense:
        pages = lists_from_mask(mask, PAGE_SIZE)
        return replace(selection, query_block=PAGE_SIZE, pages=pages, exact=None)
    lists = selection.pages
    heads_each = max(1, mask.shape[0] // lists.num_heads)  # heads that take from one list
    mask = mask.repeat_interleave(max(1, lists.num_heads // mask.shape[0]), dim=0)  # [H, B, P]
    query_page = chunk.start // PAGE_SIZE + torch.arange(mask.shape[1], device=mask.device)
    block = query_page * PAGE_SIZE // selection.query_block - chunk.start // selection.query_block  # [B]
    read_all = lists.counts[:, block] == ALL
    if selection.exact is not None:
        first_exact = chunk.start + chunk.length - selection.exact.lse.shape[1]
        read_all = read_all | (query_page >= first_exact // PAGE_SIZE)
    read_all = read_all.repeat_interleave(heads_each, dim=0)[..., None]  # [H, B, 1]
    listed = mask_from_lists(lists, block, mask.shape[2]).repeat_interleave(heads_each, dim=0)
    gathered = selection.gathered
    if gathered is not None:
        half = query_page * PAGE_SIZE % selection.query_block // PAGE_SIZE  # [B] page within its query block
        gathered = _filter(gathered, block, half, mask & ~read_all)
    correction = selection.correction
    if correction is not None:
        left_out = correction.left_out.repeat_interleave(heads_each, dim=0) & mask & ~read_all
        correction = replace(correction, left_out=left_out)
    pages = lists_from_mask((listed | read_all) & mask, PAGE_SIZE)
    return replace(
        selection, query_block=PAGE_SIZE, pages=pages, gathered=gathered, exact=None, correction=correction
    )


def _filter(lists: BlockLists, block: Tensor, half: Tensor, allowed: Tensor) -> BlockLists:
    """Units whose page is allowed, for each head and page of queries: bool allowed [H, B, P].

    Page b of queries takes from the list `block[b]`, as its `half[b]`-th taker. Costs by the entries that are
    listed, not by the keys there are. Lists do not overlap: every entry has one owner, and is copied once for
    each list that may take it.
    """
    num_heads, num_pages, _ = allowed.shape
    device, capacity, num_blocks = allowed.device, lists.indices.shape[0], lists.starts.shape[1]
    starts, counts = lists.starts.flatten(), lists.counts.flatten().long()  # by list
    entry = torch.arange(capacity, device=device)
    # By start, then by count: an empty list that begins where another does must not own its entries.
    order = counts.argsort(stable=True)
    order = order[starts[order].argsort(stable=True)]
    owner = order[(torch.searchsorted(starts[order], entry, right=True) - 1).clamp_min(0)]  # [capacity]
    is_listed = (entry >= starts[owner]) & (entry < starts[owner] + counts[owner])

    # Copy c serves one head of those that share a list, and one page of queries of a block.
    heads_each, halves = num_heads // lists.num_heads, 2
    takers = torch.full((starts.shape[0], heads_each * halves), num_heads * num_pages, device=device)
    head = torch.arange(num_heads, device=device)[:, None]
    source = head // heads_each * num_blocks + block  # [H, B] the list that it takes from
    copy = head % heads_each * halves + half  # [H, B]
    takers[source, copy] = head * num_pages + torch.arange(num_pages, device=device)
    allowed = pad(
        allowed.flatten(0, 1), (0, 0, 0, 1)
    )  # [H * B + 1, P]: the last for copies that nobody takes
    page = (lists.indices.long() * lists.unit // PAGE_SIZE).clamp(0, allowed.shape[1] - 1)
    keep = (allowed[takers[owner], page[:, None]] & is_listed[:, None]).mT  # [C, capacity]
    before = pad(keep.cumsum(-1), (1, 0))  # [C, capacity + 1] kept before each entry
    place = starts[owner] + before[:, :-1] - before[:, starts[owner].clamp_max(capacity)]
    place = place + capacity * torch.arange(keep.shape[0], device=device)[:, None]
    indices = lists.indices.new_zeros(keep.numel() + 1)
    indices.scatter_(
        0, torch.where(keep, place, keep.numel()).flatten(), lists.indices.repeat(keep.shape[0])
    )  # what is not kept shares one extra place, cut off
    first = starts[source]  # [H, B]
    last = first + counts[source].clamp_min(0)
    kept = before[copy, last.clamp_max(capacity)] - before[copy, first.clamp_max(capacity)]
    return BlockLists(first + capacity * copy, kept.int(), indices[:-1], lists.unit)
