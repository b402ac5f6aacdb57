"""From one score per (query block, page) to the pages that are read: the rules that methods share."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.model import PAGE_SIZE
from sparse.base import Chunk, KeyView
from sparse.correction import mean_correction
from sparse.selection import ALL, Selection, dense, lists_from_mask


def visible_pages(block_page: Tensor, num_pages: int) -> Tensor:
    """Pages that are not after the rows of page block_page[b]: bool [B, P]."""
    return torch.arange(num_pages, device=block_page.device) <= block_page[:, None]


def forced_pages(sink: int, window: int, block_page: Tensor, num_pages: int) -> Tensor:
    """Pages with one of the first `sink` keys, or with one of the nearest `window` of a row: bool [B, P].

    The rows' own page is always among them.
    """
    pages = torch.arange(num_pages, device=block_page.device)
    back = block_page[:, None] - pages
    reach = (max(window, 1) + PAGE_SIZE - 2) // PAGE_SIZE  # ceil((window - 1) / 64): the first row's farthest
    return ((pages * PAGE_SIZE < sink) | (back <= reach)) & (back >= 0)


def pages_with_mass(mass: Tensor, forced: Tensor, allowed: Tensor, share: float, most: int | None) -> Tensor:
    """The forced pages, and the fewest others with which `share` of a row's mass is held: bool [H, B, P].

    mass [H, B, P] >= 0, of which only that of allowed pages counts; forced and allowed bool, broadcast to it.
    `most` limits the others. A share of 1 wants every allowed page. Ties: the lower page first.
    """
    mass = mass.masked_fill(~allowed, 0)
    others, order = mass.masked_fill(forced | ~allowed, -1).sort(dim=-1, descending=True, stable=True)
    wanted = others >= 0
    if share < 1:
        already = mass.masked_fill(~forced, 0).sum(-1, keepdim=True)
        before = already + pad(others.clamp_min(0).cumsum(-1)[..., :-1], (1, 0))
        wanted &= before < share * mass.sum(-1, keepdim=True)
    if most is not None:
        wanted[..., most:] = False
    return torch.zeros_like(wanted).scatter_(-1, order, wanted) | forced


def read_pages(
    pages: Tensor, chunk: Chunk, last_rows_dense: int, means_of: KeyView | None = None
) -> Selection:
    """The selection of pages [H, B, P] bool; blocks with the last rows of the prompt read everything.

    With `means_of`, the others count by the means of these keys and values.
    """
    correction = None if means_of is None else mean_correction(pages, means_of, chunk)
    selection = Selection(PAGE_SIZE, lists_from_mask(pages, PAGE_SIZE), correction=correction)
    return with_last_rows_dense(selection, chunk, last_rows_dense)


def with_last_rows_dense(selection: Selection, chunk: Chunk, num_rows: int) -> Selection:
    """Let the blocks of 64 that hold the last num_rows rows of the prompt read everything."""
    end = chunk.start + chunk.length
    first_page = (chunk.prompt_length - num_rows) // PAGE_SIZE  # below 0 if the whole prompt is meant
    block = max(0, first_page - chunk.start // PAGE_SIZE)
    if num_rows == 0 or first_page * PAGE_SIZE >= end:
        return selection
    counts = selection.pages.counts.clone()
    counts[:, block:] = ALL
    # Recall judges what was chosen, and these rows were not.
    forced_rows = end - max(chunk.start, first_page * PAGE_SIZE)
    if block == 0:
        return replace(dense(counts.device), estimator_rows=forced_rows)
    return replace(selection, pages=replace(selection.pages, counts=counts), estimator_rows=forced_rows)


def check_range(options: object, least: dict[str, int]) -> None:
    """Refuse integer options below the least that they may be, by name."""
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ValueError(f"{name} ({getattr(options, name)}) must be at least {value}")


def check_share(options: object, name: str) -> None:
    """Refuse a share of the attention that is none."""
    value = getattr(options, name)
    if not 0 < value <= 1:
        raise ValueError(f"{name} ({value}) must be above 0 and at most 1, where 1 reads everything")
