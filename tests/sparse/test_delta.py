"""Delta correction: dense rows stand for themselves, and what they change is added to those that follow."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from sparse.attention import attend
from sparse.delta import with_delta
from sparse.mean_pool import MeanPool
from sparse.minference import MInference
from sparse.recall import read_cells_by_head
from sparse.selection import Selection, dense
from tests.sparse.builders import make_chunk, make_keys, make_model, make_qkv

SCALE = 0.25
FP32 = {"atol": 2e-5, "rtol": 1e-4}


def run(
    method: Any, start: int, length: int, every: int | None, features: Features = NO_FEATURES
) -> tuple[Tensor, Tensor, Selection]:
    """Corrected and dense output [Hq, Tq, D] of the last chunk of a prompt, and what the method selected."""
    method.attach(make_model(), None, None)
    q, k, v = make_qkv(start, length, 4, 2)
    keys, chunk = make_keys(k, v), make_chunk(start, length)
    selection = method.select(0, q, keys, chunk, scale=SCALE)
    out = attend(q, keys, chunk, selection, scale=SCALE, features=features).out
    if every is not None:
        out = with_delta(out, q, keys, chunk, selection, every, scale=SCALE, features=features)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE, features=features).out
    return out, full, selection


def sparse(**options: Any) -> MeanPool:
    return MeanPool(**{"threshold": 0.3, "sink": 64, "window": 64, **options})


@pytest.mark.parametrize(
    "features", [NO_FEATURES, Features(softcap=2.0, sinks=torch.tensor([0.5, 1, -1, 2]))]
)
@pytest.mark.parametrize(("start", "length"), [(0, 330), (256, 150)])
def test_every_row_dense_is_dense(start: int, length: int, features: Features) -> None:
    out, full, _ = run(sparse(), start, length, 1, features)
    torch.testing.assert_close(out, full, **FP32)


def test_a_selection_of_everything_is_not_changed() -> None:
    out, full, _ = run(sparse(threshold=1.0), 128, 300, 16)
    torch.testing.assert_close(out, full, **FP32)


@pytest.mark.parametrize("correct_means", [False, True])
@pytest.mark.parametrize("every", [4, 64])
def test_rows_get_the_change_of_the_dense_row_before_them(every: int, correct_means: bool) -> None:
    method = sparse(correct_means=correct_means)
    out, full, _ = run(method, 256, 301, every)
    before, _, _ = run(method, 256, 301, None)
    changes = full[:, ::every] - before[:, ::every]
    torch.testing.assert_close(out[:, ::every], full[:, ::every], **FP32)
    for row in range(301):
        torch.testing.assert_close(out[:, row], before[:, row] + changes[:, row // every], **FP32)
    assert changes.abs().max() > 0.05


def test_rows_that_are_exact_stay_as_they_are() -> None:
    out, full, selection = run(MInference(vertical=16, slash=4), 512, 217, 16)
    assert selection.exact is not None
    exact = selection.exact.lse.shape[1]
    assert (217 - exact) % 16  # exact rows begin within a group
    torch.testing.assert_close(out[:, -exact:], full[:, -exact:], **FP32)
    torch.testing.assert_close(out[:, : 217 - exact : 16], full[:, : 217 - exact : 16], **FP32)


def test_chunks_may_end_at_any_page() -> None:
    method = sparse()
    whole, _, _ = run(method, 0, 500, 16)
    q, k, v = make_qkv(0, 500, 4, 2)
    parts = []
    for start, end in ((0, 192), (192, 256), (256, 500)):
        keys, chunk = make_keys(k[:, :end], v[:, :end]), make_chunk(start, end - start)
        selection = method.select(0, q[:, start:end], keys, chunk, scale=SCALE)
        out = attend(q[:, start:end], keys, chunk, selection, scale=SCALE).out
        parts.append(
            with_delta(out, q[:, start:end], keys, chunk, selection, 16, scale=SCALE, features=NO_FEATURES)
        )
    torch.testing.assert_close(torch.cat(parts, 1), whole, **FP32)


def test_dense_rows_count_as_dense() -> None:
    _, _, selection = run(sparse(), 256, 301, None)
    chunk = make_chunk(256, 301)
    visible = 257 + torch.arange(301)
    assert read_cells_by_head(selection, chunk, 4, None, 1).tolist() == [int(visible.sum())] * 4
    without, some = (read_cells_by_head(selection, chunk, 4, None, every) for every in (None, 16))
    assert (some > without).all() and (some - without <= visible[::16].sum()).all()
