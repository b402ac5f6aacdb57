"""Plans against a model: what resolves, what is refused and in which words, and which digest names it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.loading import load_plan, shipped_plans
from configs.model import ModelInfo
from configs.plan import PlanFile
from engine.plans import resolve_plan, resolve_plans
from kvcache.state import StateRegistry
from sparse.dense import Dense
from sparse.minference import MInference
from tests.tiny import plan

MODEL = ModelInfo("tiny", 4, 6, 2, 16, 256, 8192)
SMOLLM2 = ModelInfo("SmolLM2-135M-Instruct", 30, 9, 3, 64, 49152, 8192)


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_fits_a_model(name: str) -> None:
    model = SMOLLM2 if name.endswith("smollm2") or name.startswith("seerattention") else MODEL
    assert resolve_plan(load_plan(name), model).card.name == name


def test_layers_may_have_methods_of_their_own() -> None:
    parts = {"method": "minference", "layers": {"0-1": "dense", "3": "dense"}}
    kinds = [type(method) for method in resolve_plan(plan(prefill=parts), MODEL).methods]
    assert kinds == [Dense, Dense, MInference, Dense]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"prefill": {"method": "minferense"}}, ["prefill.method", "did you mean 'minference'"]),
        ({"prefill": {"method": "minference", "vertcal": 5}}, ["prefill.vertcal", "did you mean 'vertical'"]),
        ({"prefill": {"method": "dense", "vertical": 5}}, ["prefill.vertical", "dense has no such option"]),
        ({"prefill": {"method": "minference", "vertical": "many"}}, ["prefill.vertical", "many"]),
        ({"prefill": {"method": "minference", "vertical": True}}, ["prefill.vertical", "True"]),
        ({"prefill": {"method": "minference", "grid": False}}, ["prefill.grid", "cannot be set"]),
        ({"prefill": {"method": "minference", "heads": "none.json"}}, ["prefill", "none.json"]),
        ({"prefill": {"layers": {"3-4": "dense"}}}, ["prefill.layers.3-4", "layers 0 to 3"]),
        ({"prefill": {"layers": {"0": "sparse"}}}, ["prefill.layers", "'sparse'"]),
        ({"kv": {"policy": "snapkv", "budget": 10, "query_window": 32}}, ["kv", "budget", "10", "32"]),
        ({"kv": {"policy": "snap"}}, ["kv.policy", "'snapkv'"]),
        ({"kv": {"budget": 100}}, ["kv.budget", "keep_all has no such option"]),
        ({"decode": {"method": "qest"}}, ["decode.method", "did you mean 'quest'"]),
        ({"decode": {"method": "quest", "read": 100}}, ["decode", "read (100)", "multiple of 16"]),
        ({"decode": {"method": "quest", "read": 96}}, ["decode", "read (96)", "always read (96 tokens)"]),
        ({"decode": {"method": "quest", "reuse": 0}}, ["decode", "reuse (0)", "1 to 64"]),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_path_of_the_key(
    parts: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_plan(plan("mine", **parts), MODEL)
    for word in ["mine.yaml", *words]:
        assert word in str(refusal.value)


SLIDING = replace(MODEL, windows=(256, None, 256, None))


def test_layers_with_a_window_are_read_densely_within_it() -> None:
    kinds = [type(method) for method in resolve_plan(plan(prefill={"method": "minference"}), SLIDING).methods]
    assert kinds == [Dense, MInference, Dense, MInference]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"prefill": {"layers": {"1-2": "minference"}}}, ["prefill.layers.1-2", "layer 2", "256 tokens"]),
        ({"kv": {"policy": "snapkv"}}, ["kv.policy", "snapkv", "keep_all"]),
        ({"kv": {"policy": "pyramidkv"}}, ["kv.policy", "pyramidkv", "keep_all"]),
    ],
)
def test_what_a_window_rules_out_is_refused(parts: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_plan(plan("mine", **parts), SLIDING)
    for word in ["mine.yaml", *words]:
        assert word in str(refusal.value)


def test_counts_in_options_are_read_as_people_write_them() -> None:
    resolved = resolve_plan(plan(kv={"policy": "snapkv", "budget": "1K"}), MODEL)
    assert resolved.card.budget == 1024


def test_the_digest_changes_with_whatever_changes_an_answer(tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    entry = {str(head): ["vertical_and_slash", 100, 200, 1] for head in range(6)}

    def digest(budget: int = 100, model: ModelInfo = MODEL, vertical: int = 100) -> str:
        entry["0"][1] = vertical
        heads.write_text(str([entry] * 4).replace("'", '"'))
        parts = {
            "prefill": {"method": "minference", "heads": "heads.json"},
            "kv": {"policy": "snapkv", "budget": budget},
        }
        source = {"name": "p", "source": tmp_path / "p.yaml"}
        return resolve_plan(PlanFile.model_validate({**parts, **source}), model).digest

    assert digest() == digest()
    other_model = ModelInfo("other", 4, 6, 2, 16, 256, 8192)
    assert len({digest(), digest(budget=101), digest(vertical=101), digest(model=other_model)}) == 4


def test_auto_is_open_until_it_is_measured_and_no_part_of_the_digest() -> None:
    resolved = resolve_plan(plan(prefill={"method": "minference", "dense_below": "auto"}), MODEL)
    assert resolved.dense_below is resolved.card.dense_below is None
    known = resolved.with_dense_below(3008)
    assert (known.dense_below, known.card.dense_below) == (3008, 3008)
    assert known.card.digest == known.digest == resolved.digest
    assert resolve_plan(plan(prefill={"dense_below": "auto"}), MODEL).dense_below == 0  # dense anyway


def test_two_plans_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two plans are named 'dense'"):
        resolve_plans([plan("dense"), plan("dense")], MODEL, StateRegistry())


def test_a_boundary_leaves_a_window_of_tokens_behind_it() -> None:
    resolved = resolve_plan(plan(kv={"policy": "snapkv", "budget": 500, "query_window": 100}), MODEL)
    assert resolved.window == 100
    assert resolve_plan(plan(), MODEL).window == 64
