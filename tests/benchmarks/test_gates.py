"""The benchmark of gates: equal budgets, judged the same, and the numbers in the order that must hold."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gates
from benchmarks.common import CannotRun
from sparse.gate_files import Gate, write_gates
from tests.benchmarks.builders import save_model, save_text
from tests.tiny import tiny_gates


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


def run(folder: Path, model: Path, gates_file: Path, *flags: str) -> list[dict[str, float]]:
    threads = torch.get_num_threads()
    given = ("--gates", str(gates_file), "--report", str(save_text(folder)), "--model", str(model))
    try:
        gates.main(
            [*given, "--out", str(folder), "--threads", "1", "--length", "640", "--samples", "1", *flags]
        )
    finally:
        torch.set_num_threads(threads)
    content = json.loads((folder / "gates.json").read_text())
    assert content["settings"]["gates"] == gates_file.name
    rows: list[dict[str, float]] = content["rows"]
    return rows


def test_scores_are_compared_at_equal_budget(tmp_path: Path, model: Path) -> None:
    found = run(tmp_path, model, tiny_gates(tmp_path), "--budgets", "3", "5", "--scored-budgets", "3", "10")
    rows = {(row["score"], row["budget"]): row for row in found}
    for budget in (3, 5):
        shares = {kind: rows[kind, budget]["captured"] for kind in gates.KINDS}
        assert max(shares, key=lambda kind: shares[kind]) == "attention"
        assert all(rows[kind, 3]["captured"] < rows[kind, 5]["captured"] < 1 for kind in gates.KINDS)
    exact = rows["dense", None]
    for kind in gates.KINDS:
        assert rows[kind, 3]["copy_read_fraction"] == rows["local", 3]["copy_read_fraction"] < 0.7
        assert rows[kind, 3]["copy_perplexity"] != exact["copy_perplexity"]
        for name in ("copy_perplexity", "prose_perplexity"):  # all of the ten pages, and half an eleventh
            assert rows[kind, 10]["prose_read_fraction"] > 0.97
            assert rows[kind, 10][name] == pytest.approx(exact[name], rel=0.05)


def test_gates_are_not_judged_by_what_they_learnt_from(tmp_path: Path, model: Path) -> None:
    digest = hashlib.sha256(save_text(tmp_path).read_bytes()).hexdigest()
    (tmp_path / "gates.json").write_text(json.dumps({"texts": [{"name": "text.txt", "sha256": digest}]}))
    with pytest.raises(CannotRun, match="trained on"):
        run(tmp_path, model, tiny_gates(tmp_path))


def test_a_text_that_is_too_short_is_said(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CannotRun, match="longer text"):
        run(tmp_path, model, tiny_gates(tmp_path), "--length", "16000", "--scored-budgets")


def test_gates_of_mean_keys_capture_more_than_chance(tmp_path: Path, model: Path) -> None:
    own = torch.eye(16)
    mean = Gate(torch.cat((torch.zeros(32, 16), own)).repeat(2, 1, 1), own.repeat(6, 1, 1))
    write_gates(tmp_path / "mean.safetensors", [Gate(mean.k.clone(), mean.q.clone()) for _ in range(3)])
    found = run(tmp_path, model, tmp_path / "mean.safetensors", "--budgets", "4", "--scored-budgets")
    share = {row["score"]: row.get("captured") for row in found}
    assert share["attention"] > share["gate"] > share["random"]
