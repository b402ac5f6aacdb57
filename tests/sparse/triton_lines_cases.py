"""What the Triton lists of columns and diagonals promise, on the device this process has: run by
test_triton_kernel.py.

Under TRITON_INTERPRET=1 it runs on CPU tensors; else it needs a GPU.
"""

import os

import pytest
import torch

from sparse.estimator import Estimate
from sparse.head_patterns import HeadGroup
from sparse.kernels import triton_lines
from sparse.lines import LineLists, ListLines
from sparse.lines import line_lists as twin
from sparse.selection import BlockLists

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def make_sums(num_heads: int, num_tokens: int, levels: int = 20, seed: int = 0) -> Estimate:
    """Sums of few different values, so that many are equal. out and lse are not looked at."""
    generator = torch.Generator().manual_seed(seed)
    columns, diagonals = (
        torch.randint(levels, (2, num_heads, num_tokens), generator=generator).float().to(DEVICE) / levels
    )
    nothing = torch.empty(0)
    return Estimate(columns, diagonals, nothing, nothing)


def make_group(heads: list[int], columns: list[int], diagonals: list[int]) -> HeadGroup:
    budgets = tuple(torch.tensor(numbers, device=DEVICE) for numbers in (columns, diagonals))
    return HeadGroup(torch.tensor(heads, device=DEVICE), budgets, (max(columns), max(diagonals)))


def listed(lists: BlockLists) -> list[list[list[int]]]:
    indices = lists.indices.tolist()
    return [
        [indices[start : start + count] for start, count in zip(starts, counts, strict=True)]
        for starts, counts in zip(lists.starts.tolist(), lists.counts.tolist(), strict=True)
    ]


def expect_the_same(got: LineLists, want: LineLists) -> None:
    for name in ("pages", "columns"):
        ours, twins = getattr(got, name), getattr(want, name)
        assert ours.unit == twins.unit and ours.counts.dtype == ours.indices.dtype == torch.int32
        assert listed(ours) == listed(twins), name


@pytest.mark.parametrize(
    ("num_tokens", "first_page", "threshold"),
    [(65, 0, None), (1000, 3, None), (1024, 0, None), (1000, 9, 0.3), (4500, 66, None)],
)
def test_lists_are_those_of_the_twin(num_tokens: int, first_page: int, threshold: float | None) -> None:
    seen, group = make_sums(3, num_tokens), make_group([0, 1, 2], [31, 60, 400], [101, 100, 130])
    got = triton_lines.line_lists(seen, group, first_page, threshold)
    expect_the_same(got, twin(seen, group, first_page, threshold))
    assert num_tokens == 65 or got.columns.counts.any(), "some columns lie in no page that is read"


def test_a_group_may_be_some_of_the_heads() -> None:
    seen, group = make_sums(5, 700), make_group([1, 4], [90, 50], [100, 110])
    expect_the_same(triton_lines.line_lists(seen, group, 5), twin(seen, group, 5))


def test_a_walk_and_a_list_of_many_steps_forget_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_lines, "WALK", 512)
    monkeypatch.setattr(triton_lines, "LIST", 16)
    seen, group = make_sums(2, 1500, levels=4), make_group([0, 1], [200, 40], [150, 100])
    expect_the_same(triton_lines.line_lists(seen, group, 20), twin(seen, group, 20))


def test_budgets_of_everything_list_everything() -> None:
    seen, group = make_sums(1, 300), make_group([0], [10**6], [10**6])
    got = triton_lines.line_lists(seen, group, 0)
    assert listed(got.pages) == [[list(range(block + 1)) for block in range(5)]]
    assert not got.columns.counts.any()


@pytest.mark.parametrize("lister", [triton_lines.line_lists, twin], ids=["kernel", "twin"])
def test_diagonals_that_run_through_two_pages_each_find_room_for_both(lister: ListLines) -> None:
    own_page, num_far = 399, 130
    seen = make_sums(1, 64 * (own_page + 1), levels=1)  # zeros
    far = 192 * torch.arange(1, num_far + 1, device=DEVICE) + 10
    seen.diagonals[0, far] = 1.0
    got = lister(seen, make_group([0], [30], [100 + num_far]), own_page)
    back = {0, 1, 2, *(far // 64).tolist(), *(far // 64 + 1).tolist()}
    assert listed(got.pages) == [[sorted(own_page - pages for pages in back)]]
