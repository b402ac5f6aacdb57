"""Head patterns of MInference: what one query head may read, and the heads of a layer grouped by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_SINKS = 30  # first keys that vertical-slash heads always read, as published
NUM_LOCAL = 100  # distances that they always read, as published
TRI_SHAPE_ROWS = 100  # last rows of a prompt that tri-shape heads read densely, as published
NO_LIMIT = 2**31 - 1  # no prompt is longer; what people write may be


@dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals that the last rows of a chunk look at most."""

    vertical: int  # columns, the forced ones among them
    slash: int  # diagonals, the forced ones among them


@dataclass(frozen=True)
class Window:
    """The first and the nearest keys: A-shape; tri-shape where the prompt's last rows read everything."""

    init: int  # first keys
    local: int  # nearest distances, 0 among them
    last_rows: int  # last rows of the prompt that read everything


@dataclass(frozen=True)
class BlockSparse:
    """The pages whose mean key fits the mean query of a block best."""

    top_k: int  # pages, beside the first one and the rows' own


HeadPattern = VerticalSlash | Window | BlockSparse

NUMBERS = {  # the two numbers that follow a pattern's name in a published file, with the least of each
    "vertical_and_slash": (("vertical", 1), ("slash", 1)),
    "a_shape": (("init", 0), ("local", 1)),
    "stream_llm": (("init", 0), ("local", 1)),  # what the published files call an A-shape
    "tri_shape": (("init", 0), ("local", 1)),
    "block_sparse": (("unused", 0), ("top_k", 1)),
}


def head_pattern(name: str, first: int, second: int) -> HeadPattern:
    """The pattern of a name in NUMBERS with its two numbers."""
    if name == "vertical_and_slash":
        return VerticalSlash(first, second)
    if name == "block_sparse":
        return BlockSparse(second)
    return Window(first, second, TRI_SHAPE_ROWS if name == "tri_shape" else 0)


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """The n query heads of a layer that share a pattern."""

    heads: Tensor  # [n] int64, ascending
    budgets: tuple[Tensor, ...]  # [n] int64 each: the pattern's numbers in the order of its fields
    most: tuple[int, ...]  # the largest of each, for the host


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The query heads of one layer: every head is in one of the groups, a group without heads is None."""

    lines: HeadGroup | None  # vertical, slash: forced lines included
    windows: HeadGroup | None  # init, local
    blocks: HeadGroup | None  # top_k
    last_rows: Tensor  # [Hq] int64: last rows of the prompt that read everything
    least_last_rows: int  # over the heads, for the host
    most_last_rows: int

    def to(self, device: torch.device) -> "LayerHeads":
        lines, windows, blocks = (
            group
            and replace(
                group,
                heads=group.heads.to(device),
                budgets=tuple(budget.to(device) for budget in group.budgets),
            )
            for group in (self.lines, self.windows, self.blocks)
        )
        return replace(self, lines=lines, windows=windows, blocks=blocks, last_rows=self.last_rows.to(device))


def layer_heads(patterns: Sequence[HeadPattern], last_rows: int) -> LayerHeads:
    """Group the heads of a layer, of which all read densely from `last_rows` before the prompt's end."""
    rows = [max(p.last_rows, last_rows) if isinstance(p, Window) else last_rows for p in patterns]
    # The forced lines are part of the budget. A smaller one would keep an arbitrary few of them, perhaps
    # without the diagonal itself: rows without keys.
    lines = {
        head: (max(p.vertical, NUM_SINKS), max(p.slash, NUM_LOCAL))
        for head, p in enumerate(patterns)
        if isinstance(p, VerticalSlash)
    }
    windows = {head: (p.init, p.local) for head, p in enumerate(patterns) if isinstance(p, Window)}
    blocks = {head: (p.top_k,) for head, p in enumerate(patterns) if isinstance(p, BlockSparse)}
    return LayerHeads(
        lines=_group(lines),
        windows=_group(windows),
        blocks=_group(blocks),
        last_rows=torch.tensor(rows).clamp_max(NO_LIMIT),
        least_last_rows=min(rows),
        most_last_rows=max(rows),
    )


def _group(numbers: Mapping[int, tuple[int, ...]]) -> HeadGroup | None:
    """The numbers of each head, by number."""
    if not numbers:
        return None
    columns = [[min(number, NO_LIMIT) for number in column] for column in zip(*numbers.values(), strict=True)]
    return HeadGroup(
        heads=torch.tensor(list(numbers)),
        budgets=tuple(torch.tensor(column) for column in columns),
        most=tuple(max(column) for column in columns),
    )
