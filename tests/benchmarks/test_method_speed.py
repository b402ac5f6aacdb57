"""The benchmark of methods: all get the same queries; density and recall are what serving reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import method_speed
from benchmarks.method_speed import DENSE, TORCH, Layer, rows_of
from benchmarks.prompts import load_text, load_tokenizer
from benchmarks.scoring import Scorer
from benchmarks.variants import load_method, load_variant, method_plans
from configs.schema import EngineConfig
from tests.benchmarks.builders import save_model, save_plan, save_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


def run(folder: Path, model: Path, *flags: str, words: int = 1500) -> dict[str, Any]:
    threads = torch.get_num_threads()
    given = ("--model", str(model), "--text", str(save_text(folder, words)), "--out", str(folder))
    try:
        method_speed.main([*given, "--rounds", "1", "--threads", "1", *flags])
    finally:
        torch.set_num_threads(threads)
    content: dict[str, Any] = json.loads((folder / "method_speed.json").read_text())
    return content


def test_methods_are_measured_side_by_side_in_the_last_chunk(tmp_path: Path, model: Path) -> None:
    half = "mean-pool:prefill.threshold=0.5"
    mended = f"{half},prefill.delta=8"
    whole = save_plan(tmp_path, "whole", "prefill: {method: mean_pool, threshold: 1.0}")
    methods = ("minference:prefill.vertical=30,prefill.slash=100", "mean_pool", str(whole), half, mended)
    content = run(tmp_path, model, "--method", *methods, "--lengths", "1280", "--chunk", "256")
    rows = {row["candidate"]: row for row in content["rows"]}
    assert list(rows) == [TORCH, DENSE, methods[0], "mean-pool", "whole", half, mended]
    every_eighth = (1 - rows[half]["density"]) / 8
    assert rows[mended]["density"] - rows[half]["density"] == pytest.approx(every_eighth, rel=0.2)
    assert rows[mended]["recall"] == rows[half]["recall"], "of the selection, before any correction"
    assert rows[DENSE]["density"] == rows["whole"]["density"] == rows["whole"]["recall"] == 1
    assert 0 < rows[methods[0]]["density"] < 0.6 and rows[methods[0]]["recall"] < 1
    assert rows[methods[0]]["recall_p5"] < rows[methods[0]]["recall"]
    assert content["prompts"][0]["hidden_states"] == "dense" and len(content["prompts"][0]["layers"]) == 3
    assert content["prompts"][0]["text_repeats"] == 1


def test_density_and_recall_are_those_that_serving_reports(tmp_path: Path, model: Path) -> None:
    """Of a prompt that is one chunk: the last chunk is all of it."""
    plan = save_plan(tmp_path, "thin", "prefill: {method: mean_pool, threshold: 0.5, window: 1}")
    (row,) = run(tmp_path, model, "--method", str(plan), "--lengths", "640")["rows"][2:]
    tokens = load_text(save_text(tmp_path), load_tokenizer(model)).ring(0, 640)
    config = EngineConfig(model=str(model))
    plans = [load_variant(str(plan))]
    scorer = Scorer(model, config, plans, dtype="float32", device="cpu", longest=641)
    # Hidden states differ: there each layer reads what the method chose in those before.
    cost = scorer.score("thin", tokens, 640, [639]).cost
    assert row["density"] == pytest.approx(cost.prefill_read_fraction, abs=0.03)
    assert row["recall"] == pytest.approx(cost.attention_recall, abs=0.15)


def test_prompts_beyond_the_context_stretch_rope_and_read_through_a_window(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_speed, "EXACT", 1024)
    (how,) = run(tmp_path, model, "--method", "mean_pool", "--lengths", "4160", words=300)["prompts"]
    assert how["rope_scaling"] == "yarn:2" and how["hidden_states"] == "first 128 and nearest 4096 tokens"
    assert how["text_repeats"] > 2


def test_times_of_layers_add_up() -> None:
    found = {
        TORCH: [Layer(0.4), Layer(0.4)],
        DENSE: [Layer(0.2), Layer(0.4)],
        "half": [Layer(0.1, 0.05, 0.5, [0.9]), Layer(0.1, 0.15, 0.3, [0.7])],
    }
    exact, ours, half = rows_of(512, found)
    assert (exact.over_dense, ours.over_torch, ours.attend_ms) == (0.75, 1.3333, 300)
    assert (half.select_ms, half.attend_ms, half.select_share) == (100, 100, 0.5)
    assert (half.over_dense, half.over_torch) == (1.5, 2)
    assert (half.density, half.recall) == (0.4, 0.8)


def test_a_method_stands_for_the_plan_that_ships_with_it() -> None:
    assert load_method("mean_pool").name == load_method("mean-pool").name == "mean-pool"
    assert load_method("mean_pool:prefill.threshold=0.5").prefill.options["threshold"] == 0.5
    assert "minference" in method_plans() and not {"dense", "snapkv", "quest"} & set(method_plans())
