"""Streaming, MoA and S2 by their published formulae, and what is refused of their options and files."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.model import BlockSparse, ModelInfo
from kvcache.moa import MoA
from kvcache.reach import FOREVER
from kvcache.s2 import S2
from kvcache.shards import Shards, is_monotone, pages_of_blocks
from kvcache.state import StateRegistry
from kvcache.static_policy import StaticPolicy
from kvcache.streaming import Streaming

ROOT = Path(__file__).parents[2]


def model(query_heads: int = 4, kv_heads: int = 2, layers: int = 2, **fields: Any) -> ModelInfo:
    return ModelInfo("tiny", layers, query_heads, kv_heads, 16, 100, 4096, **fields)


def attached(policy: Any, to: ModelInfo, files: Path = Path()) -> Any:
    policy.attach(to, files, StateRegistry())
    return policy


def mask(policy: StaticPolicy, pages: int) -> np.ndarray:
    """bool [L, Hkv, i, j]."""
    distance = np.arange(pages)[:, None] - np.arange(pages)
    return (distance >= 0) & (distance < policy.page_reach(64 * pages)[:, :, None])


# Streaming


def test_streaming_rounds_to_pages() -> None:
    reach = attached(Streaming(sink=65, window=130), model()).page_reach(512)
    assert reach[0, 0].tolist() == [FOREVER] * 2 + [3] * 6
    assert Streaming(sink=65, window=130).budget == 5 * 64


# MoA


@pytest.mark.parametrize(
    ("alpha", "beta", "total", "blocks"),
    [
        (0, 0.5, 8192, 63),  # 4,096 tokens, less the sink
        (-1024, 1.0, 512, 1),  # raw span below 0: the floor of 128 tokens
        (0, 0.0, 8192, 1),
        (1024, 0, 512, 7),  # no longer than the text
        (0, 0.3, 1000, 4),  # 300 tokens are 5 pages
        (0.9, 0.25, 1280, 4),  # 320.9 is cut to 320 tokens: 5 pages
        (1, 0.25, 1280, 5),
        (5000, 1.0, 100, 1),
    ],
)
def test_spans_are_computed_as_published(alpha: float, beta: float, total: int, blocks: int) -> None:
    span = max(min(int(alpha + beta * total), total), 128)
    assert blocks == math.ceil(span / 64) - 1
    reach = attached(MoA(alpha=float(alpha), beta=beta), model()).page_reach(total)
    assert (reach[..., 0] == FOREVER).all() and (reach[..., 1:] == blocks).all()


def write_spans(folder: Path, alphas: Any, betas: Any) -> Path:
    (folder / "spans.json").write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return folder


def test_groups_keep_the_longest_span_and_the_log_says_what_that_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_spans(tmp_path, [[0] * 4] * 2, [[0.25, 0.75, 0.5, 0.5], [0.25] * 4])
    policy = attached(MoA(spans=Path("spans.json")), model(), files)
    assert policy.page_reach(4096)[:, :, 1].tolist() == [[47, 31], [15, 15]]
    (record,) = caplog.records
    assert "44% of 4096 tokens instead of 38%" in record.getMessage()


def test_spans_of_kv_heads_are_read_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = write_spans(tmp_path, [[0, 128]] * 2, [[0.25, 0.5], [1, 0]])
    policy = attached(MoA(spans=Path("spans.json")), model(), files)
    assert policy.page_reach(4096)[:, :, 1].tolist() == [[15, 33], [63, 1]]
    assert not caplog.records


@pytest.mark.parametrize(
    ("alphas", "betas", "words"),
    [
        ([[0] * 4] * 3, [[0.5] * 4] * 3, "2 layers of 4 query heads and 2 KV heads"),
        ([[0] * 3] * 2, [[0.5] * 3] * 2, "2 layers of 4 query heads and 2 KV heads"),
        ([[0] * 4] * 2, [[0.5] * 2] * 2, "alphas are (2, 4) and betas (2, 2)"),
        ([[0] * 4] * 2, [[1.5] * 4] * 2, "betas go from 1.5 to 1.5"),
        ([[0] * 4] * 2, [[-0.5] * 4] * 2, "not within 0 to 1"),
        ([[0] * 4, [0] * 3], [[0.5] * 4] * 2, "not numbers by layer and head"),
        ([["x"] * 4] * 2, [[0.5] * 4] * 2, "not numbers by layer and head"),
        ([[math.inf] * 4] * 2, [[0.5] * 4] * 2, "finite"),
    ],
)
def test_spans_that_do_not_fit_are_refused(tmp_path: Path, alphas: Any, betas: Any, words: str) -> None:
    with pytest.raises(ValueError, match="spans") as refusal:
        attached(MoA(spans=Path("spans.json")), model(), write_spans(tmp_path, alphas, betas))
    assert words in str(refusal.value)


@pytest.mark.parametrize("content", ["[", "[1]", '{"alphas": []}'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "spans.json").write_text(content)
    with pytest.raises(ValueError, match=r"spans: spans\.json"):
        attached(MoA(spans=Path("spans.json")), model(), tmp_path)


# S2


def test_shards_of_both_conventions_are_as_published() -> None:
    """One row of blocks of 64 far from its start: which of the first eight blocks each head reads."""
    seen = {}
    for name, convention, heads, groups in [
        ("kv heads from 0", "dkernel", (8, 4), False),
        ("query heads from 1", "phi3small", (4, 4), False),
        ("groups from 1", "phi3small", (8, 4), True),
    ]:
        policy = S2(local_blocks=2, vert_stride=4, convention=convention, homo_head_group=groups)  # type: ignore
        found = mask(attached(policy, model(*heads)), 16)[0, :, 15, :8]
        seen[name] = [np.flatnonzero(row).tolist() for row in found]
    assert seen["kv heads from 0"] == [[0, 4], [3, 7], [2, 6], [1, 5]]
    assert seen["query heads from 1"] == seen["groups from 1"] == [[3, 7], [2, 6], [1, 5], [0, 4]]


def test_one_shard_for_all_heads_is_three_columns_and_a_band() -> None:
    found = mask(attached(S2(local_blocks=2, vert_stride=3, homo_head=True), model()), 8)
    expected = [[j <= i and (i - j < 2 or j in (0, 3, 6)) for j in range(8)] for i in range(8)]
    assert (found == np.array(expected)).all()


def test_the_step_between_heads_is_the_stride_by_their_number() -> None:
    policy = attached(S2(vert_stride=8, convention="phi3small", num_dense_heads=1), model(4, 4))
    assert policy._shards.shifts == (1, 3, 5, 7)
    policy = attached(S2(vert_stride=8, num_dense_heads=1), model(2, 2))
    assert policy._shards.shifts == (0, 4)


def test_query_heads_share_what_a_kv_head_keeps_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    policy = S2(local_blocks=1, vert_stride=4, convention="phi3small")
    found = mask(attached(policy, model()), 16)[0, :, 15, :8]
    assert [np.flatnonzero(row).tolist() for row in found] == [[2, 3, 6, 7], [0, 1, 4, 5]]
    assert "KV heads keep what any query head reads: 51% of 4096 tokens instead of 26%" in caplog.text


def test_dense_layers_and_heads_read_everything() -> None:
    policy = S2(local_blocks=1, vert_stride=4, dense_every=2, num_dense_heads=1)
    found = mask(attached(policy, model(4, 2, layers=4)), 8)
    whole = found.sum((2, 3)) == 8 * 9 / 2
    assert whole.tolist() == [[False, True], [True, True], [False, True], [True, True]]


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("local", [1, 5, 6])
def test_smaller_blocks_are_widened_to_pages_that_hold_them_and_no_more(size: int, local: int) -> None:
    per_page, num_blocks = 64 // size, 64
    shards = Shards((0, 3, 5), local_blocks=local, vert_stride=11)
    fine = shards.reads(num_blocks)
    coarse = fine.reshape(3, 16 * 4 // per_page, per_page, -1, per_page).any((2, 4))
    reach = pages_of_blocks(shards.reach(num_blocks), size)
    pages = num_blocks // per_page
    distance = np.arange(pages)[:, None] - np.arange(pages)
    assert np.array_equal((distance >= 0) & (distance < reach[:, None]), coarse)


def test_the_reach_of_blocks_is_the_pattern() -> None:
    for local_stride in (1, 2, 4):
        shards = Shards((0, 1, 2, 3), local_blocks=3, vert_stride=4, local_stride=local_stride)
        distance = np.arange(40)[:, None] - np.arange(40)
        assert np.array_equal((distance >= 0) & (distance < shards.reach(40)[:, None]), shards.reads(40))


def test_only_patterns_that_never_return_are_monotone() -> None:
    assert is_monotone(Shards((0, 1, 2), local_blocks=2, vert_stride=3).reads(20))
    i, j = np.arange(20)[:, None], np.arange(20)
    assert not is_monotone((j <= i) & ((i - j < 2) | ((i - j) % 3 == 0))), "strides counted from the query"
    assert not is_monotone(Shards((0,), local_blocks=4, vert_stride=3, local_stride=2).reads(20))


@pytest.mark.parametrize(
    ("options", "heads", "words"),
    [
        ({"vert_stride": 16}, (32, 8), "vert_stride (16): the shards of 8 heads hold 50%"),
        ({"vert_stride": 16}, (8, 8), "hold 50% of the far blocks, nobody reads the others; 8 would fit"),
        ({"vert_stride": 12}, (24, 8), "hold 67%"),
        ({"local_stride": 2, "vert_stride": 3}, (8, 4), "local_stride (2) must divide vert_stride (3)"),
        ({"num_dense_heads": 5}, (8, 4), "at most 4"),
    ],
)
def test_patterns_that_cannot_work_are_refused(
    options: dict[str, Any], heads: tuple[int, int], words: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        attached(S2(**options), model(*heads))
    assert words in str(refusal.value)


def test_phi3_small_keeps_what_its_query_heads_share() -> None:
    """64 blocks of 8K tokens, 16 of them near: 23% of the blocks by query head, 56% by KV head."""
    pattern = BlockSparse(64, 16, 8, homo_head=False, homo_head_group=False, dense_every=2)
    info = ModelInfo("phi-3-small", 32, 32, 8, 128, 100352, 8192, block_sparse=pattern)
    policy = attached(S2(), info)
    last = mask(policy, 128)[:, :, -1]
    assert last[1::2].all(), "every second layer is dense"
    assert last[::2].mean() == pytest.approx(0.56, abs=0.005)
    shard = policy._shards.reads(128)[:, -1]
    assert shard.mean() == pytest.approx(0.234, abs=0.001)
    with pytest.raises(ValueError, match=r"local_blocks \(8\) is not for a plan to say"):
        attached(S2(local_blocks=8), info)


# Options


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Streaming, {"sink": -1}, "sink (-1)"),
        (Streaming, {"window": 0}, "window (0)"),
        (MoA, {"beta": 1.5}, "beta (1.5) must be 0 to 1"),
        (MoA, {"alpha": math.inf}, "alpha (inf)"),
        (MoA, {"spans": Path("x"), "beta": 0.25}, "alpha and beta have no effect beside spans"),
        (S2, {"local_blocks": 0}, "local_blocks (0)"),
        (S2, {"vert_stride": 0}, "vert_stride (0)"),
        (S2, {"block_size": 128}, "block_size (128)"),
        (S2, {"homo_head_group": True}, "homo_head_group (True) has no effect"),
        (S2, {"dense_every": -1}, "dense_every (-1)"),
    ],
)
def test_options_out_of_range_are_refused_by_name(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        kind(**options)
    assert words in str(refusal.value)


def test_nothing_is_logged_where_groups_cost_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        attached(S2(), model())
        attached(MoA(), model())
    assert not caplog.records
