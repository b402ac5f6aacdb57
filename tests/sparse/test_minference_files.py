"""Files of head patterns are read as published; files and options that do not fit are refused by key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.state import StateRegistry
from sparse.minference import MInference
from sparse.selection import ALL, Selection
from tests.sparse.builders import make_chunk, make_keys, make_model, make_qkv, selected_mask

SCALE = 0.25
CHUNK = make_chunk(1000, 400)


def attached(method: MInference, files: Path = Path(".")) -> MInference:
    method.attach(make_model(), files, StateRegistry())
    return method


def heads_file(folder: Path, layers: Any) -> Path:
    (folder / "heads.json").write_text(json.dumps(layers))
    return Path("heads.json")


def entry(vertical: int, slash: int) -> list[Any]:
    return ["vertical_and_slash", vertical, slash, 0.6]


def selection_of(method: MInference, layer: int = 0) -> Selection:
    q, k, v = make_qkv(1000, 400, 4, 2)
    return method.select(layer, q, make_keys(k, v), CHUNK, scale=SCALE)


def mask_of(method: MInference, layer: int = 0) -> Tensor:
    """What a method reads of a chunk whose last 64 rows may be exact: bool [Hq, 400 - 64, 1400]."""
    return selected_mask(selection_of(method, layer), CHUNK)[:, :-64]


def test_budgets_per_head_come_from_the_file(tmp_path: Path) -> None:
    layers = [{str(h): entry(40 * (h + 1) + layer, 110 + 30 * h) for h in range(4)} for layer in range(2)]
    method = attached(MInference(heads=heads_file(tmp_path, layers)), tmp_path)
    for layer in range(2):
        got = mask_of(method, layer)
        for head in range(4):
            alone = attached(MInference(40 * (head + 1) + layer, 110 + 30 * head))
            assert torch.equal(got[head], mask_of(alone, layer)[head])


def test_heads_of_all_patterns_share_a_layer(tmp_path: Path) -> None:
    heads = {
        "0": ["block_sparse", 1000, 3, 0.5],
        "1": ["vertical_and_slash", 60, 100, 0.5],
        "2": ["stream_llm", 70, 300, 12345],
        "3": ["tri_shape", 10, 40],
    }
    plain = {str(head): ["a_shape", 70, 300] for head in range(4)}
    method = attached(MInference(heads=heads_file(tmp_path, [heads, plain])), tmp_path)
    assert method.grid, "one head with an estimator is enough"
    mixed = mask_of(method)
    gathered = selection_of(method).gathered
    assert gathered is not None and (gathered.counts.sum(1) > 0).tolist() == [False, True, False, False]
    for head, alone in enumerate(
        (
            MInference(pattern="block_sparse", top_k=3),
            MInference(60, 100),
            MInference(pattern="a_shape", init=70, local=300),
            MInference(pattern="tri_shape", init=10, local=40),
        )
    ):
        assert torch.equal(mixed[head], mask_of(attached(alone))[head]), head
    a_shape = mask_of(attached(MInference(pattern="a_shape", init=70, local=300)))
    assert torch.equal(mask_of(method, 1), a_shape)
    assert len({mixed[head].sum().item() for head in range(4)}) == 4


def test_only_heads_that_want_it_have_more_dense_rows_than_the_exact_ones(tmp_path: Path) -> None:
    heads = {"0": entry(30, 100), "1": ["tri_shape", 10, 40], "2": entry(30, 100), "3": ["a_shape", 10, 40]}
    method = attached(MInference(heads=heads_file(tmp_path, [heads] * 2), last_rows_dense=64), tmp_path)
    counts = selection_of(method).pages.counts
    first = (1400 - 100) // 64 - 1000 // 64  # the query block with the first of the last 100 rows
    assert (counts[1, first:] == ALL).all() and (counts[1, :first] != ALL).all()
    assert (counts[[0, 2, 3]] != ALL).all(), "the estimator has computed the last 64"


def test_files_without_vertical_slash_heads_need_no_grid(tmp_path: Path) -> None:
    layers = [{str(head): ["stream_llm", 100, 800, 0.9] for head in range(4)}] * 2
    heads = heads_file(tmp_path, layers)
    assert not attached(MInference(heads=heads), tmp_path).grid
    with pytest.raises(ValueError, match=r"threshold \(0.9\) has no effect: no head of heads.json"):
        attached(MInference(heads=heads, threshold=0.9), tmp_path)
    with pytest.raises(ValueError, match=r"last_q \(32\) has no effect: no head of heads.json"):
        attached(MInference(heads=heads, last_q=32), tmp_path)


def test_budgets_beyond_any_prompt_are_everything(tmp_path: Path) -> None:
    layers = [
        {
            "0": ["vertical_and_slash", 10**30, 10**30],
            "1": ["a_shape", 10**30, 1],
            "2": ["tri_shape", 0, 10**30],
            "3": ["block_sparse", 10**30, 10**30],
        }
    ] * 2
    method = attached(MInference(heads=heads_file(tmp_path, layers), last_rows_dense=10), tmp_path)
    assert mask_of(method).sum() == 4 * sum(range(1001, 1337)), (
        "all that 336 rows from position 1000 may read"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: [a], "has 1 layers, tiny has 2"),
        (lambda a, b: [a, b, {}], "has 3 layers, tiny has 2"),
        (lambda a, b: {"0": a}, "must be a list of layers"),
        (lambda a, b: [a, {"0": entry(30, 100)}], r"\[1\] has 1 heads .* tiny has 4 query heads"),
        (lambda a, b: [{**a, "4": entry(30, 100)}, b], r"\[0\] has 5 heads .* tiny has 4 query heads"),
        (
            lambda a, b: [a, {**b, "2": ["blocks", 9, 1, 0.5]}],
            r'\[1\]\["2"\]\[0\] is \'blocks\'; it must be one of vertical_and_slash, a_shape, stream_llm, '
            r"tri_shape, block_sparse",
        ),
        (lambda a, b: [a, {**b, "2": [["a_shape"], 9, 1]}], r'\[1\]\["2"\]\[0\] is \[\'a_shape\'\]; it must'),
        (lambda a, b: [{**a, "1": entry(0, 100)}, b], r'\[0\]\["1"\]\[1\], vertical, .* least 1, not 0'),
        (lambda a, b: [{**a, "1": entry(30, -4)}, b], r'\[0\]\["1"\]\[2\], slash, .* not -4'),
        (lambda a, b: [{**a, "1": entry(True, 100)}, b], "vertical, .* not True"),
        (lambda a, b: [{**a, "1": ["stream_llm", -1, 9]}, b], r'\["1"\]\[1\], init, .* least 0, not -1'),
        (lambda a, b: [{**a, "1": ["tri_shape", 0, 0]}, b], r'\["1"\]\[2\], local, .* least 1, not 0'),
        (lambda a, b: [{**a, "1": ["block_sparse", 0, 0.5]}, b], r'\["1"\]\[2\], top_k, .* not 0.5'),
        (lambda a, b: [{**a, "1": "dense"}, b], r'\[0\]\["1"\] must be \[pattern, number, number, score\]'),
        (lambda a, b: [{**a, "1": ["a_shape", 5]}, b], r'\[0\]\["1"\] must be .*, not \[\'a_shape\', 5\]'),
    ],
)
def test_head_files_that_do_not_fit_are_refused_by_key(tmp_path: Path, change: Any, message: str) -> None:
    layers = [{str(h): entry(30, 100) for h in range(4)} for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        attached(MInference(heads=heads_file(tmp_path, change(*layers))), tmp_path)


def test_unreadable_head_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read .*absent.json"):
        attached(MInference(heads=Path("absent.json")), tmp_path)
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match="cannot read .*broken.json"):
        attached(MInference(heads=Path("broken.json")), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"vertical": 0},
        {"slash": -1},
        {"last_q": 0},
        {"last_q": 65},
        {"init": -1},
        {"local": 0},
        {"top_k": 0},
        {"last_rows_dense": -1},
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"threshold": -0.5},
        {"threshold": float("nan")},
    ],
)
def test_options_out_of_range_are_refused_with_their_value(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must "):
        MInference(**options)


def test_an_unknown_pattern_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"pattern \('lines'\) must be one of vertical_and_slash, a_shape"):
        MInference(pattern="lines")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pattern": "a_shape", "vertical": 100}, "vertical"),
        ({"pattern": "tri_shape", "threshold": 0.9}, "threshold"),
        ({"pattern": "block_sparse", "last_q": 32}, "last_q"),
        ({"pattern": "block_sparse", "local": 100}, "local"),
        ({"top_k": 10}, "top_k"),
        ({"init": 10}, "init"),
        ({"heads": Path("heads.json"), "slash": 100}, "slash"),
        ({"heads": Path("heads.json"), "pattern": "a_shape"}, "pattern"),
    ],
)
def test_options_that_no_head_reads_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(.*\) has no effect: .*; leave it out"):
        MInference(**options)
