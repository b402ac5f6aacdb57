"""Index lists say what the mask they were made from says."""

import pytest
import torch

from sparse.selection import Selection, dense, lists_from_ids, lists_from_mask, num_query_blocks, pack


def test_lists_hold_the_true_cells_in_ascending_order() -> None:
    mask = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[1, 2] = False
    mask[2, 0] = True
    lists = lists_from_mask(mask, 16)
    assert (lists.num_heads, lists.unit) == (3, 16)
    assert (lists.starts.dtype, lists.counts.dtype, lists.indices.dtype) == (
        torch.int64,
        torch.int32,
        torch.int32,
    )
    for head in range(3):
        for block in range(4):
            start, count = int(lists.starts[head, block]), int(lists.counts[head, block])
            assert lists.indices[start : start + count].tolist() == mask[head, block].nonzero()[:, 0].tolist()


def test_lists_hold_the_ids_that_are_kept() -> None:
    ids = torch.tensor([[[3, 7, 9]], [[1, 2, 8]]])
    keep = torch.tensor(
        [[[True, False, True], [False, False, False]], [[True, True, True], [False, True, False]]]
    )
    lists = lists_from_ids(ids, keep, 1)
    assert lists.counts.tolist() == [[2, 0], [3, 1]]
    got = [
        lists.indices[s : s + c].tolist()
        for s, c in zip(lists.starts.flatten(), lists.counts.flatten(), strict=True)
    ]
    assert got == [[3, 9], [], [1, 2, 8], [2]]


def test_pack_moves_what_is_kept_to_the_front() -> None:
    keep = torch.tensor([[True, False, False, True], [False, True, False, False], [False] * 4])
    assert pack(torch.tensor([4, 5, 6, 7]), keep, 2).tolist() == [[4, 7], [5, 0], [0, 0]]


@pytest.mark.parametrize(
    ("start", "length", "query_block", "blocks"),
    [(0, 64, 64, 1), (0, 65, 64, 2), (63, 2, 64, 2), (96, 160, 64, 3), (64, 64, 128, 1)],
)
def test_query_blocks_are_aligned_to_position(start: int, length: int, query_block: int, blocks: int) -> None:
    assert num_query_blocks(start, length, query_block) == blocks


def test_only_the_dense_selection_is_dense() -> None:
    assert dense(torch.device("cpu")).is_dense
    assert not Selection(64, lists_from_mask(torch.zeros(1, 1, 0, dtype=torch.bool), 64)).is_dense
