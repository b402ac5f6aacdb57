"""What a client may ask about its own request: how far the prompt is, and the cost of each head."""

import numpy as np
import pytest
import torch

from configs.model import PAGE_SIZE
from engine.messages import Cost, Reports, TokenOutput
from sparse.base import Chunk
from sparse.recall import causal_cells, read_cells, read_cells_by_head
from sparse.selection import dense
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SPARSE = {"method": "minference", "chunk": 128, "vertical": 40, "slash": 100}
PYRAMID = {"policy": "pyramidkv", "budget": 120}
ALL = Reports(progress=True, per_head=True)


@pytest.fixture(scope="module")
def tiny() -> TinyEngine:
    return tiny_engine(
        plan("dense"), plan("both", prefill=SPARSE, kv=PYRAMID), network=tiny_model(), share_prefixes=True
    )


def outputs(tiny: TinyEngine, length: int, name: str, seed: int, reports: Reports) -> list[TokenOutput]:
    tiny.submit("only", make_prompt(length, seed=seed), greedy(3), name, reports=reports)
    found = []
    while tiny.engine.has_work:
        found += tiny.step()
    tiny.assert_empty()
    return found


def cost_of(found: list[TokenOutput]) -> Cost:
    (cost,) = [output.cost for output in found if output.cost is not None]
    return cost


def test_progress_comes_after_every_chunk_but_the_last(tiny: TinyEngine) -> None:
    found = outputs(tiny, 600, "both", 1, ALL)
    reported = [output.computed for output in found if output.computed is not None]
    assert reported == [128, 256, 384, 512]
    assert not any(output.tokens for output in found[: len(reported)]), "before the first token"
    assert sum(len(output.tokens) for output in found) == 3


def test_nothing_is_reported_unasked(tiny: TinyEngine) -> None:
    found = outputs(tiny, 600, "both", 2, Reports())
    assert [output.computed for output in found] == [None] * 3
    assert cost_of(found).heads is None


@pytest.mark.parametrize("name", ["dense", "both"])
def test_costs_by_head_add_up_to_the_cost(tiny: TinyEngine, name: str) -> None:
    cost = cost_of(outputs(tiny, 700, name, 3, ALL))
    assert cost.heads is not None
    read, kept = np.array(cost.heads.read_fraction), np.array(cost.heads.kept)
    assert read.shape == kept.shape == (3, 2)
    assert read.mean() == pytest.approx(cost.prefill_read_fraction)
    assert kept.mean() == pytest.approx(cost.kv_tokens_kept)
    if name == "dense":
        assert (read == 1).all() and (kept == 700).all()
    else:
        assert (read < 1).all() and len(set(read.flatten())) > 1, "heads choose for themselves"
        assert (kept[0] > kept[2]).all(), "a pyramid"


def test_a_cached_prompt_reports_what_was_computed_of_it(tiny: TinyEngine) -> None:
    outputs(tiny, 600, "dense", 4, ALL)
    again = outputs(tiny, 600, "dense", 4, ALL)
    cost = cost_of(again)
    assert cost.cached_tokens > 0 and cost.heads is not None
    assert np.array(cost.heads.read_fraction).mean() == pytest.approx(cost.prefill_read_fraction)


def test_cells_by_head_add_up_to_all_cells() -> None:
    chunk = Chunk(start=2 * PAGE_SIZE, length=100, prompt_length=228, total_length=230, slot=0)
    selection = dense(torch.device("cpu"))
    cells = read_cells_by_head(selection, chunk, 4)
    assert cells.tolist() == [causal_cells(chunk, 1)] * 4
    assert int(read_cells(selection, chunk, 4)) == causal_cells(chunk, 4)
