"""What goes with what: the page says it, plans are refused by it, and what is allowed answers alike."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.model import BlockSparse, ModelInfo
from engine.combinations import as_markdown, prefill_by_policy
from engine.plans import resolve_plan, resolve_plans
from kvcache.decode import Full
from kvcache.decode_methods import DECODE_METHODS
from kvcache.policies import KV_POLICIES
from kvcache.state import StateRegistry
from sparse.methods import PREFILL_METHODS
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_gates, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "plans.md"
MODEL = ModelInfo("tiny", 4, 8, 4, 16, 256, 8192)


def test_the_matrix_of_the_page_is_what_plans_resolve_to() -> None:
    _, _, behind = PAGE.read_text().partition("<!-- farspan plan matrix --markdown -->\n")
    assert behind.partition("<!-- end -->")[0] == as_markdown(), (
        "write what `farspan plan matrix --markdown` says"
    )


def test_every_cell_is_what_a_plan_resolves_to() -> None:
    table = prefill_by_policy()
    assert table.headings == ("prefill", *KV_POLICIES)
    assert [row[0] for row in table.rows] == list(PREFILL_METHODS)
    for method, *row in table.rows:
        for policy, cell in zip(KV_POLICIES, row, strict=True):
            if method != "seerattention":  # no plan without a file
                resolved = resolve_plan(plan(prefill={"method": method}, kv={"policy": policy}), MODEL)
                chunks, moves = "grid" if resolved.grid else "page", resolved.policy.compacts
                assert cell == f"{chunks}, {'copied' if moves else 'shared'}"


def test_methods_that_choose_run_on_the_grid_where_pages_leave_between_chunks() -> None:
    for policy in KV_POLICIES:
        grid = policy in ("streaming", "moa", "s2")
        assert resolve_plan(plan(prefill={"method": "mean_pool"}, kv={"policy": policy}), MODEL).grid is grid
        assert resolve_plan(plan(kv={"policy": policy}), MODEL).grid is False


@pytest.mark.parametrize("policy", ["streaming", "moa", "s2"])
def test_a_floor_on_recall_is_refused_where_a_mask_hides_keys(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"prefill.recall_floor: {policy} hides keys"):
        resolve_plan(
            plan(prefill={"method": "minference", "recall_floor": 0.9}, kv={"policy": policy}), MODEL
        )


def test_a_policy_that_moves_tokens_is_refused_in_a_plan_whose_page_state_cannot_follow() -> None:
    class WithState(Full):
        def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
            states.page_state("sums", (2,))

    parts = {"decode": {"method": "sums"}}
    snap, keep = plan("snap", kv={"policy": "snapkv"}, **parts), plan("keep", **parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.plans.DECODE_METHODS", {**DECODE_METHODS, "sums": WithState})
        with pytest.raises(ConfigError, match="kv.policy: snapkv moves tokens"):
            resolve_plans([snap], MODEL, StateRegistry())
        states = StateRegistry()
        resolve_plans([plan("other", kv={"policy": "snapkv"}), keep], MODEL, states)  # nobody reads it there
        assert states.page_bytes == 8


def test_a_model_trained_with_a_pattern_is_served_otherwise_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pattern = BlockSparse(64, 2, 4, homo_head=False, homo_head_group=True, dense_every=0)
    model = ModelInfo("trained", 4, 8, 4, 16, 256, 8192, block_sparse=pattern)
    resolve_plan(plan(kv={"policy": "s2"}), model)
    assert not caplog.records
    resolve_plan(plan(), model)
    assert "trained to read blocks of its own" in caplog.text


@pytest.mark.parametrize("method", PREFILL_METHODS)
def test_every_pair_answers_alike_alone_and_among_others(method: str, tmp_path: Path) -> None:
    """fp32: the same tokens, whatever shares the step and wherever that lets a prompt be cut."""
    options: dict[str, object] = {"vertical": 40, "slash": 100} if method == "minference" else {}
    if method == "seerattention":
        options = {"gates": str(tiny_gates(tmp_path)), "threshold": 0.05}
    plans = [
        plan(policy, prefill={"method": method, "chunk": 128, **options}, kv={"policy": policy, **small})
        for policy, small in {
            **{name: {"budget": 70} for name in ("snapkv", "ada-snapkv", "pyramidkv")},
            "streaming": {"window": 64},
            "moa": {"beta": 0.25},
            "s2": {"local_blocks": 1},
            "keep_all": {},
        }.items()
    ]
    assert {one.name for one in plans} == set(KV_POLICIES)
    network = tiny_model()
    prompt, other = make_prompt(330), make_prompt(100, seed=1)
    alone = tiny_engine(*plans, network=network)
    answers = {name: alone.answer(prompt, greedy(3), name) for name in alone.plans}
    alone.assert_empty()
    together = tiny_engine(*plans, network=network, max_num_batched_tokens=64)
    for name in together.plans:
        together.submit(f"other {name}", other, greedy(1), name)
        together.submit(name, prompt, greedy(3), name)
    found = together.run()
    assert {name: found[name] for name in answers} == answers
    together.assert_empty()
