"""Results and timings: what a benchmark writes can be repeated and trusted."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from benchmarks.all import PARTS
from benchmarks.common import CannotRun, exit_with, interleaved_medians, print_table, write_results
from benchmarks.parts import CANNOT_RUN, ROOT, Part, failed, run_parts
from benchmarks.variants import load_variant
from configs.errors import ConfigError
from configs.loading import load_plan


def test_candidates_run_in_turn_and_the_first_round_is_not_counted() -> None:
    ran: list[str] = []

    def case(name: str) -> object:
        return lambda index: ran.append(f"{name}{index}")

    timings = interleaved_medians({"a": case("a"), "b": case("b")}, rounds=3)  # type: ignore[dict-item]
    assert ran == ["a-1", "b-1", "a0", "b0", "a1", "b1", "a2", "b2"]
    assert all(len(timing.walls) == 3 for timing in timings.values())


def test_one_slow_round_does_not_move_a_time() -> None:
    pauses = [0.0, 0.001, 0.2, 0.001]  # seconds; the first is the round that is not counted
    timing = interleaved_medians({"case": lambda index: time.sleep(pauses[index + 1])}, rounds=3)["case"]
    assert sorted(timing.walls)[1] == timing.wall
    assert max(timing.walls) >= 0.2


def test_results_name_device_versions_and_command_but_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--text", str(tmp_path / "novel.txt")])
    path = write_results("sizes", {"rows": [1]}, folder=tmp_path / "here")
    content = json.loads(path.read_text())
    assert content["rows"] == [1] and content["device"] and content["versions"]["torch"]
    assert "novel.txt" in content["command"] and str(tmp_path) not in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["sizes.json"]


def test_tables_show_every_row_uncut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ("name", "share", "ok"), [("a" * 90, 0.123456, True), ("b", None, False)])
    shown = capsys.readouterr().out
    assert "a" * 90 in shown and "0.123" in shown and "yes" in shown and "no" in shown


def test_what_cannot_run_says_why_with_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise CannotRun("no model here")

    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == CANNOT_RUN
    assert "no model here" in capsys.readouterr().err


def test_a_plan_that_is_refused_ends_a_benchmark_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: print(load_plan("dens")))
    assert ended.value.code == 2
    assert "did you mean 'dense'?" in capsys.readouterr().err


def test_make_bench_runs_every_benchmark_that_is_there() -> None:
    modules = {part.arguments[1] for part in PARTS}
    with_main = {
        f"benchmarks.{file.stem}"
        for file in (ROOT / "benchmarks").glob("*.py")
        if '__name__ == "__main__"' in file.read_text()
    }
    elsewhere = {
        "all",
        "gpu",
        "gpu_attention",
        "gpu_decode",
        "gpu_steps",
        "peers",
        "kvpress_peer",
        "tables",
    }  # run others, run on a GPU, are run by others, or show what was measured
    assert modules == with_main - {f"benchmarks.{name}" for name in elsewhere}


def test_parts_are_run_saved_skipped_and_stopped_in_time() -> None:
    saved: list[int] = []
    parts = [
        Part("works", ("-c", "print('hello')")),
        Part("breaks", ("-c", "raise SystemExit(1)")),
        Part("misses", ("-c", f"raise SystemExit({CANNOT_RUN})")),
        Part("needs", ("-c", ""), needs=("no_such_module", "no_such.module")),
        Part("hangs", ("-c", "import time; time.sleep(60)"), seconds=1.0),
    ]
    outcomes = run_parts(parts, lambda done: saved.append(len(done)))
    assert [outcome.status for outcome in outcomes] == [
        *("passed", "failed", "skipped", "skipped", "out of time")
    ]
    assert outcomes[0].tail == ("hello",)
    assert outcomes[3].reason == "not installed: no_such_module, no_such.module"
    assert outcomes[4].seconds < 30
    assert saved == [1, 2, 3, 4, 5] and failed(outcomes) and not failed(outcomes[:1])


def test_no_part_starts_after_the_time_for_all() -> None:
    (outcome,) = run_parts([Part("late", ("-c", "raise SystemExit(1)"))], lambda done: None, total=0.0)
    assert outcome.status == "skipped" and "are over" in (outcome.reason or "")


def test_a_plan_may_be_named_with_options_changed() -> None:
    plan = load_variant(
        "hip:prefill.keep=[256, 128, 64],prefill.dense_below=0,kv.policy=snapkv,kv.budget=512"
    )
    assert plan.name.startswith("hip:") and plan.prefill.method == "hip" and plan.prefill.dense_below == 0
    assert plan.prefill.options["keep"] == [256, 128, 64]
    assert plan.kv.policy == "snapkv" and plan.kv.options == {"budget": 512}
    assert load_variant("hip") == load_plan("hip")


@pytest.mark.parametrize("change", ["budget=512", "kv.budget", "cache.dtype=int8"])
def test_a_change_that_names_no_option_of_a_plan_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(change)):
        load_variant(f"snapkv:{change}")
